"""How the directions of probes lie to each other: between parities, layers and probes, beside random ones."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.neurons import span_fraction
from othello_gpt.bootstrap import Estimate


def square_cosines(
    a: Float[Tensor, "d_model 8 8"], b: Float[Tensor, "d_model 8 8"]
) -> Float[Tensor, "8 8"]:
    """The cosine between two directions of each square, for instance `mine` of two layers."""
    return torch.cosine_similarity(a, b, dim=0)


def cosines(*directions: Float[Tensor, "d_model 8 8"]) -> Float[Tensor, "k k"]:
    """The cosines between all squares' directions of one or several probes, 64 rows for each in order.

    Zero where a direction is zero, as the normalised ones of blank are in the centre.
    """
    unit = torch.cat([F.normalize(d.flatten(1), dim=0) for d in directions], 1)
    return unit.T @ unit


def shared_span(
    vectors: Float[Tensor, "d_model k"],
    basis: Float[Tensor, "d_model n"],
    *,
    draws: int = 100,
    seed: int = 0,
) -> tuple[Float[Tensor, ""], Estimate]:
    """The mean share of the vectors' squared lengths in the span of an orthonormal basis, and of random vectors.

    Args:
        vectors: nonzero directions as columns.
        basis: orthonormal columns, such as `interp.neurons.probe_basis` makes.
        draws: how many sets of as many random vectors are tried.

    Returns:
        The share, and what random vectors reach: mean, and the interval that holds 95 % of the sets.

    Raises:
        ValueError: a basis that is not orthonormal.
    """
    gap = (basis.T @ basis - torch.eye(basis.shape[1]).to(basis)).abs().max()
    if not gap < 1e-3:
        raise ValueError(
            f"the columns of `basis` are not orthonormal: their products miss those by {gap:.2g}. Give "
            "`torch.linalg.qr(basis).Q`."
        )
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(draws, *vectors.shape, generator=generator, dtype=vectors.dtype)
    shares = torch.stack([span_fraction(each, basis).mean() for each in random])
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=shares.dtype))
    return span_fraction(vectors, basis).mean(), Estimate(shares.mean(), low, high)
