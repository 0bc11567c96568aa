"""Is this checkpoint what it should be? Layout, hash, folding, loss and legality, each checked by itself.

The published figures can be checked on the published synthetic model only. They are typed in from their
sources; nobody has run this module on that file yet.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from interp.neurons import logit_weights
from interp.patching import patch_sweep, patching_metric
from othello_gpt import board
from othello_gpt.evaluate import evaluate
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.model import GPTConfig, OthelloGPT
from othello_gpt.vocab import label_to_token, square_to_token
from othello_gpt.weights import (
    check_n_heads,
    check_sha256,
    convert,
    detect_layout,
    find_file,
    fold,
    read_state_dict,
    with_stored_eps,
)


class Check(NamedTuple):
    """One thing looked at; `passed` is None for a fact that is only told."""

    name: str
    found: str
    expected: str = ""
    passed: bool | None = None

    def __str__(self) -> str:
        mark = {True: "PASS", False: "FAIL", None: "    "}[self.passed]
        return f"{mark} {self.name:34} {self.found}" + (
            f"  (expected {self.expected})" * bool(self.expected)
        )


class VerifyReport(NamedTuple):
    """All checks of one checkpoint."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


@torch.no_grad()
def verify_checkpoint(
    source: str | Path | None = None,
    *,
    filename: str | None = None,
    n_heads: int | None = None,
    n_games: int = 100,
    seed: int = 2024,
) -> VerifyReport:
    """Checks a checkpoint from a file, a folder or the hub; raises `WeightsError` if it cannot be loaded.

    Args:
        n_games: random games, made from `seed`, on which loss and legality are measured.
    """
    path = find_file(source, filename)
    stored = read_state_dict(path)
    cfg, raw = convert(stored, n_heads)
    check_n_heads(cfg, n_heads)
    cfg = with_stored_eps(cfg, path)
    raw = {name: tensor.double() for name, tensor in raw.items()}
    folded, report = fold(raw)
    model, folded_model = (_model(cfg, weights) for weights in (raw, folded))
    games = board.random_games(n_games, seed)
    gap = _log_prob_gap(model, folded_model, games_to_tokens(games[:8]))
    changed = max(step.largest_change for step in report.steps)
    checks = [
        Check("layout", detect_layout({k.removeprefix("module."): v for k, v in stored.items()})),
        Check("sha256", check_sha256(path, None)),
        Check("sizes", str(cfg)),
        Check(
            "folded and centred already",
            "yes" if changed < 1e-5 else f"no, folding moves {changed:.2g}",
        ),
        Check("folding keeps log-probabilities", f"{gap:.1e}", "below 1e-9 nats", gap < 1e-9),
        *_on_random_games(model.float(), games),
        *_published_figures(model),
    ]
    return VerifyReport(tuple(checks))


def _model(cfg, weights: dict[str, Tensor]) -> OthelloGPT:
    model = OthelloGPT(cfg).double()
    model.load_state_dict(weights)
    return model


def _log_prob_gap(a: OthelloGPT, b: OthelloGPT, tokens: Int[Tensor, "game pos"]) -> float:
    log_probs = [model(tokens[:, : a.cfg.n_ctx]).log_softmax(-1) for model in (a, b)]
    return (log_probs[0] - log_probs[1]).abs().max().item()


def _on_random_games(model: OthelloGPT, games) -> list[Check]:
    scores = evaluate(model, games)
    n_illegal, n_live = int(scores.illegal.sum()), int(scores.live.sum())
    rate, kl = n_illegal / n_live, scores.kl.sum().item() / n_live
    found = f"{rate:.2%} ({n_illegal} of {n_live})"
    # an untrained model of the published size plays 93 % illegal moves: Li et al. 2022, section 2.3
    return [
        Check("illegal top moves, random games", found, "below 50%", rate < 0.5),
        Check("KL from uniform over legal", f"{kl:.4f} nats; a perfect model has 0"),
    ]


# Figures of the published synthetic model. The sample game with the model's best guess after each move, and the
# loss: TransformerLens, demos/Othello_GPT.ipynb and tests/acceptance/test_hooked_transformer.py. The pair of
# games, the sweep and the neuron: ARENA 1.5.3, section 2.
# fmt: off
SAMPLE_INPUT = [
    20, 19, 18, 10, 2, 1, 27, 3, 41, 42, 34, 12, 4, 40, 11, 29, 43, 13, 48, 56,
    33, 39, 22, 44, 24, 5, 46, 6, 32, 36, 51, 58, 52, 60, 21, 53, 26, 31, 37, 9,
    25, 38, 23, 50, 45, 17, 47, 28, 35, 30, 54, 16, 59, 49, 57, 14, 15, 55, 7,
]
SAMPLE_ARGMAX = [
    21, 41, 40, 34, 40, 41, 3, 11, 21, 43, 40, 21, 28, 50, 33, 50, 33, 5, 33, 5,
    52, 46, 14, 46, 14, 47, 38, 57, 36, 50, 38, 15, 28, 26, 28, 59, 50, 28, 14, 28,
    28, 28, 28, 45, 28, 35, 15, 14, 30, 59, 49, 59, 15, 15, 14, 15, 8, 7, 8,
]
SAMPLE_LOSS = 1.9079375
F0_LOG_PROBS = [-2.5273, -12.0080]  # clean, corrupted
SWEEP = {
    "attn_out": [0.0025, 0.0016, 0.0028, 0.0031, 0.0007, 0.0050, 0.0183, 0.2613],
    "mlp_out": [0.7576, -0.0087, 0.0066, 0.0076, 0.0272, 0.6298, 0.6275, 0.0151],
}
L5N1393_LOGITS = {"C0": 0.7372, "D1": 0.2190, "B0": 0.0341, "E2": 0.0388, "G4": -0.0748}
# fmt: on


def _published_figures(model: OthelloGPT) -> list[Check]:
    """Compared only if the model plays the sample game as the published one does, to nine moves in ten."""
    sample = torch.tensor([SAMPLE_INPUT])
    if model.cfg != GPTConfig():
        return []
    logits = model(sample)
    agree = (logits[0].argmax(-1) == torch.tensor(SAMPLE_ARGMAX)).sum().item()
    if agree < 53:
        found = f"no: {agree} of 59 best moves of its sample game"
        return [Check("published synthetic model", found)]
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], sample[0, 1:]).item()
    top = logits[0, 0].topk(3).indices.tolist()
    return [
        Check("sample game, best moves", f"{agree} of 59", "59", agree == 59),
        _near("sample game, loss", [loss], [SAMPLE_LOSS], 4e-5),
        Check("best tokens after C3", str(top), "[21, 33, 19]", top == [21, 33, 19]),
        *_circuit_figures(model),
    ]


def _circuit_figures(model: OthelloGPT) -> list[Check]:
    """The modular circuit of the exercise page: its pair of games, its sweep, its neuron."""
    pair = example_pair()
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    both, token = (model(clean), model(corrupted)), square_to_token(pair.answer)
    log_probs = [logits[0, -1].log_softmax(-1)[token].item() for logits in both]
    swept = patch_sweep(model, clean, corrupted, patching_metric(*both, token))
    to_logits = logit_weights(model, 5, 1393)
    written = [to_logits[label_to_token(label) - 1].item() for label in L5N1393_LOGITS]
    return [
        _near("log-probability of F0", log_probs, F0_LOG_PROBS, 5e-3),
        *(_near(f"sweep, {site}", swept[site].tolist(), SWEEP[site], 2e-3) for site in SWEEP),
        _near("L5N1393 to logits", written, [*L5N1393_LOGITS.values()], 1e-3),
    ]


def _near(name: str, found: list[float], expected: list[float], tolerance: float) -> Check:
    gap = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    told = [" ".join(f"{value:.4f}" for value in values) for values in (found, expected)]
    return Check(name, told[0], f"{told[1]} +- {tolerance:g}", gap <= tolerance)
