"""The notebook runs from top to bottom, and what it stores is what it gives."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = json.loads((EXAMPLES / "modular_circuits.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_every_cell_runs_and_its_stored_output_is_of_the_same_kind():
    """In one namespace and in order; a picture has as many parts as the stored one (else run execute.py)."""
    spec = importlib.util.spec_from_file_location("execute", EXAMPLES / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    try:
        outputs = execute.outputs(NOTEBOOK)
    finally:
        torch.set_grad_enabled(True)
    kinds = [[sorted(output.get("data", {})) for output in found] for found in outputs]

    assert kinds == [[sorted(o.get("data", {})) for o in cell["outputs"]] for cell in CELLS]
    assert sum(map(len, map(pictures, outputs))) >= 10
    for found, cell in zip(outputs, CELLS, strict=True):
        for picture, stored in zip(pictures(found), pictures(cell["outputs"]), strict=True):
            assert picture.count("<rect") == stored.count("<rect")


def test_stored_outputs_are_what_code_hosts_show():
    """Pictures as SVG alone, no HTML that a host strips; no errors, and no cell left unexecuted."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    for cell in CELLS:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result")
            assert set(output.get("data", {})) <= {"image/svg+xml", "text/plain"}


def pictures(outputs: list[dict]) -> list[str]:
    data = [output.get("data", {}) for output in outputs]
    return ["".join(each["image/svg+xml"]) for each in data if "image/svg+xml" in each]
