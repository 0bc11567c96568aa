"""A model whose weights also lie in memory as oneDNN reads them: products of a few rows at up to twice the speed.

A product of a few rows with a matrix takes as long as reading the matrix does, and a matrix is read fastest in
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
from othello_gpt.onednn import onednn_linear, onednn_serves

N_ROWS = 8  # the order is chosen for so many rows; it serves others as well


def packed(model: OthelloGPT) -> OthelloGPT:
    """The same model with packed weights, which take the size of its blocks once more.

    Sweeps of outputs and heads and single games of the published size run 1.1 to 1.6 times as fast on one thread,
    large batches 1.1 times; sweeps of neurons gain little, and a single position is a little slower
    (`benchmarks/bench_packing.py`). Packing takes 0.1 to 0.5 seconds.

    The packed model starts without hooks, and shares the parameters of the other, without gradients: what changes them
    in place reaches both. Sites, hooks, caches and sweeps are as ever; results differ by the rounding of float32, about
    twice the usual. A weight is packed when it is first used, and again when it was changed or replaced. What PyTorch
    does not count as a change goes unnoticed: `W.data.mul_(2)`, fused optimizers, NumPy arrays over the same memory.

    Packed weights serve float32 on a CPU whose PyTorch has oneDNN, as on Linux and Windows. With gradients, autocast,
    `torch.func`, `torch.compile`, another device or type the packed model computes as the model itself does, and so do
    attention and MLPs of somebody's own.

    Example:
        >>> from othello_gpt.games import example_pair, games_to_tokens
        >>> model = packed(OthelloGPT.from_pretrained())
        >>> model(games_to_tokens(example_pair().clean)).shape
        torch.Size([1, 21, 61])
    """
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, frozen)
    for block in twin.blocks:
        if type(block.attn) is Attention:
            block.attn.__class__ = PackedAttention
        if type(block.mlp) is MLP:
            block.mlp.__class__ = PackedMLP
    return twin


class PackedWeight(NamedTuple):
    """A weight as it was when it was copied into another order."""

    weight: Tensor
    memory: Tensor  # that the weight had, held so that nothing else can come to lie there
    version: int
    copied: Tensor

    def is_of(self, W: Tensor) -> bool:
        """Whether this is `W`, and it has not changed since."""
        return (
            self.weight is W
            and self.version == W._version
            and self.memory.data_ptr() == W.data_ptr()  # not so after `W.data = ...`
        )


class PackedWeights(dict[str, PackedWeight]):
    """By a weight's name. Copied or unpickled ones are empty, as packed weights can be neither."""

    def __reduce__(self):
        return PackedWeights, ()


class _PackedHalf(Tapped):
    """Half a block, which reads and writes with packed weights."""

    def linear(
        self, x: Float[Tensor, "*batch d_in"], part: str, matrix: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*batch d_out"]:
        """`x @ W + b` with the weight and bias of a part; `matrix(W)` is a view of the weight, [d_out d_in]."""
        W, b = getattr(self, f"W_{part}"), getattr(self, f"b_{part}").flatten()
        if not _packing_serves(x, W, b):
            return F.linear(x, matrix(W), b)
        known = self.__dict__.setdefault("packed_weights", PackedWeights())
        if part not in known or not known[part].is_of(W):
            version = W._version
            copied = torch.ops.mkldnn._reorder_linear_weight(matrix(W), N_ROWS)
            known[part] = PackedWeight(W, W.detach(), version, copied)
        return onednn_linear(x, known[part].copied, b)


def _packing_serves(x: Tensor, W: Tensor, b: Tensor) -> bool:
    """Whether oneDNN serves for several rows, with a weight whose changes are counted."""
    return (
        onednn_serves(x, W, b)
        and not W.is_inference()  # it would have no version
        and x.numel() > x.shape[-1]  # one row takes as long either way
    )


class PackedAttention(_PackedHalf, Attention):
    def read(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch head d_head"], ...]:
        reads = (self.linear(x, part, lambda W: W.mT.flatten(0, 1)) for part in "QKV")
        return tuple(read.unflatten(-1, self.b_Q.shape) for read in reads)

    def write(self, z: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear(z.flatten(-2), "O", lambda W: W.flatten(0, 1).T)


class PackedMLP(_PackedHalf, MLP):
    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        return self.linear(x, "in", lambda W: W.T)

    def write(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear(post, "out", lambda W: W.T)
