"""Many runs that differ at their last position only, as rows of one batch: what every sweep is made of.

The model is causal, so a change at the last position changes nothing before it: keys and values of the
positions before are the same in every run. A run is then one row, the residual stream of its last position,
and it need not start before the place where it is changed. A *place* is a point of the stream: place 2l
enters the attention of block l, place 2l + 1 its MLP, and place 2 * n_layers leaves the last block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.model import Attention, from_heads, into_heads

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

KeysAndValues = tuple[Float[Tensor, "pair key_pos head d_head"], ...]
# `value(site, layer, here)`: what the site's last position is set to, from the activations `here` of the
# base rows, [pair row ...]; the result is [pair ...].
Value = Callable[[str, int, Tensor], Tensor]


class Base(NamedTuple):
    """Where the rows of a group of pairs start: the unpatched runs.

    Its rows are the positions before the last (unless their keys and values are given), the last position of
    the run to be patched, and, for branches taken from a second run, that run's last position.
    """

    rows: Float[Tensor, "pair row d_model"]
    n_before: int  # how many rows are positions before the last
    past: list[KeysAndValues | None]  # by layer; None where the rows themselves have them


class Branch(NamedTuple):
    """Runs that leave the base where one site of one layer is changed: each part of it is a run."""

    site: str
    layer: int
    place: int  # where its rows join
    n_parts: int
    per_part: int  # rows a part: one for each subspace
    rows: Callable[[slice], Float[Tensor, "pair row d_model"]]  # of some of the parts

    @property
    def n_rows(self) -> int:
        return self.n_parts * self.per_part


class Replayed(NamedTuple):
    """What came out of some parts of a branch."""

    branch: Branch
    parts: slice
    logits: Float[Tensor, "pair row d_vocab"]


def replay(
    model: OthelloGPT,
    base: Base,
    sites: Sequence[str],
    value: Value,
    within: Float[Tensor, "subspace d_model d_model"] | None,
    max_rows: int,
) -> Iterator[Replayed]:
    """Runs the base, and every branch of the sites from its place up; at most about `max_rows` rows a time.

    First comes the base itself, as a branch of the site "base". Branches that fit join the base on its way up;
    the rest follow in batches, over the keys and values that the base left.
    """
    rows, n_base, past = base.rows, base.rows.shape[1], list(base.past)
    room = max_rows // max(len(rows), 1)
    made = written = rows
    joined = [(Branch("base", 0, 0, n_base, 1, lambda parts: base.rows), slice(0, n_base))]
    later: list[Branch] = []
    for place in range(2 * model.cfg.n_layers + 1):
        if place:
            made, written = _half_block(model, place - 1, rows, base.n_before, past)
            rows = rows + written
        here = (rows[:, :n_base], made[:, :n_base], written[:, :n_base])
        for branch in branches_at(model, place, *here, base.n_before, sites, value, within):
            if rows.shape[1] + branch.n_rows <= room:
                joined.append((branch, slice(0, branch.n_parts)))
                rows = torch.cat([rows, branch.rows(slice(0, branch.n_parts))], 1)
            else:
                later.append(branch)
    yield from _unembedded(model, rows, joined)
    for batch in _batches(later, room):
        yield from _replay_batch(model, batch, past)


def _replay_batch(
    model: OthelloGPT, batch: list[tuple[Branch, slice]], past: list[KeysAndValues | None]
) -> Iterator[Replayed]:
    rows = None
    for place in range(batch[0][0].place, 2 * model.cfg.n_layers + 1):
        if rows is not None:
            rows = rows + _half_block(model, place - 1, rows, 0, past)[1]
        arriving = [branch.rows(parts) for branch, parts in batch if branch.place == place]
        rows = torch.cat([*([] if rows is None else [rows]), *arriving], 1) if arriving else rows
    assert rows is not None
    yield from _unembedded(model, rows, batch)


def _unembedded(
    model: OthelloGPT, rows: Tensor, joined: list[tuple[Branch, slice]]
) -> Iterator[Replayed]:
    counts = [(parts.stop - parts.start) * branch.per_part for branch, parts in joined]
    for (branch, parts), logits in zip(joined, model.unembed(rows).split(counts, 1), strict=True):
        yield Replayed(branch, parts, logits)


def _batches(patches: Sequence[Branch], room: int) -> Iterator[list[tuple[Branch, slice]]]:
    """The branches in order, cut so that a batch has at most `room` rows, or one part if that is more."""
    batch, free = [], room
    for branch in patches:
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


def _half_block(
    model: OthelloGPT, place: int, rows: Tensor, n_before: int, past: list[KeysAndValues | None]
) -> tuple[Tensor, Tensor]:
    """What attention (even places) or the MLP (odd) makes of the rows: z or post, and what it writes."""
    layer, is_mlp = divmod(place, 2)
    block = model.blocks[layer]
    if is_mlp:
        post = block.mlp.neurons(block.ln2(rows))
        return post, block.mlp.write(post)
    z, past[layer] = _attend(block.attn, block.ln1(rows), n_before, past[layer])
    return z, from_heads(z, block.attn.W_O, block.attn.b_O)


def _attend(
    attn: Attention,
    x: Float[Tensor, "pair row d_model"],
    n_before: int,
    past: KeysAndValues | None,
) -> tuple[Float[Tensor, "pair row head d_head"], KeysAndValues]:
    """z of every row, which sees the positions before its own, and itself; and those positions' k and v."""
    q = into_heads(x, attn.W_Q, attn.b_Q)
    k = into_heads(x, attn.W_K, attn.b_K)
    v = into_heads(x, attn.W_V, attn.b_V)
    if past is None:
        past = (k[:, :n_before], v[:, :n_before])
    past_scores = torch.einsum("prhd,pkhd->phrk", q, past[0])
    if n_before:  # a position before the last sees those before it, and below itself
        unseen = torch.ones(n_before, n_before, dtype=torch.bool, device=x.device).triu()
        past_scores[:, :, :n_before].masked_fill_(unseen, -torch.inf)
    own_score = (q * k).sum(-1).transpose(1, 2)[..., None]  # [pair, head, row, 1]
    pattern = (torch.cat([past_scores, own_score], -1) / q.shape[-1] ** 0.5).softmax(-1)
    z = torch.einsum("phrk,pkhd->prhd", pattern[..., :-1], past[1])
    return z + pattern[..., -1].transpose(1, 2)[..., None] * v, past


def branches_at(
    model: OthelloGPT,
    place: int,
    stream: Float[Tensor, "pair row d_model"],
    made: Float[Tensor, "pair row *part"],
    written: Float[Tensor, "pair row d_model"],
    own: int,
    sites: Sequence[str],
    value: Value,
    within: Float[Tensor, "subspace d_model d_model"] | None,
) -> Iterator[Branch]:
    """The branches that leave at a place: by how much each changes the stream there.

    Args:
        stream, made, written: of the base rows: the residual stream, z or post of the half block that ends
            here, and what it wrote.
        own: the row that is patched.
    """
    layer, after_attention = divmod(place, 2)
    at = stream[:, own, None].clone()  # a copy, for a view would keep all rows in memory

    def joining(site: str, layer: int, n_parts: int, rows: Callable[[slice], Tensor]) -> Branch:
        per_part = 1 if within is None else len(within)
        return Branch(
            site, layer, place, n_parts, per_part, lambda parts: at + _inside(rows(parts), within)
        )

    def change(site: str, layer: int, here: Tensor) -> Tensor:
        return value(site, layer, here) - here[:, own]

    def whole(site: str, layer: int, here: Tensor) -> Iterator[Branch]:
        if site in sites:
            difference = change(site, layer, here)[:, None]  # [pair, 1, d_model]
            yield joining(site, layer, 1, lambda parts: difference)

    def part_by_part(site: str, layer: int, writes: Tensor) -> Iterator[Branch]:
        if site in sites:
            by_part = change({"result": "z"}.get(site, site), layer, made)
            yield joining(
                site, layer, len(writes), lambda parts: _write(by_part[:, parts], writes[parts])
            )

    below = layer if after_attention else layer - 1  # the block that has just written
    if place == 0:
        yield from whole("embed", 0, stream)
    elif after_attention:
        yield from whole("attn_out", below, written)
        yield from whole("resid_mid", below, stream)
        yield from part_by_part("z", below, model.blocks[below].attn.W_O)
        yield from part_by_part("result", below, model.blocks[below].attn.W_O)
    else:
        yield from whole("mlp_out", below, written)
        yield from whole("resid_post", below, stream)
        yield from part_by_part("post", below, model.blocks[below].mlp.W_out[:, None])
    if not after_attention and layer < model.cfg.n_layers:
        yield from whole("resid_pre", layer, stream)


def _write(
    parts: Float[Tensor, "pair part *d_part"], writes: Float[Tensor, "part d_part d_model"]
) -> Float[Tensor, "pair part d_model"]:
    """What each head (or neuron, which is one number) writes by itself."""
    if parts.ndim == 2:
        return parts[..., None] * writes[:, 0]
    return torch.einsum("pnd,ndm->pnm", parts, writes)


def _inside(
    rows: Float[Tensor, "pair part d_model"],
    within: Float[Tensor, "subspace d_model d_model"] | None,
) -> Float[Tensor, "pair row d_model"]:
    """The part of each change that lies in each subspace; the subspaces of a part stand together."""
    if within is None:
        return rows
    return torch.einsum("pnm,smd->pnsd", rows, within).flatten(1, 2)


def bytes_of_a_row(cfg: GPTConfig, n_pos: int, itemsize: int) -> int:
    """About what a row takes on its way through a block: the stream and its copies, the neurons, the scores."""
    heads = cfg.n_heads * (4 * cfg.d_head + 3 * n_pos)
    return itemsize * (6 * cfg.d_model + 2 * cfg.d_mlp + heads + 3 * cfg.d_vocab)
