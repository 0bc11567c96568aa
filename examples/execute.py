"""Runs the notebooks of this folder from top to bottom and stores what they put out; needs no Jupyter.

    python examples/execute.py

Pictures are stored as SVG alone, which code hosts show; they strip HTML.
"""

import ast
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from interp.plots import Svg


def outputs(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What each code cell puts out, all run in order in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_output("".join(cell["source"]), namespace, i) for i, cell in enumerate(cells, 1)]


def _output(source: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    tree, printed, value = ast.parse(source), io.StringIO(), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), namespace)
    found: list[dict[str, Any]] = []
    if text := printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
    if value is not None:
        data = {"text/plain": ["a picture" if isinstance(value, Svg) else repr(value)]}
        if isinstance(value, Svg):
            data["image/svg+xml"] = [str(value)]
        result = {"output_type": "execute_result", "execution_count": count, "metadata": {}}
        found.append({**result, "data": data})
    return found


def main() -> None:
    """Stores the outputs of every notebook."""
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for i, (cell, found) in enumerate(zip(cells, outputs(notebook), strict=True), 1):
            cell["outputs"], cell["execution_count"] = found, i
        stored = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(stored + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
