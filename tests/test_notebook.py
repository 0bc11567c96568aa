"""The notebook runs from top to bottom, and what it stores is what it gives."""

import ast
import json
from pathlib import Path

import pytest
import torch

from interp.plots import Svg

PATH = Path(__file__).parent.parent / "examples" / "modular_circuits.ipynb"
CELLS = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]


def executed(source: str, namespace: dict) -> object:
    """The value of the cell's last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.mark.slow
def test_every_cell_runs_and_its_stored_picture_is_of_the_same_kind():
    """In one namespace and in order; a picture has as many parts as the stored one."""
    namespace: dict = {}
    try:
        values = [executed("".join(cell["source"]), namespace) for cell in CELLS]
    finally:
        torch.set_grad_enabled(True)
    stored = [stored_pictures(cell) for cell in CELLS]

    assert sum(map(len, stored)) >= 10
    for value, pictures in zip(values, stored, strict=True):
        assert [isinstance(value, Svg)] == [bool(pictures)]
        for picture in pictures:
            assert picture.count("<rect") == str(value).count("<rect")
            assert picture.count("<svg") == 1


def test_stored_outputs_are_what_code_hosts_show():
    """Pictures as SVG alone, no HTML that a host strips; no errors, and no cell left unexecuted."""
    for cell in CELLS:
        assert cell["execution_count"] is not None
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result")
            assert set(output.get("data", {})) <= {"image/svg+xml", "text/plain"}


def stored_pictures(cell: dict) -> list[str]:
    data = [output.get("data", {}) for output in cell["outputs"]]
    return ["".join(each["image/svg+xml"]) for each in data if "image/svg+xml" in each]
