"""How a move is carried: chains of neurons and heads from the last move to a logit, as data.

Two runs that differ in their last move differ in a logit. That difference is split exactly over all that
writes to the logit: each head, each neuron, the embedding. A neuron's own difference is split the same way over
what it reads, and so on down. What each step carries in truth is measured by patching (`patch_sweep`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.patching import patch_sweep, patching_metric
from othello_gpt import ActivationCache, OthelloGPT


class Parts(NamedTuple):
    """By how much a number differs between the clean and the corrupted run, split over its writers."""

    embed: float  # the token just played
    heads: Float[Tensor, "layer head"]
    neurons: Float[Tensor, "layer d_mlp"]
    rest: float  # position and biases, which differ only by LayerNorm's scale
    total: float  # the difference itself, read from the runs, not summed

    @property
    def gap(self) -> float:
        """By how much the sum of the parts misses the difference."""
        summed = self.embed + self.heads.sum().item() + self.neurons.sum().item() + self.rest
        return abs(summed - self.total)


class Writer(NamedTuple):
    """A head, a neuron, or the embedding of the last move (layer -1)."""

    kind: str  # "neuron", "head" or "embed"
    layer: int
    index: int

    def __str__(self) -> str:
        return (
            "embed" if self.kind == "embed" else f"L{self.layer}{self.kind[0].upper()}{self.index}"
        )


class Step(NamedTuple):
    """One link of a chain, and what it hands to the next."""

    writer: Writer
    handed_on: float  # of the next link's difference: logits, or units before the GELU
    share: float  # the same over the next link's whole difference
    restored: (
        float | None
    )  # by the metric, when this neuron or head alone is patched; none for "embed"


class Chain(NamedTuple):
    """From what starts it to the last writer of the logit."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " -> ".join(str(step.writer) for step in self.steps)


class Circuit(NamedTuple):
    """The chains that carry most of a move."""

    token: int
    difference: float  # of the token's logit, clean less corrupted
    chains: tuple[Chain, ...]


@torch.no_grad()
def find_circuit(
    model: OthelloGPT,
    clean: Int[Tensor, "*batch pos"],
    corrupted: Int[Tensor, "*batch pos"],
    token: int,
    n_chains: int = 3,
) -> Circuit:
    """Chains that end in the neurons which restore most of the token's log-probability when patched alone.

    From each such neuron the chain follows the largest part of the neuron's difference, and ends at a head,
    which brings something from earlier moves, or at the embedding of the last move.

    Args:
        clean: tokens of one game, [pos] or [1 pos].
        corrupted: the same game with another last move.
    """
    (logits, cache), (other, other_cache) = map(model.run_with_cache, (clean, corrupted))
    metric = patching_metric(logits, other, token)
    effects = patch_sweep(model, clean, corrupted, metric, sites=("post", "z"))
    runs = cache.select(pos=-1), other_cache.select(pos=-1)
    at_logit = logit_parts(model, *runs, token)
    strongest = effects["post"].flatten().topk(n_chains).indices.tolist()
    chains = []
    for index in strongest:
        writer = Writer("neuron", *divmod(index, model.cfg.d_mlp))
        steps = [_step(writer, at_logit, effects)]
        while writer.kind == "neuron":
            parts = neuron_parts(model, *runs, writer.layer, writer.index)
            writer = _largest(parts)
            steps.insert(0, _step(writer, parts, effects))
        chains.append(Chain(tuple(steps)))
    return Circuit(token, at_logit.total, tuple(chains))


def logit_parts(
    model: OthelloGPT, clean: ActivationCache, corrupted: ActivationCache, token: int
) -> Parts:
    """The difference of a logit at one position, split over all heads, neurons and the embedding.

    Args:
        clean: a full cache, selected to one game and one position.
        corrupted: likewise.
    """
    direction = model.ln_final.w * model.W_U[:, token]
    return _difference(model, clean, corrupted, direction, "ln_final", model.cfg.n_layers)


def neuron_parts(
    model: OthelloGPT, clean: ActivationCache, corrupted: ActivationCache, layer: int, neuron: int
) -> Parts:
    """The difference of what a neuron reads, before its GELU, split over all that wrote it."""
    block = model.blocks[layer]
    direction = block.ln2.w * block.mlp.W_in[:, neuron]
    return _difference(model, clean, corrupted, direction, f"blocks.{layer}.ln2", layer)


def _difference(
    model: OthelloGPT,
    clean: ActivationCache,
    corrupted: ActivationCache,
    direction: Float[Tensor, " d_model"],
    norm: str,
    end: int,
) -> Parts:
    """Parts along a direction that a LayerNorm's output is read along, `end` MLPs having written.

    Each run's parts are divided by its own scale, so that they sum to the difference exactly.
    """
    centred = direction - direction.mean()  # LayerNorm takes the mean away, so may the direction
    runs = [_written(model, run, centred, norm, end) for run in (clean, corrupted)]
    embed, heads, neurons, rest = (a - b for a, b in zip(*runs, strict=True))
    read = [run[f"{norm}.hook_normalized"][0, 0] @ direction for run in (clean, corrupted)]
    return Parts(embed.item(), heads, neurons, rest.item(), (read[0] - read[1]).item())


def _written(
    model: OthelloGPT, run: ActivationCache, direction: Tensor, norm: str, end: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attends = min(end + 1, model.cfg.n_layers)  # attention writes before the MLP of its layer
    blocks = list(model.blocks)
    heads = torch.stack(
        [
            torch.einsum("hd,hdm,m->h", run["z", i][0, 0], block.attn.W_O, direction)
            for i, block in enumerate(blocks[:attends])
        ]
    )
    neurons = direction.new_zeros(end, model.cfg.d_mlp)
    for i, block in enumerate(blocks[:end]):
        neurons[i] = run["post", i][0, 0] * (block.mlp.W_out @ direction)
    rest = run["pos_embed"][0, 0] + sum(block.attn.b_O for block in blocks[:attends])
    rest = (rest + sum(block.mlp.b_out for block in blocks[:end])) @ direction
    scale = run[f"{norm}.hook_scale"][0, 0, 0]
    embed = run["embed"][0, 0] @ direction
    return embed / scale, heads / scale, neurons / scale, rest / scale


def _largest(parts: Parts) -> Writer:
    """The writer that pushes most the way the whole difference goes."""
    sign = 1 if parts.total >= 0 else -1
    found = [(sign * parts.embed, Writer("embed", -1, 0))]
    for kind, values in (("head", parts.heads), ("neuron", parts.neurons)):
        if values.numel():
            layer, index = divmod(int((sign * values).argmax()), values.shape[1])
            found.append((sign * values[layer, index].item(), Writer(kind, layer, index)))
    return max(found)[1]


def _step(writer: Writer, parts: Parts, effects: dict[str, Tensor]) -> Step:
    if writer.kind == "embed":
        return Step(writer, parts.embed, parts.embed / parts.total, None)
    values, site = (parts.neurons, "post") if writer.kind == "neuron" else (parts.heads, "z")
    place = writer.layer, writer.index
    handed_on = values[place].item()
    return Step(writer, handed_on, handed_on / parts.total, effects[site][place].item())
