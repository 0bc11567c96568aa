"""The package as a whole: shapes are checked, imports run one way, names are exported, the README is true."""

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

import interp.intervene
import othello_gpt
from othello_gpt.vocab import values_on_board

ROOT = Path(__file__).parent.parent
ORDER = [
    "othello_gpt.vocab",
    "othello_gpt.memory",
    "othello_gpt.hooks",
    "othello_gpt.board",
    "othello_gpt.bootstrap",
    "othello_gpt.cache",
    "othello_gpt.games",
    "othello_gpt.model",
    "othello_gpt.onednn",
    "othello_gpt.packing",
    "othello_gpt.weights",
    "othello_gpt.evaluate",
    "othello_gpt.recipe",
    "othello_gpt.optimizers",
    "othello_gpt.train",
    "othello_gpt",
    "othello_gpt.compat.hook_points",
    "othello_gpt.compat.factored",
    "othello_gpt.compat.cache",
    "othello_gpt.compat.model",
    "othello_gpt.compat.notebook",
    "othello_gpt.compat.patching",
    "othello_gpt.compat",
    "interp",
    "interp.svg",
    "interp.webpage",
    "interp.plots",
    "interp.targets",
    "interp.probe_formats",
    "interp.probe_types",
    "interp.probe_training",
    "interp.probe_scores",
    "interp.probe_table",
    "interp.probes",
    "interp.attribution",
    "interp.positions",
    "interp.neurons",
    "interp.probe_geometry",
    "interp.cases",
    "interp.intervene",
    "interp.intervention_benchmark",
    "interp.metrics",
    "interp.rows",
    "interp.patching",
    "interp.ablation",
    "interp.paths",
    "interp.gradients",
    "interp.pairs",
    "interp.spectra",
    "interp.rules",
    "interp.causal_checks",
    "interp.atlas",
    "interp.atlas_page",
    "interp.circuits",
    "interp.playback",
    "interp.arena",
    "interp.story",
    "interp.report",
    "othello_gpt.verify",
    "othello_gpt.cli",
    "othello_gpt.__main__",
]


def test_shapes_are_checked_in_both_packages():
    """The guard on the guard: a wrong shape is caught in a function of each."""
    with pytest.raises(jaxtyping.TypeCheckError):
        values_on_board(torch.ones(61, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError):
        interp.intervene.scale_coordinate(torch.ones(2, 3), torch.ones(4), 1.0)


def test_imports_run_one_way():
    """At the top of a module only what stands before it in the order; nothing of `interp` below `interp`."""
    files = [p for package in ("othello_gpt", "interp") for p in (ROOT / package).rglob("*.py")]
    seen = set()
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        seen.add(module)
        if module == "othello_gpt":
            continue
        for imported in top_level_imports(path):
            assert ORDER.index(imported) < ORDER.index(module), f"{module} imports {imported}"
    assert seen == set(ORDER)


def top_level_imports(path: Path) -> list[str]:
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in ORDER else node.module for name in joined]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name in ORDER]


def test_the_public_names_are_there():
    """`__all__` and the namespace agree."""
    assert all(hasattr(othello_gpt, name) for name in othello_gpt.__all__)
    assert all(hasattr(interp.arena, name) for name in __import__("interp.arena").arena.__all__)


def imported_by(code: str) -> set[str]:
    """The modules that a fresh process has imported after this code, beyond torch's own."""
    code = (
        f"import sys, torch; before = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.slow
def test_importing_costs_torch_and_nothing_heavy():
    """No hub client, no plotly, no progress bar, no pandas at `import othello_gpt`."""
    heavy = {"huggingface_hub", "plotly", "tqdm", "pandas", "beartype", "safetensors", "einops"}

    assert not heavy & imported_by("import othello_gpt")


@pytest.mark.slow
def test_loading_the_packaged_model_brings_in_no_compiler():
    """Torch imports its compiler, a second's work, for some operations on tensors without values."""
    code = "from othello_gpt import OthelloGPT; OthelloGPT.from_pretrained()"

    assert not {"torch._dynamo", "sympy"} & imported_by(code)


@pytest.mark.slow
def test_the_examples_of_the_readme_are_true():
    """Its Python sessions run as they stand."""
    readme = (ROOT / "README.md").read_text()
    sessions = "\n".join(re.findall(r"```pycon\n(.*?)```", readme, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(sessions, {}, "README", "README.md", 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test)

    assert test.examples
    assert result.failed == 0
