"""Many runs that differ at their last position only, as rows of one batch: what every sweep is made of.

The model is causal, so a change at the last position changes nothing before it: keys and values of the
positions before are the same in every run. A run is then one row, the residual stream of its last position,
and it need not start before the place where it is changed. A *place* is a point of the stream: place 2l
enters the attention of block l, place 2l + 1 its MLP, and place 2 * n_layers leaves the last block.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.model import MLP, Attention, LayerNorm
from othello_gpt.onednn import onednn_linear, onednn_serves

SITES = (
    "embed",
    "resid_pre",
    "attn_out",
    "z",
    "result",
    "resid_mid",
    "mlp_out",
    "post",
    "resid_post",
)

PARTED = (
    "z",
    "result",
    "post",
)  # sites that are patched part by part: head by head, neuron by neuron

KeysAndValues = tuple[Float[Tensor, "pair key_pos head d_head"], ...]
# `value(site, layer, here)`: what a branch sets the last position's activation to, [pair ...], from the
# activations `here` of the base rows, [pair row ...].
Value = Callable[[str, int, Tensor], Tensor]


class Base(NamedTuple):
    """The unpatched runs of a group of pairs, and what their branches set activations to.

    Its rows are the positions before the last (unless their keys and values are given), the last position of
    the run to be changed, and, for changes taken from a second run that is not given, that run's last position.
    """

    rows: Float[Tensor, "pair row d_model"]
    n_before: int  # how many rows are positions before the last; the run to be changed is the next
    past: list[KeysAndValues | None]  # by layer; None where the rows themselves have them
    value: Value


class Activations(NamedTuple):
    """The rows at a place, the base first: the stream, what the half block below made, and what it wrote."""

    stream: Float[Tensor, "pair row d_model"]
    made: Float[Tensor, "pair row *part"]  # z of attention, post of an MLP
    written: Float[Tensor, "pair row d_model"]


class Branch(NamedTuple):
    """Runs that leave the base where one site of one layer is changed: each part of it is a run."""

    key: tuple  # (site, layer), and whatever else tells it from others
    place: int  # where its rows join
    n_parts: int
    per_part: int  # rows a part: one for each subspace
    at: Float[Tensor, "pair 1 d_model"]  # the unchanged stream there
    change: Callable[[slice], Float[Tensor, "pair row d_model"]]  # by some of the parts

    @property
    def n_rows(self) -> int:
        return self.n_parts * self.per_part


class Replayed(NamedTuple):
    """What came out of some branches, of each some parts; their rows in the order of the branches."""

    branches: list[tuple[Branch, slice]]
    logits: Float[Tensor, "pair row d_vocab"]

    def of_each(
        self, values: Float[Tensor, "pair row"]
    ) -> Iterator[tuple[Branch, slice, Float[Tensor, "pair some_rows"]]]:
        """What was made of the rows, branch by branch."""
        counts = [(parts.stop - parts.start) * branch.per_part for branch, parts in self.branches]
        for (branch, parts), own in zip(self.branches, values.split(counts, 1), strict=True):
            yield branch, parts, own


@torch.inference_mode()  # makes tensors faster than `no_grad`
def replay(
    model: OthelloGPT,
    base: Base,
    sites: Sequence[str],
    within: Float[Tensor, "subspace d_model d_model"] | None,
    max_rows: int,
) -> Iterator[Replayed]:
    """Runs the base, and every branch of the sites from its place up; at most about `max_rows` rows a time.

    First comes the base alone, without branches. Branches that fit join the base on its way up; the rest follow
    in batches, over the keys and values that the base left.
    """
    rows, n_base, past = base.rows, base.rows.shape[1], list(base.past)
    room = max_rows // max(len(rows), 1)
    made = written = rows
    joined, later = [], []
    for place in range(2 * model.cfg.n_layers + 1):
        if place:
            made, written = half_block(model, place - 1, rows, base.n_before, past)
            rows = rows + written
        here = Activations(rows, made, written)
        for branch in branches_at(model, place, here, base, sites, within):
            if rows.shape[1] + branch.n_rows <= room:
                whole = slice(0, branch.n_parts)
                joined.append((branch, whole))
                rows = torch.cat([rows, branch.at + branch.change(whole)], 1)
            else:
                later.append(branch)
    logits = model.unembed(rows)
    yield Replayed([], logits[:, :n_base])
    if joined:
        yield Replayed(joined, logits[:, n_base:])
    yield from replay_branches(model, later, past, room)


@torch.inference_mode()
def replay_branches(
    model: OthelloGPT, branches: Sequence[Branch], past: list[KeysAndValues | None], room: int
) -> Iterator[Replayed]:
    """Runs branches, in the order of their places, in batches of at most `room` rows a pair."""
    for batch in _batches(branches, room):
        rows = batch[0][0].at[:, :0]
        for place in range(batch[0][0].place, 2 * model.cfg.n_layers + 1):
            if rows.shape[1]:
                rows = rows + half_block(model, place - 1, rows, 0, past)[1]
            arriving = [b.at + b.change(parts) for b, parts in batch if b.place == place]
            rows = torch.cat([rows, *arriving], 1)
        yield Replayed(batch, model.unembed(rows))


def _batches(branches: Sequence[Branch], room: int) -> Iterator[list[tuple[Branch, slice]]]:
    """The branches in order, cut so that a batch has at most `room` rows, or one part if that is more."""
    batch, free = [], room
    for branch in branches:
        start = 0
        while start < branch.n_parts:
            n = min(branch.n_parts - start, free // branch.per_part)
            if n == 0 and batch:
                yield batch
                batch, free = [], room
                continue
            n = max(n, 1)
            batch.append((branch, slice(start, start + n)))
            start, free = start + n, free - n * branch.per_part
    if batch:
        yield batch


def half_block(
    model: OthelloGPT, place: int, rows: Tensor, n_before: int, past: list[KeysAndValues | None]
) -> tuple[Tensor, Tensor]:
    """What attention (even places) or the MLP (odd) makes of the rows: z or post, and what it writes."""
    layer, is_mlp = divmod(place, 2)
    block = model.blocks[layer]
    if is_mlp:
        mlp, x = block.mlp, normalized(block.ln2, rows)
        if _onednn_is_faster(mlp, x):
            post = onednn_linear(x, mlp.W_in.T, mlp.b_in, "gelu")
            return post, onednn_linear(post, mlp.W_out.T, mlp.b_out)
        post = mlp.neurons(x)
        return post, mlp.write(post)
    z, past[layer] = _attend(block.attn, normalized(block.ln1, rows), n_before, past[layer])
    return z, block.attn.write(z)


def _onednn_is_faster(mlp: MLP, x: Float[Tensor, "pair row d_model"]) -> bool:
    """Whether oneDNN serves, and multiplies faster than MKL, which most other products are left to.

    From four rows to thousands it was 1.1 to 1.3 times as fast on a processor of AMD's. MKL's code for Intel's, made to
    run on the same one, needed 0.8 of oneDNN's time for four rows and 1.3 for 17.
    """
    return (
        x.numel() >= 4 * x.shape[-1]
        and type(mlp) is MLP
        and torch.backends.mkl.is_available()  # against another library nobody has measured
        and onednn_serves(x, mlp.W_in, mlp.b_in)
        and all(W.is_contiguous() or W.mT.is_contiguous() for W in (mlp.W_in, mlp.W_out))
    )


def normalized(ln: LayerNorm, rows: Tensor) -> Tensor:
    """What `ln` makes of the rows: in one operation, as nobody listens, unless it is somebody's own."""
    if type(ln) is not LayerNorm:
        return ln(rows)
    w = ln.w
    return torch.layer_norm(rows, w.shape, w, ln.b, ln.eps)


def _attend(
    attn: Attention,
    x: Float[Tensor, "pair row d_model"],
    n_before: int,
    past: KeysAndValues | None,
) -> tuple[Float[Tensor, "pair row head d_head"], KeysAndValues]:
    """z of every row, which sees the positions before its own, and itself; and those positions' k and v."""
    q, k, v = attn.read(x)
    if past is None:
        past = (k[:, :n_before].clone(), v[:, :n_before].clone())  # views would keep all rows
    past_scores = q.transpose(1, 2) @ past[0].permute(0, 2, 3, 1)  # [pair, head, row, key]
    if n_before:  # a position before the last sees those before it, and below itself
        unseen = torch.ones(n_before, n_before, dtype=torch.bool, device=x.device).triu()
        past_scores[:, :, :n_before].masked_fill_(unseen, -torch.inf)
    own_score = (q * k).sum(-1, keepdim=True).transpose(1, 2)  # [pair, head, row, 1]
    pattern = (torch.cat([past_scores, own_score], -1) / q.shape[-1] ** 0.5).softmax(-1)
    z = (pattern[..., :-1] @ past[1].transpose(1, 2)).transpose(1, 2)
    return z.addcmul(pattern[..., -1:].transpose(1, 2), v), past


def branches_at(
    model: OthelloGPT,
    place: int,
    here: Activations,
    base: Base,
    sites: Sequence[str],
    within: Float[Tensor, "subspace d_model d_model"] | None = None,
) -> Iterator[Branch]:
    """The branches of these sites that leave at a place."""
    own = base.n_before
    at = here.stream[:, own, None].clone()  # a copy, for a view would keep all rows in memory

    def change(site: str, layer: int, activation: Tensor) -> Tensor:
        of_base = activation[:, : base.rows.shape[1]]
        return base.value(site, layer, of_base) - activation[:, own]

    def branch(site: str, layer: int, n_parts: int, change: Callable[[slice], Tensor]) -> Branch:
        if within is None:
            return Branch((site, layer), place, n_parts, 1, at, change)
        inside = partial(_inside, change, within)
        return Branch((site, layer), place, n_parts, len(within), at, inside)

    def whole(site: str, layer: int, activation: Tensor) -> Iterator[Branch]:
        if site in sites:
            by_all = change(site, layer, activation)[:, None]  # [pair, 1, d_model]
            yield branch(site, layer, 1, lambda parts: by_all)

    def part_by_part(site: str, layer: int, writes: Tensor) -> Iterator[Branch]:
        if site in sites:
            by_part = change("z" if site == "result" else site, layer, here.made)
            yield branch(site, layer, len(writes), partial(_write, by_part, writes))

    layer, after_attention = divmod(place, 2)
    if place == 0:
        yield from whole("embed", 0, here.stream)
    elif after_attention:
        yield from whole("attn_out", layer, here.written)
        yield from whole("resid_mid", layer, here.stream)
        yield from part_by_part("z", layer, model.blocks[layer].attn.W_O)
        yield from part_by_part("result", layer, model.blocks[layer].attn.W_O)
    else:
        yield from whole("mlp_out", layer - 1, here.written)
        yield from whole("resid_post", layer - 1, here.stream)
        yield from part_by_part("post", layer - 1, model.blocks[layer - 1].mlp.W_out)
    if not after_attention and layer < model.cfg.n_layers:
        yield from whole("resid_pre", layer, here.stream)


def _write(
    by_part: Float[Tensor, "pair part *d_part"],
    writes: Float[Tensor, "part *d_part d_model"],
    parts: slice,
) -> Float[Tensor, "pair some_parts d_model"]:
    """What some of the heads (or neurons, each one number) write, each by itself."""
    if by_part.ndim == 2:
        return by_part[:, parts, None] * writes[parts]
    return torch.einsum("pnd,ndm->pnm", by_part[:, parts], writes[parts])


def _inside(
    change: Callable[[slice], Tensor],
    within: Float[Tensor, "subspace d_model d_model"],
    parts: slice,
) -> Float[Tensor, "pair row d_model"]:
    """The part of each change that lies in each subspace; the subspaces of a part stand together.

    One subspace after another: an einsum over all would copy them.
    """
    changes = change(parts)
    return torch.stack([changes @ subspace for subspace in within], 2).flatten(1, 2)


def bytes_of_a_row(cfg: GPTConfig, n_pos: int, itemsize: int) -> int:
    """About what a row takes on its way through a block: the stream and its copies, the neurons, the scores."""
    heads = cfg.n_heads * (4 * cfg.d_head + 3 * n_pos)
    counted = 6 * cfg.d_model + 2 * cfg.d_mlp + heads + 3 * cfg.d_vocab
    return 2 * itemsize * counted  # twice: what is given back is not free at once, as measured
