"""oneDNN's product of a matrix with a few rows, which PyTorch has beside MKL's, its own on a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_serves(x: Tensor, W: Tensor, b: Tensor) -> bool:
    """Whether nothing is asked for but a product, in float32 on a CPU, and there is a oneDNN."""
    grad = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad or b.requires_grad)
    transformed = (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cpu")
    )
    return (
        HAS_ONEDNN
        and not grad
        and not transformed
        and x.dtype == W.dtype == b.dtype == torch.float32
        and x.is_cpu
        and W.is_cpu
    )


def onednn_linear(
    x: Float[Tensor, "*batch d_in"],
    W: Tensor,
    b: Float[Tensor, " d_out"],
    then: str = "none",
) -> Float[Tensor, "*batch d_out"]:
    """`x @ W.T + b`, where `onednn_serves`; with `then="gelu"` the exact GELU of it.

    Args:
        W: [d_out d_in], packed for oneDNN or dense in either order. Any other takes it a hundred times as long.
    """
    # the bias is read as if it were contiguous
    return torch.ops.mkldnn._linear_pointwise.default(x, W, b.contiguous(), then, [], "none")
