"""Self-contained HTML pages: style, scripts and data in one file that asks the network for nothing."""

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

# Even if something slipped in, a browser would not fetch it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, body: str, data: dict[str, Any], scripts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        body: HTML.
        data: what the scripts read, as JSON in elements with these ids.
        scripts: files of `interp/web`, in order.
    """
    stored = "".join(
        f'<script type="application/json" id="{name}">{_json(value)}</script>'
        for name, value in data.items()
    )
    run = "".join(f"<script>{_file(name)}</script>" for name in scripts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_file('page.css')}</style></head><body>{body}{stored}{run}</body></html>"
    )


def write(page: str, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _json(value: Any) -> str:
    """As short as can be, and without what would end the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (resources.files("interp") / "web" / name).read_text(encoding="utf-8")
