"""The few SVG shapes that the pictures are made of: cells, discs, lines and words.

Colours that belong to the page are CSS variables (`--ink`, `--line`, `--felt`), so a page can show the same
picture light or dark. A picture has no ids, no style rules and no scripts: many fit on one page.
"""

import html
import math
import re
from collections.abc import Iterable
from pathlib import Path

INK, LINE, FELT = "var(--ink, currentColor)", "var(--line, #999)", "var(--felt, #3f8f5f)"
NEUTRAL = "#bbbbbb"
_BLUE, _RED = (5, 80, 160), (178, 24, 43)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Svg(str):
    """An SVG picture, shown by notebooks as it is."""

    def _repr_svg_(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return str(self)

    def save(self, path: str | Path) -> None:
        """Writes the picture as an .svg file, whole or not at all."""
        partial = Path(f"{path}.partial")
        partial.write_text(self, encoding="utf-8")
        partial.replace(path)


def figure(width: float, height: float, name: str, parts: Iterable[str], scale: float = 1.0) -> Svg:
    """The picture; `name` is what a screen reader says of it."""
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{scale * width:.0f}" role="img" font-family="system-ui, sans-serif" '
        f'style="max-width:100%;height:auto"><title>{escape(name)}</title>{"".join(parts)}</svg>'
    )


def group(x: float, y: float, parts: Iterable[str]) -> str:
    return f'<g transform="translate({x:g} {y:g})">{"".join(parts)}</g>'


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    words: str = "",
    stroke: str = "none",
) -> str:
    """A rectangle that says its words when pointed at; without words the pointer passes through."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="0.5" {_pointed_at(words)}</rect>'
    )


def outline(x: float, y: float, side: float, stroke: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="none" '
        f'stroke="{stroke}" stroke-width="2.5" pointer-events="none"/>'
    )


def circle(
    x: float, y: float, radius: float, fill: str, words: str = "", stroke: str = "none"
) -> str:
    """A disc that says its words when pointed at; without words the pointer passes through."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" '
        f'stroke="{stroke}" {_pointed_at(words)}</circle>'
    )


def _pointed_at(words: str) -> str:
    return f"><title>{escape(words)}</title>" if words else 'pointer-events="none">'


def polyline(points: Iterable[tuple[float, float]], stroke: str, width: float = 2) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{stroke}" stroke-width="{width:g}"/>'


def line(x1: float, y1: float, x2: float, y2: float, opacity: float = 1.0) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{LINE}" '
        f'opacity="{opacity:g}"/>'
    )


def text(
    x: float, y: float, words: str, size: int = 12, anchor: str = "middle", fill: str = INK
) -> str:
    if not words:
        return ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'pointer-events="none">{escape(words)}</text>'
    )


def escape(words: str) -> str:
    """The words with XML's signs escaped; characters that XML cannot hold become U+FFFD."""
    return html.escape(_NOT_XML.sub("\ufffd", words))


def text_width(words: Iterable[str]) -> int:
    """Pixels that the longest needs at size 12: about 7 a character."""
    return 7 * max((len(word) for word in words), default=0)


def colour(value: float, limit: float) -> str:
    """White at zero, blue above, red below, full at plus or minus `limit`; grey for nan."""
    if math.isnan(value):
        return NEUTRAL
    share = min(abs(value), limit) / limit
    full = _BLUE if value > 0 else _RED
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in full)


def readable_on(fill: str) -> str:
    """Black or white, whichever stands out from a colour of `colour`."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "#111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
