"""oneDNN's product of a matrix with a few rows, which PyTorch has beside MKL's, its own on a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(
    x: Float[Tensor, "*batch d_in"],
    W: Tensor,
    b: Float[Tensor, " d_out"],
    then: str = "none",
) -> Float[Tensor, "*batch d_out"]:
    """`x @ W.T + b`, in float32 and without gradients; with `then="gelu"` the exact GELU of it.

    Args:
        W: [d_out d_in], packed for oneDNN or dense in either order. Any other takes it a hundred times as long.
    """
    # the bias is read as if it were contiguous
    return torch.ops.mkldnn._linear_pointwise.default(x, W, b.contiguous(), then, [], "none")
