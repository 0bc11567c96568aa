"""What neurons read and write, in the basis of the probes and of the board; and which to look at first."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.probes import LinearProbe
from othello_gpt import ActivationCache, OthelloGPT


def input_weights(
    model: OthelloGPT, layer: int, directions: Float[Tensor, "d_model *direction"]
) -> Float[Tensor, "d_mlp *direction"]:
    """How strongly every neuron of a layer reads along each direction: its unit input weights times it.

    Cosines, when the directions have unit length. Two random directions have |cosine| about
    1/sqrt(d_model). Figures of the literature assume folded weights.
    """
    W_in = model.blocks[layer].mlp.W_in.detach()
    return torch.tensordot((W_in / W_in.norm(dim=0)).T, directions, 1)


def output_weights(
    model: OthelloGPT, layer: int, directions: Float[Tensor, "d_model *direction"]
) -> Float[Tensor, "d_mlp *direction"]:
    """How strongly every neuron of a layer writes along each direction: its unit output weights times it."""
    W_out = model.blocks[layer].mlp.W_out.detach()
    return torch.tensordot(W_out / W_out.norm(dim=1, keepdim=True), directions, 1)


def logit_weights(
    model: OthelloGPT, layer: int, neuron: int, cosine: bool = False
) -> Float[Tensor, " move=60"]:
    """What one neuron writes directly to the logit of each of the 60 squares that can be played.

    `othello_gpt.vocab.values_on_board` lays the sixty values out as a board. The padding token has no
    square and is left out before anything is normalised.

    Args:
        cosine: cosines of the output weights with the columns of W_U, in place of raw dot products.
    """
    w_out = model.blocks[layer].mlp.W_out[neuron].detach()
    W_U = model.W_U[:, 1:].detach()
    if cosine:
        return (w_out / w_out.norm()) @ (W_U / W_U.norm(dim=0))
    return w_out @ W_U


def span_fraction(
    vectors: Float[Tensor, "d_model *vector"], basis: Float[Tensor, "d_model k"]
) -> Float[Tensor, "*vector"]:
    """The share of each vector's squared length that lies in the span of the basis columns, 0 to 1.

    A random vector scores the dimension of the span over d_model.
    """
    unit = vectors / vectors.norm(dim=0)
    return torch.tensordot(basis.mT, unit, 1).square().sum(0)


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
    played = [square for square in range(64) if square not in (27, 28, 35, 36)]
    return torch.linalg.qr(torch.cat([mine, blank[:, played]], 1)).Q


def kurtosis(
    values: Float[Tensor, "..."], axes: Sequence[int] = (0,), fisher: bool = True
) -> Float[Tensor, "..."]:
    """How heavy the tails are over `axes`: the mean of z**4, less 3 (a normal distribution's) if `fisher`.

    As on the exercise page, z is made with the unbiased standard deviation, and the fourth moment is
    biased: scipy's biased value times ((n-1)/n)**2, before the 3. Constant values give nan.
    """
    centred = values - values.mean(dim=tuple(axes), keepdim=True)
    z = centred / values.std(dim=tuple(axes), keepdim=True)
    return z.pow(4).mean(dim=tuple(axes)) - (3 if fisher else 0)


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
        pos: which positions count; the exercise page leaves out three at both ends, which changes the list.
    """
    post = cache["post", layer][:, pos].flatten(0, 1)
    if statistic == "std":
        scores = post.std(dim=0)
    elif statistic == "kurtosis":
        scores = kurtosis(post).nan_to_num(nan=-torch.inf)
    else:
        raise ValueError(f"`statistic` is '{statistic}', but must be 'std' or 'kurtosis'.")
    return scores.argsort(descending=True, stable=True)[:k]
