"""Settings of all tests: shapes are checked, hypothesis profiles, a quiet hub client.

The import hook must stand before anything of ours is imported. (The pytest option of jaxtyping would do, but
with a configured type checker it takes one package only, and says nothing of the second.)
"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jaxtyping

jaxtyping.install_import_hook(
    ["othello_gpt", "interp"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int is a float
)

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # small tensors are faster so, and sums come out the same on every machine

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile(
    "ci",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def unchecked():
    """Turns the shape checks of the tests off, as they are for users, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def story():
    """The example pair's story over few games, which takes seconds to tell."""
    from interp.story import shipped_probes, tell
    from othello_gpt import OthelloGPT
    from othello_gpt.games import example_game, example_pair

    model, probes = OthelloGPT.from_pretrained(), shipped_probes()
    return tell(model, probes, example_pair(), example_game(), n_games=20, n_pairs=12)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
