"""A model whose weights also lie in memory as oneDNN reads them: products of few rows at almost twice the speed.

A product of few rows with a matrix takes as long as reading the matrix does, and a matrix is read fastest in
the order in which it lies in memory. `packed` copies each weight into such an order once. It is for whoever runs one
model again and again on few positions: sweeps of the last position above all.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from othello_gpt.hooks import Tapped
from othello_gpt.model import MLP, Attention, OthelloGPT

N_ROWS = 8  # the order is chosen for so many rows; it serves others as well
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed(model: OthelloGPT) -> OthelloGPT:
    """The same model with packed weights, which take the size of its blocks once more.

    It shares the model's parameters, but asks no gradients of them, and starts without hooks. Sites, hooks, caches
    and sweeps are as ever; results differ by the rounding of float32, about twice the usual. A weight is packed
    when it is first used, and again after it was changed in place; a change through `.data` goes unnoticed.

    Packed weights serve float32 on a CPU whose PyTorch has oneDNN, as on Linux and Windows. Whatever else is asked
    for (gradients, autocast, `torch.compile`, another device or type) is computed as in the model itself, and so
    are attention and MLPs of somebody's own.

    Example:
        >>> model = packed(OthelloGPT.from_pretrained())
        >>> model(torch.tensor([20])).shape
        torch.Size([1, 1, 61])
    """
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, frozen)
    for block in twin.blocks:
        if type(block.attn) is Attention:
            block.attn.__class__ = PackedAttention
        if type(block.mlp) is MLP:
            block.mlp.__class__ = PackedMLP
    return twin


class Pack(NamedTuple):
    """A weight as it was when it was copied into another order."""

    weight: Tensor
    version: int
    copied: Tensor


class Packs(dict[str, Pack]):
    """By the name of a weight. Copied or unpickled ones are empty, as packs can be neither."""

    def __reduce__(self):
        return Packs, ()


class _Packing(Tapped):
    """A half block that reads and writes with packed weights."""

    def linear(
        self, x: Float[Tensor, "*batch d_in"], part: str, matrix: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*batch d_out"]:
        """`x @ W + b` with the weight and bias of a part; `matrix(W)` is a view of the weight, [d_out d_in]."""
        W, b = getattr(self, f"W_{part}"), getattr(self, f"b_{part}").flatten()
        if not _packs_serve(x, W, b):
            return F.linear(x, matrix(W), b)
        packs = self.__dict__.setdefault("packs", Packs())
        pack = packs.get(part)
        if pack is None or pack.weight is not W or pack.version != W._version:
            copied = torch.ops.mkldnn._reorder_linear_weight(matrix(W), N_ROWS)
            pack = packs[part] = Pack(W, W._version, copied)
        return torch.ops.mkldnn._linear_pointwise(x, pack.copied, b, "none", [], "")


def _packs_serve(x: Tensor, W: Tensor, b: Tensor) -> bool:
    """Whether nothing is asked for but the product of float32 on a CPU."""
    grad = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad or b.requires_grad)
    return (
        HAS_ONEDNN
        and not grad
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == W.dtype == torch.float32
        and x.is_cpu
        and W.is_cpu
        and not W.is_inference()  # it would have no version
    )


class PackedAttention(_Packing, Attention):
    def read(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch head d_head"], ...]:
        reads = (self.linear(x, part, lambda W: W.mT.flatten(0, 1)) for part in "QKV")
        return tuple(read.unflatten(-1, self.b_Q.shape) for read in reads)

    def write(self, z: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear(z.flatten(-2), "O", lambda W: W.flatten(0, 1).T)


class PackedMLP(_Packing, MLP):
    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        return self.linear(x, "in", lambda W: W.T)

    def write(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear(post, "out", lambda W: W.T)
