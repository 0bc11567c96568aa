"""The table of a model's probes: every layer and target, beside what needs no board or no training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.probe_scores import majority_baseline, probe_accuracy
from interp.probe_training import Games, fit_probes, train_probes
from interp.probe_types import Probe
from interp.targets import MINE, Target, check_names, shuffled
from othello_gpt import OthelloGPT
from othello_gpt.bootstrap import Estimate


class ProbeRow(NamedTuple):
    """One line of the table: what was scored, and its shares by layer, -1 (the embeddings) first."""

    target: str
    probe: str
    squares: Estimate  # of all squares, those read right
    whole_board: Float[Tensor, " layer"]  # positions with no square wrong
    f1: Float[Tensor, " layer"]  # mean over the classes


class ProbeTable(NamedTuple):
    """Rows, and the text in which they are shown."""

    rows: tuple[ProbeRow, ...]

    def __str__(self) -> str:
        n_layers = max(len(row.whole_board) for row in self.rows)
        head = f"{'% right, by layer':26}" + "".join(
            f"{layer:>7}" for layer in range(-1, n_layers - 1)
        )
        return "\n".join([f"{head}  widest interval, whole boards, F1", *map(_line, self.rows)])


def _line(row: ProbeRow) -> str:
    shares = "".join(f"{100 * share:7.2f}" for share in row.squares.value.tolist())
    if len(row.whole_board) == 1:
        shares += "  (the same at every layer)"
    half = 50 * (row.squares.high - row.squares.low).max().item()
    best = int(row.squares.value.argmax())
    last = f"  +-{half:.2f} {100 * row.whole_board[best]:6.2f} {row.f1[best]:.3f}"
    return f"{row.target + ', ' + row.probe:26}{shares}{last}"


def probe_table(
    model: OthelloGPT,
    squares: Games,
    held_out: Games,
    targets: Sequence[Target] = (MINE,),
    *,
    hidden: int | None = None,
    progress: bool = False,
) -> ProbeTable:
    """Linear probes of all layers, fitted on `squares` and scored on `held_out`, beside their baselines.

    The baselines of each target: the class most frequent at each square and ply; probes fitted to the labels of
    other games; and probes of a model with the same sizes and random weights. Whole boards and F1 are told of
    the row's best layer.

    Args:
        hidden: the size of a hidden layer, to add two-layer probes; None for none.

    Raises:
        ValueError: two targets of one name, or what `fit_probes` and `train_probes` refuse.
    """
    check_names(targets)
    n = len(targets)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = OthelloGPT(model.cfg).to(model.device, model.dtype)
    trained = None
    if hidden is not None:
        # Eight times, since what two layers find of `black` is far from the discriminant where they start.
        trained = train_probes(
            model, squares, targets=targets, hidden=hidden, epochs=8, lr=3e-3, progress=progress
        )
    both = [*targets, *map(shuffled, targets)]
    fitted = fit_probes(model, squares, targets=both, progress=progress)
    half = len(fitted) // 2
    rows = _rows("linear", model, fitted[:half], held_out, targets)
    if trained is not None:
        rows += _rows("two layers", model, trained, held_out, targets)
    rows += _rows("shuffled", model, fitted[half:], held_out, targets)
    fitted = fit_probes(untrained, squares, targets=targets, progress=progress)
    rows += _rows("untrained", untrained, fitted, held_out, targets)
    majority = majority_baseline(model, squares, held_out, targets)
    rows += _split("majority", majority, targets, n)
    order = [target.name for target in targets]
    return ProbeTable(tuple(sorted(rows, key=lambda row: order.index(row.target))))


def _rows(
    name: str,
    model: OthelloGPT,
    probes: Sequence[Probe],
    held_out: Games,
    targets: Sequence[Target],
) -> list[ProbeRow]:
    accuracy = probe_accuracy(model, probes, held_out, targets=targets)
    return _split(name, accuracy, targets, len(probes))


def _split(name: str, accuracy, targets: Sequence[Target], n_probes: int) -> list[ProbeRow]:
    """Rows of the targets, whose probes stand target by target."""
    size = n_probes // len(targets)
    squares, f1 = accuracy.estimate("by_layer"), accuracy.f1.nanmean(-1)
    return [
        ProbeRow(
            target.name,
            name,
            Estimate(*(part[i : i + size] for part in squares)),
            accuracy.whole_board[i : i + size],
            f1[i : i + size],
        )
        for i, target in zip(range(0, n_probes, size), targets, strict=True)
    ]
