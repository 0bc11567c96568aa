"""Editing the believed board: moving the residual stream of a position so that a square reads otherwise.

A `Preset` says at which layers the stream of each game's last position is changed, and how. The published ways
are `mirrored` (ARENA's flip), `added` (Nanda et al.), `optimised` (Li et al.) and `injected` (the pseudoinverse);
`placed` sets what a probe reads, and `erased` takes it out. All work on many games at once, each with its own
square, length and colour: games are padded at their ends, which a causal model does not see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from interp.cases import Cases, make_cases
from interp.probe_training import labelled_activations, resid_site
from interp.probe_types import LinearProbe, Probe, check_reads_mine
from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import square_to_token


def scale_coordinate(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], scale: float
) -> Float[Tensor, "*batch d_model"]:
    """The stream with its coordinate along `direction` multiplied by `-scale`; the rest untouched.

    Scale 1 mirrors the coordinate (mine becomes theirs), 0 erases it, -1 changes nothing. Larger scales
    exaggerate the mirrored belief; from about 4 on they begin to move other squares.

    Source: ARENA 1.5.3, section 1, `apply_scale`.
    """
    unit = direction / direction.norm()
    coordinate = resid @ unit
    return resid - (scale + 1) * coordinate[..., None] * unit


def flip_hook(direction: Float[Tensor, " d_model"], scale: float = 1.0, pos: int = -1):
    """A hook that mirrors one coordinate of the residual stream at one position, in every game."""

    def flip(activation: Tensor, *, hook: object) -> Tensor:
        edited = torch.clone(activation)
        edited[:, pos] = scale_coordinate(activation[:, pos], direction, scale)
        return edited

    return flip


class Wanted(NamedTuple):
    """What is wanted of each row of residual streams: a square (0 to 63) of class `old` becomes `new`."""

    square: Int[Tensor, " case"]
    old: Int[Tensor, " case"]  # 0 empty, 1 theirs, 2 mine
    new: Int[Tensor, " case"]
    board: Int[Tensor, "case square"]  # the classes of all squares, with the new one
    true_board: Int[Tensor, "case square"]

    @classmethod
    def of(cls, cases: Cases, device: torch.device) -> "Wanted":
        """The same of the cases, for the side to move."""
        boards = (cases.classes(b).reshape(len(cases), 64) for b in (cases.after, cases.before))
        parts = (cases.square, *cases.edited_classes(), *boards)
        return cls(*(torch.as_tensor(part, dtype=torch.long, device=device) for part in parts))

    def truth(self) -> "Wanted":
        """That every square stays as it is."""
        return self._replace(new=self.old, board=self.true_board)


# How a preset changes the stream at one layer, given what a probe reads there.
Change = Callable[[Float[Tensor, "case d_model"], Probe, Wanted], Float[Tensor, "case d_model"]]


def mirrored(scale: float = 1.0) -> Change:
    """The coordinate along the direction from old to new class, times `-scale`.

    Source: ARENA 1.5.3, section 1, `apply_scale`.
    """

    def change(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        unit = F.normalize(_contrast(probe, wanted)[0], dim=-1)
        return resid - (scale + 1) * (resid * unit).sum(-1, keepdim=True) * unit

    return change


def added(length: float) -> Change:
    """The unit direction from old to new class, times `length`, added whatever was there.

    Source: Nanda, Lee and Wattenberg 2023, section 4; their code adds 2.3 to change a colour and 1.3 to erase.
    """

    def change(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        return resid + length * F.normalize(_contrast(probe, wanted)[0], dim=-1)

    return change


def placed(margin: float) -> Change:
    """The shortest step after which the probe's logit of the new class stands `margin` above the old one's."""

    def change(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        direction, offset = _contrast(probe, wanted)
        now = (resid * direction).sum(-1) + offset
        per_logit = direction / direction.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return resid + (margin - now)[:, None] * per_logit

    return change


def injected(margin: float) -> Change:
    """The same as `placed`, but by the shortest step that leaves the probe's reading of all other squares as it is.

    The logit of the square's third class, less the mean of the three, stays too.
    """

    def change(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        direction, offset = _contrast(probe, wanted)
        now = (resid * direction).sum(-1) + offset
        centred = _linear(probe).W.flatten(1, 2)
        centred = (centred - centred.mean(-1, keepdim=True)).flatten(1)  # [d_model, square * k]
        inverse = torch.linalg.pinv(centred, rtol=1e-4).view(64, -1, len(resid[0]))
        per_logit = (inverse[wanted.square, wanted.new] - inverse[wanted.square, wanted.old]) / 2
        return resid + (margin - now)[:, None] * per_logit

    return change


def erased() -> Change:
    """The square's logits made equal: the probe no longer knows what it holds, if it is to hold another."""

    def change(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        W, b = (x.flatten(-3, -2) for x in (_linear(probe).W, _linear(probe).b))
        W = (W - W.mean(-1, keepdim=True))[:, wanted.square].movedim(1, 0)  # [case, d_model, k]
        b = b - b.mean(-1, keepdim=True)
        now = torch.einsum("nd,ndk->nk", resid, W) + b[wanted.square]
        step = torch.einsum("nk,nkd->nd", now, torch.linalg.pinv(W, rtol=1e-4))
        return resid - step * (wanted.new != wanted.old)[:, None]

    return change


def optimised(lr: float = 1e-3, steps: int = 1000, keep: float = 0.2) -> Change:
    """The stream after Adam has brought the probe's cross-entropy against the edited board down.

    Args:
        lr: about how far a step moves each dimension.
        steps: how many there are.
        keep: the weight of each other square, against 1 for the edited one.

    Raises:
        ValueError: the optimised stream is not finite.

    Source: Li et al. 2022, appendix F; a probe of any kind, theirs have two layers.
    """

    def change(resid: Tensor, probe: Probe, wanted: Wanted) -> Tensor:
        weight = torch.full_like(wanted.board, keep, dtype=resid.dtype)
        weight.scatter_(1, wanted.square[:, None], 1.0)
        edited = resid.detach().clone()
        optimizer = torch.optim.Adam([edited.requires_grad_()], lr)
        with torch.enable_grad():
            for _ in range(steps):
                logits = probe.logits(edited).flatten(0, 2)
                losses = F.cross_entropy(logits, wanted.board.flatten(), reduction="none")
                (edited.grad,) = torch.autograd.grad(losses @ weight.flatten(), edited)
                optimizer.step()
        if not edited.isfinite().all():
            raise ValueError("the optimised stream is not finite: take a smaller `lr`.")
        return edited.detach()

    return change


def _linear(probe: Probe) -> LinearProbe:
    if not isinstance(probe, LinearProbe):
        raise ValueError(
            "only `optimised` edits take a two-layer probe: the others need directions."
        )
    return probe


def _contrast(
    probe: Probe, wanted: Wanted
) -> tuple[Float[Tensor, "case d_model"], Float[Tensor, " case"]]:
    """Direction and offset of what the logit of the new class has over that of the old one."""
    W, b = (x.flatten(-3, -2) for x in (_linear(probe).W, _linear(probe).b))
    W, b = W[:, wanted.square].movedim(0, 1), b[wanted.square]  # [case, d_model, k]
    new, old, case = wanted.new, wanted.old, torch.arange(len(W), device=W.device)
    return W[case, :, new] - W[case, :, old], b[case, new] - b[case, old]


@dataclass(frozen=True)
class Preset:
    """An edit: which layers are changed, how, and by the probe of which layer."""

    name: str
    change: Change
    layers: tuple[int, ...]
    probe_layer: int | None = None  # None: at each layer its own
    site: str | None = None  # "attn_out" or the like; None: the stream that probes read

    def sites(self) -> dict[str, int]:
        """Where the stream is changed, and the layer whose probe guides it."""
        if self.site is None:
            places = [resid_site(layer) for layer in self.layers]
        else:
            places = [f"blocks.{layer}.hook_{self.site}" for layer in self.layers]
        guides = self.layers if self.probe_layer is None else [self.probe_layer] * len(places)
        return dict(zip(places, guides, strict=True))


class EditedRun(NamedTuple):
    """What comes of an edit at each case's last position."""

    logits: Float[Tensor, "case d_vocab"]
    resid: Float[Tensor, "case d_model"]  # after the last block


@torch.no_grad()
def run_edited(
    model: OthelloGPT,
    cases: Cases,
    preset: Preset | None,
    probes: Sequence[Probe],
    batch_size: int = 128,
) -> EditedRun:
    """Runs the model on every case, with its last position edited by the preset (None: not at all).

    Cases of like length share a batch, in their order: of an even `batch_size`, pairs of one game stay together.

    Args:
        probes: of empty, theirs and mine, for every layer that the preset needs.

    Raises:
        ValueError: no cases, a probe that is missing, asks something else, or does not read this model's stream, two
            of one layer, or logits that are not finite.
    """
    if not len(cases):
        raise ValueError("there are no cases: give at least one.")
    by_layer = _by_layer(model, preset, probes)
    order = cases.last.argsort(kind="stable")
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    runs = [_run_batch(model, cases.select(batch), preset, by_layer) for batch in batches]
    back = torch.as_tensor(order.argsort(), device=model.device)
    run = EditedRun(*(torch.cat(parts)[back] for parts in zip(*runs, strict=True)))
    finite = run.logits.isfinite().all(-1)
    if not finite.all():
        raise ValueError(
            f"the logits of case {finite.int().argmin()} are not finite: look for NaN or overflow in the model, the "
            "probes and the edit."
        )
    return run


def _run_batch(
    model: OthelloGPT, cases: Cases, preset: Preset | None, by_layer: dict[int, Probe]
) -> EditedRun:
    wanted, last = Wanted.of(cases, model.device), torch.as_tensor(cases.last, device=model.device)
    case = torch.arange(len(last), device=model.device)

    def hook_of(probe: Probe, change: Change):
        def edit(activation: Tensor, *, hook: object) -> Tensor:
            edited = activation.clone()
            edited[case, last] = change(activation[case, last], probe, wanted)
            return edited

        return edit

    guides = preset.sites().items() if preset else ()
    hooks = [(site, hook_of(by_layer[layer], preset.change)) for site, layer in guides if preset]
    tokens = games_to_tokens(cases.squares)
    final = resid_site(model.cfg.n_layers - 1)
    with model.hooks(hooks):
        logits, cache = model.run_with_cache(tokens, final)
    return EditedRun(logits[case, last], cache[final][case, last])


def _by_layer(
    model: OthelloGPT, preset: Preset | None, probes: Sequence[Probe]
) -> dict[int, Probe]:
    by_layer = {probe.layer: probe for probe in probes}
    if len(by_layer) != len(probes):
        layers = [probe.layer for probe in probes]
        raise ValueError(f"`probes` are of layers {layers}: give one a layer.")
    needed = preset.sites().values() if preset else ()
    if missing := sorted(set(needed) - set(by_layer)):
        raise ValueError(
            f"the preset needs probes of layers {missing}, but `probes` has those of {sorted(by_layer)}."
        )
    check_reads_mine(probes, model)
    return by_layer


def presets(model: OthelloGPT) -> dict[str, Preset]:
    """The published edits and ours, at layers and lengths that suit this model.

    Layers are those of the literature in a model of eight. Lengths were chosen on `natural_cases(300, seed=1)`
    with the packaged model, the shortest among those that err least, so that a random step of the same length does
    little harm; those of `nanda_add` and `li_gradient` are shares of the stream's length, which
    differs from model to model.
    """
    n_layers = model.cfg.n_layers
    games = torch.from_numpy(board.random_games(16, seed=0))
    layers = tuple(range(n_layers // 4, n_layers))
    resid = labelled_activations(model, games, layers, ()).resid
    length = resid.norm(dim=-1).mean().item()
    return {
        preset.name: preset
        for preset in (
            Preset("arena_flip", mirrored(3.0), (n_layers // 2,)),
            Preset("nanda_add", added(0.1 * length), layers, n_layers * 5 // 8, "attn_out"),
            Preset("li_gradient", optimised(8e-4 * length, steps=30, keep=0.1), layers),
            Preset("pinv", injected(14.0), layers),
            Preset("set", placed(16.0), layers),
            Preset("erase", erased(), layers),
        )
    }


@torch.no_grad()
def latent_saliency(
    model: OthelloGPT,
    game: Int[ndarray, " ply"],
    preset: Preset,
    probes: Sequence[Probe],
    answer: int | None = None,
) -> Float[Tensor, "8 8"]:
    """How much less probable a reply becomes when each disc changes colour, in nats; nan on empty squares.

    All discs are edited in one batch.

    Args:
        game: squares of one game.
        answer: the square of the reply; by default the most probable one.

    Source: Li et al. 2022, section 5, "latent saliency maps".
    """
    state = board.play(game)[0][-1].flatten()
    discs = np.flatnonzero(state)
    cases = make_cases(np.tile(game, (len(discs), 1)), discs, -state[discs])
    clean = run_edited(model, cases.select(slice(1)), None, probes).logits.log_softmax(-1)[0]
    token = int(clean[1:].argmax()) + 1 if answer is None else square_to_token(answer)
    edited = run_edited(model, cases, preset, probes).logits.log_softmax(-1)
    saliency = edited.new_full((64,), torch.nan)
    saliency[torch.from_numpy(discs)] = clean[token] - edited[:, token]
    return saliency.view(8, 8)
