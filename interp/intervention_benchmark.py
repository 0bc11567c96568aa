"""Do edits of the believed board change the model's replies as they should, and nothing else?

Each case is a game, a square and what is put there. With N legal replies on a board, a model's errors are its
false positives and false negatives, by either of the two published definitions:

- `top_n`: the N most probable moves are predicted (Li et al. 2022, first version; Nanda et al. 2023)
- `threshold`: the moves above probability 1 / (2 N) are predicted (Li et al. 2022, later version)

An edit could be scored well by breaking things, so beside the errors against the edited board stand those
against the true one, the probability of moves that became legal, ceased to be, or never were, what a probe makes
of the squares that nobody touched, and the same edit made harmless: asked to leave the square as it is, in a
random direction of the same length, and at the embeddings, by their own probe, where there is no board yet. (After
the last block an edit is not harmless: the unembedding still reads it, and reorders the improbable moves.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.cases import Cases
from interp.intervene import Change, EditedRun, Preset, Wanted, presets, run_edited
from interp.probe_training import shown
from interp.probe_types import Probe
from othello_gpt import OthelloGPT
from othello_gpt.bootstrap import Estimate, bootstrap_mean
from othello_gpt.vocab import PLAYABLE


class Outcome(NamedTuple):
    """What the model does after each edit."""

    top_n: Float[Tensor, " case"]  # errors against the edited board, of the N most probable moves
    threshold: Float[Tensor, " case"]  # the same of the moves above 1 / (2 N)
    top_n_before: Float[Tensor, " case"]  # both against the true board
    threshold_before: Float[Tensor, " case"]
    newly_legal: Float[Tensor, " case"]  # probability of the moves that the edit makes legal
    newly_illegal: Float[Tensor, " case"]  # probability of the moves that it takes away
    never_legal: Float[Tensor, " case"]  # probability of moves illegal on both boards
    landed: Float[Tensor, " case"]  # 1 where the probe after the last block reads the new class
    collateral: Float[Tensor, " case"]  # share of the other squares that this probe reads anew


def outcome(cases: Cases, run: EditedRun, unedited: EditedRun, reader: Probe) -> Outcome:
    """Everything that is measured of an edited run; `reader` is a probe after the last block."""
    probabilities = run.logits.softmax(-1)
    before, after = (
        _by_token(boards, run.logits) for boards in (cases.legal_before, cases.legal_after)
    )
    after_errors = (top_n_errors(probabilities, after), threshold_errors(probabilities, after))
    before_errors = (top_n_errors(probabilities, before), threshold_errors(probabilities, before))
    moves = probabilities[:, 1:]
    legal, illegal, never = (
        (moves * which).sum(-1) for which in (after & ~before, before & ~after, ~before & ~after)
    )
    read, true = (reader.logits(r.resid).argmax(-1).flatten(1) for r in (run, unedited))
    square = torch.as_tensor(cases.square, device=read.device)[:, None]
    new = torch.as_tensor(cases.edited_classes()[1], device=read.device)
    landed = (read.gather(1, square)[:, 0] == new).float()
    changed = (read != true).float().scatter(1, square, 0.0)
    return Outcome(
        *after_errors, *before_errors, legal, illegal, never, landed, changed.sum(-1) / 63
    )


def top_n_errors(
    probabilities: Float[Tensor, "case d_vocab"], legal: Bool[Tensor, "case move=60"]
) -> Float[Tensor, " case"]:
    """False positives and false negatives of the N most probable moves, N the number of legal ones."""
    rank = probabilities[:, 1:].argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    predicted = rank < legal.sum(-1, keepdim=True)
    return (predicted ^ legal).sum(-1).float()


def threshold_errors(
    probabilities: Float[Tensor, "case d_vocab"], legal: Bool[Tensor, "case move=60"]
) -> Float[Tensor, " case"]:
    """False positives and false negatives of the moves with a probability above 1 / (2 N)."""
    predicted = probabilities[:, 1:] > 0.5 / legal.sum(-1, keepdim=True)
    return (predicted ^ legal).sum(-1).float()


def _by_token(boards: np.ndarray, like: Tensor) -> Bool[Tensor, "case move=60"]:
    return torch.from_numpy(boards.reshape(len(boards), 64)[:, list(PLAYABLE)]).to(like.device)


def sham(change: Change) -> Change:
    """The same edit, asked to leave the square as it is."""
    return lambda resid, probe, wanted: change(resid, probe, wanted.truth())


def random_beside(change: Change, seed: int = 0) -> Change:
    """For cases that come in pairs: the edit of the first, and of the second a random step of the same length.

    The second must not be edited by itself, since an edit that misses its aim at one layer tries again, with
    more, at the next.

    Args:
        seed: of the steps, which go on from call to call: for the same run again, make the change anew.
    """
    generator = torch.Generator().manual_seed(seed)

    def randomly(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        step = change(resid[::2], probe, Wanted(*(part[::2] for part in wanted))) - resid[::2]
        other = torch.randn(step.shape, generator=generator).to(step)
        other = other * step.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
        return resid + torch.stack([step, other], 1).flatten(0, 1)

    return randomly


def controls(preset: Preset) -> dict[str, Preset]:
    """The edit made harmless in three ways: nothing asked for, nowhere to go, nothing there to edit."""
    return {
        "sham": replace(preset, change=sham(preset.change)),
        RANDOM: replace(preset, change=random_beside(preset.change)),
        "wrong layer": replace(preset, layers=(-1,), site=None, probe_layer=None),
    }


RANDOM = "random direction"


def _run(
    model: OthelloGPT, cases: Cases, preset: Preset | None, probes: Sequence[Probe], control: str
) -> EditedRun:
    if control != RANDOM:
        return run_edited(model, cases, preset, probes)
    pairs = cases.select(np.arange(len(cases)).repeat(2))
    return EditedRun(*(part[1::2] for part in run_edited(model, pairs, preset, probes)))


class Row(NamedTuple):
    """One line of the benchmark."""

    preset: str
    control: str  # "" for the edit itself
    outcome: Outcome
    means: dict[str, Estimate]  # of each field of the outcome, with intervals over cases


HEADS = (  # of the fields of `Outcome`, in two lines
    "top_n threshold top_n threshold newly newly never edit others",
    "after after before before legal illegal legal landed changed",
)


class Benchmark(NamedTuple):
    """Rows, the unedited model first, and the text in which they are shown."""

    n_cases: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        heads = [f"{'':30}" + "".join(f"{word:>10}" for word in line.split()) for line in HEADS]
        heads[0] = f"{self.n_cases} cases".ljust(30) + heads[0][30:]
        return "\n".join([*heads, *map(_line, self.rows)])


def _line(row: Row) -> str:
    name = f"  {row.control}" if row.control else row.preset
    values = "".join(f"{mean.value.item():10.3f}" for mean in row.means.values())
    _, low, high = (part.item() for part in row.means["top_n"])
    return f"{name:30}{values}  {low:.3f} to {high:.3f}"


def benchmark(
    model: OthelloGPT,
    probes: Sequence[Probe],
    cases: Cases,
    edits: Iterable[Preset] | None = None,
    *,
    with_controls: bool = True,
    progress: bool = False,
) -> Benchmark:
    """The unedited model, every edit and its controls on all cases.

    Args:
        probes: of empty, theirs and mine, of all layers: they guide the edits, and the last reads the outcome.
            That of the embeddings (-1) guides a control.
        edits: by default all of `intervene.presets`.
    """
    by_layer, last = {probe.layer: probe for probe in probes}, model.cfg.n_layers - 1
    if last not in by_layer:
        raise ValueError(
            f"`probes` has none of layer {last}, which reads what the edits have done."
        )
    if with_controls and -1 not in by_layer:
        raise ValueError(
            "`probes` has none of the embeddings (layer -1), which guides the control at the wrong layer: add it, "
            "or leave the controls out by `with_controls=False`."
        )
    edits = presets(model).values() if edits is None else edits
    runs: list[tuple[str, str, Preset | None]] = [("null", "", None)]
    for preset in edits:
        runs.append((preset.name, "", preset))
        if with_controls:
            named = controls(preset).items()
            runs += [(preset.name, name, control) for name, control in named]
    unedited = run_edited(model, cases, None, probes)
    rows = []
    for name, control, preset in shown(runs, "edits", progress):
        run = _run(model, cases, preset, probes, control)
        found = outcome(cases, run, unedited, by_layer[last])
        means = {what: bootstrap_mean(values) for what, values in found._asdict().items()}
        rows.append(Row(name, control, found, means))
    return Benchmark(len(cases), tuple(rows))
