"""What neurons read and write, in the basis of the probes and of the board; and which to look at first."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.positions import EMPTY, MINE, THEIRS, positions_of
from interp.probes import LinearProbe
from othello_gpt import ActivationCache, OthelloGPT
from othello_gpt.vocab import PLAYABLE


def input_weights(
    model: OthelloGPT, layer: int, directions: Float[Tensor, "d_model *direction"]
) -> Float[Tensor, "d_mlp *direction"]:
    """How strongly every neuron of a layer reads along each direction: its unit input weights times it.

    Cosines, when the directions have unit length; 0 for a neuron without weights. Two random directions have
    |cosine| about 1/sqrt(d_model). Figures of the literature assume folded weights.
    """
    W_in = model.blocks[layer].mlp.W_in.detach()
    return torch.tensordot(_unit(W_in).T, directions, 1)


def output_weights(
    model: OthelloGPT, layer: int, directions: Float[Tensor, "d_model *direction"]
) -> Float[Tensor, "d_mlp *direction"]:
    """How strongly every neuron of a layer writes along each direction: its unit output weights times it."""
    W_out = model.blocks[layer].mlp.W_out.detach()
    return torch.tensordot(_unit(W_out.T).T, directions, 1)


def logit_weights(
    model: OthelloGPT, layer: int, neuron: int, cosine: bool = False
) -> Float[Tensor, " move=60"]:
    """What one neuron writes directly to the logit of each of the 60 squares that can be played.

    `othello_gpt.vocab.values_on_board` lays the sixty values out as a board. The padding token has no
    square and is left out before anything is normalised.

    Args:
        cosine: cosines of the output weights with the directions that the logits read, in place of raw dot products.
    """
    w_out = model.blocks[layer].mlp.W_out[neuron].detach()
    W_U = unembedding(model)
    if cosine:
        return _unit(w_out) @ _unit(W_U)
    return w_out @ W_U


def unembedding(model: OthelloGPT) -> Float[Tensor, "d_model move=60"]:
    """Along which the 60 moves' logits read the residual stream: W_U with the final LayerNorm's weight, 1 if folded."""
    return (model.ln_final.w[:, None] * model.W_U[:, 1:]).detach()


def span_fraction(
    vectors: Float[Tensor, "d_model *vector"], basis: Float[Tensor, "d_model k"]
) -> Float[Tensor, "*vector"]:
    """The share of each vector's squared length that lies in the span of the basis columns, 0 to 1.

    A random vector scores the dimension of the span over d_model, one of zeros 0.
    """
    return torch.tensordot(basis.mT, _unit(vectors), 1).square().sum(0)


def _unit(vectors: Float[Tensor, "d_model *vector"]) -> Float[Tensor, "d_model *vector"]:
    """The vectors at unit length; one of zeros stays so."""
    return vectors / vectors.norm(dim=0).clamp(min=torch.finfo(vectors.dtype).tiny)


def probe_basis(probe: LinearProbe, convention: str = "columns") -> Float[Tensor, "d_model k"]:
    """An orthonormal basis of the 124 directions in which the probe finds the board.

    Args:
        convention: "columns" leaves out the blank directions of the four centre squares, which are never
            blank. "arena" takes all 128 and drops the four last singular vectors, as the exercise page
            does; one of those four is no centre direction, so it keeps one that is. For L5N1393 of the
            published model the input fraction is 0.6175 by columns and 0.6818 by the exercise's way.
    """
    blank, mine = probe.blank.flatten(1), probe.mine.flatten(1)
    if convention == "arena":
        return torch.linalg.svd(torch.cat([mine, blank], 1), full_matrices=False).U[:, :-4]
    if convention != "columns":
        raise ValueError(f"`convention` is '{convention}', but must be 'columns' or 'arena'.")
    return torch.linalg.qr(torch.cat([mine, blank[:, list(PLAYABLE)]], 1)).Q


def kurtosis(
    values: Float[Tensor, "..."], axes: Sequence[int] = (0,), fisher: bool = True
) -> Float[Tensor, "..."]:
    """How heavy the tails are over `axes`: the mean of z**4, less 3 (a normal distribution's) if `fisher`.

    As on the exercise page, z is made with the unbiased standard deviation, and the fourth moment is
    biased: scipy's biased value times ((n-1)/n)**2, before the 3. Constant values give nan.
    """
    centred = values - values.mean(dim=tuple(axes), keepdim=True)
    z = centred / values.std(dim=tuple(axes), keepdim=True)
    varies = values.amax(dim=tuple(axes)) > values.amin(dim=tuple(axes))
    return z.pow(4).mean(dim=tuple(axes)).where(varies, torch.nan) - (3 if fisher else 0)


def top_neurons(
    cache: ActivationCache,
    layer: int,
    k: int = 10,
    statistic: str = "std",
    pos: slice = slice(3, -3),
) -> Int[Tensor, " k"]:
    """The neurons of a layer whose activations vary most, or have the heaviest tails.

    Args:
        cache: a run over many games that kept `hook_post` of the layer.
        statistic: "std" or "kurtosis". Dead neurons, which never vary, come last in both.
        pos: which positions count; the exercise page leaves out three at both ends, which changes the list. All
            games count at each of them, those too that have ended before; games of full length have no such
            positions.

    Raises:
        ValueError: fewer than two positions of all games together are left.
    """
    post = cache["post", layer][:, pos].flatten(0, 1)
    if len(post) < 2:
        raise ValueError(
            f"`pos` leaves {len(post)} positions, but a spread needs two: give longer games or another `pos`."
        )
    if statistic == "std":
        scores = post.std(dim=0)
    elif statistic == "kurtosis":
        scores = kurtosis(post).nan_to_num(nan=-torch.inf)
    else:
        raise ValueError(f"`statistic` is '{statistic}', but must be 'std' or 'kurtosis'.")
    return scores.argsort(descending=True, stable=True)[:k]


# --- All neurons at once ----------------------------------------------------------------------------

STATISTICS = {
    "std": "standard deviation of the activation",
    "kurtosis": "how heavy the activation's tails are; 0 for a normal distribution",
    "selectivity": "largest |correlation| with one square being blank, theirs, mine or just played",
    "in_out_cosine": "cosine of input and output weights",
    "read_probe_span": "share of the input weights in the probe's span, by columns",
    "read_probe_span_arena": "the same in the exercise's span",
    "write_probe_span": "share of the output weights in the probe's span, by columns",
    "write_probe_span_arena": "the same in the exercise's span",
    "read_unembed_span": "share of the input weights in the span of the 60 moves' unembedding",
    "write_unembed_span": "share of the output weights in the span of the 60 moves' unembedding",
}


class Ranking(NamedTuple):
    """Neurons in the order of a statistic, the highest first."""

    statistic: str
    neurons: tuple[tuple[int, int], ...]  # (layer, neuron)
    values: tuple[float, ...]


class NeuronTable(NamedTuple):
    """What every neuron of a model reads and writes, and its statistics by name (see `STATISTICS`)."""

    reads: Float[Tensor, "layer neuron kind=2 row=8 col=8"]  # cosines with (blank, mine)
    writes: Float[Tensor, "layer neuron kind=2 row=8 col=8"]
    logits: Float[Tensor, "layer neuron move=60"]  # direct effect of one unit of activation
    statistics: dict[str, Float[Tensor, "layer neuron"]]
    baselines: dict[str, float]  # what random weights score on average

    def rank(self, statistic: str, k: int = 10, layer: int | None = None) -> Ranking:
        """The `k` neurons, of one layer or of all, with the highest statistic; nan comes last."""
        if statistic not in self.statistics:
            raise ValueError(f"no statistic '{statistic}'; there are {', '.join(self.statistics)}.")
        values = self.statistics[statistic].nan_to_num(nan=-torch.inf)
        d_mlp = values.shape[1]
        first = 0 if layer is None else layer
        chosen = values.flatten() if layer is None else values[layer]
        order = chosen.argsort(descending=True, stable=True)[:k].tolist()
        places = tuple((first + i // d_mlp, i % d_mlp) for i in order)
        return Ranking(statistic, places, tuple(chosen[order].tolist()))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; the baselines are JSON in its header."""
        tensors = {"reads": self.reads, "writes": self.writes, "logits": self.logits}
        tensors |= {f"statistics.{name}": values for name, values in self.statistics.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        partial = Path(f"{path}.partial")
        save_file(contiguous, partial, {"baselines": json.dumps(self.baselines)})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "NeuronTable":
        """Reads what `save` wrote."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "baselines" not in metadata:
                raise ValueError(f"'{path}' is no table of neurons: `NeuronTable.save` writes one.")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        boards = {name: stored.pop(name) for name in ("reads", "writes", "logits")}
        statistics = {name: stored[f"statistics.{name}"] for name in STATISTICS}
        return cls(**boards, statistics=statistics, baselines=json.loads(metadata["baselines"]))


@torch.no_grad()
def neuron_table(
    model: OthelloGPT,
    probe: LinearProbe,
    cache: ActivationCache,
    squares: Int[ndarray, "game ply"],
) -> NeuronTable:
    """What all neurons read, write and do.

    Args:
        probe: one probe for all layers, as in the exercise.
        cache: a run over `squares` that kept `hook_post` of every layer.
        squares: the games; only positions from which somebody moves count for the statistics.
    """
    layers = range(model.cfg.n_layers)
    directions = torch.stack(probe.normalised(), dim=1)  # [d_model, (blank, mine), 8, 8]
    W_in, W_out = model.W_in.mT.detach(), model.W_out.detach()  # [layer, neuron, d_model]
    spans = {
        "probe_span": probe_basis(probe),
        "probe_span_arena": probe_basis(probe, "arena"),
        "unembed_span": torch.linalg.qr(unembedding(model)).Q,
    }
    statistics = _activity(model, cache, squares)
    statistics["in_out_cosine"] = torch.cosine_similarity(W_in, W_out, dim=-1)
    for name, basis in spans.items():
        statistics[f"read_{name}"] = span_fraction(W_in.movedim(-1, 0), basis)
        statistics[f"write_{name}"] = span_fraction(W_out.movedim(-1, 0), basis)
    baselines = {name: basis.shape[1] / model.cfg.d_model for name, basis in spans.items()}
    return NeuronTable(
        reads=torch.stack([input_weights(model, layer, directions) for layer in layers]),
        writes=torch.stack([output_weights(model, layer, directions) for layer in layers]),
        logits=W_out @ unembedding(model),
        statistics={name: statistics[name] for name in STATISTICS},
        baselines=baselines | {"cosine": model.cfg.d_model**-0.5},
    )


def _activity(
    model: OthelloGPT, cache: ActivationCache, squares: Int[ndarray, "game ply"]
) -> dict[str, Float[Tensor, "layer neuron"]]:
    """Spread, tails and selectivity of every neuron."""
    positions = positions_of(squares, n_ctx=model.cfg.n_ctx)
    rows = torch.from_numpy(positions.game), torch.from_numpy(positions.ply)
    states = [positions.classes == state for state in (EMPTY, THEIRS, MINE)]
    states.append(positions.played[:, None] == np.arange(64))
    conditions = _standardised(torch.from_numpy(np.concatenate(states, 1)).float())
    found: dict[str, list[Tensor]] = {"std": [], "kurtosis": [], "selectivity": []}
    for layer in range(model.cfg.n_layers):
        post = cache["post", layer][rows].cpu()  # [position, d_mlp]
        z = _standardised(post)
        fourth = z.square().square().mean(0)  # as `kurtosis`, from the z that is at hand
        correlations = (z.float().T @ conditions) / (len(z) - 1)
        found["std"].append(post.std(0))
        found["kurtosis"].append(torch.where(post.std(0) > 0, fourth - 3, torch.nan))
        found["selectivity"].append(correlations.abs().amax(1).to(post.dtype))
    return {name: torch.stack(values) for name, values in found.items()}


def _standardised(values: Float[Tensor, "n column"]) -> Float[Tensor, "n column"]:
    """Mean 0 and standard deviation 1 down each column; a constant column is 0."""
    std = values.std(0)
    return (values - values.mean(0)) / torch.where(std > 0, std, 1)
