"""FactoredMatrix: a product of two matrices that is never multiplied out, such as a head's OV circuit."""

import warnings
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor


class FactoredMatrix:
    """The matrix A @ B, kept as its factors; leading axes broadcast.

    Singular values and eigenvalues are taken on the small side, mdim, so a matrix [512 512] of rank 64 costs
    what one of [64 64] costs.

    Args:
        A: [... ldim mdim].
        B: [... mdim rdim].
    """

    def __init__(self, A: Float[Tensor, "*lead ldim mdim"], B: Float[Tensor, "*lead_ mdim rdim"]):
        if A.shape[-1] != B.shape[-2]:
            raise ValueError(
                f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}: the last axis of A and the one "
                "before the last of B must agree."
            )
        lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self.A, self.B = A.expand(*lead, *A.shape[-2:]), B.expand(*lead, *B.shape[-2:])
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.shape = torch.Size((*lead, self.ldim, self.rdim))
        self.ndim = len(self.shape)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape {tuple(self.shape)}, hidden dim {self.mdim})"

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.A, self.B

    @property
    def AB(self) -> Float[Tensor, "*lead ldim rdim"]:
        """The product, multiplied out."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*lead mdim mdim"]:
        """The other product, which has the same eigenvalues but for zeros; A @ B must be square."""
        if self.ldim != self.rdim:
            raise ValueError(f"BA needs a square matrix, but the shape is {tuple(self.shape)}.")
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        """Transposed, leading axes as they are."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: Any) -> Any:
        """With a vector a vector, else a FactoredMatrix, on the smaller of its possible inner sizes."""
        if isinstance(other, FactoredMatrix):
            return self @ other.A @ other.B
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        small = self.rdim > self.mdim
        return FactoredMatrix(self.A, self.B @ other) if small else FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Tensor) -> Any:
        if other.ndim == 1:
            return self.T @ other
        return (self.T @ other.mT).T

    def __mul__(self, scalar: float | Tensor) -> "FactoredMatrix":
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(
                f"`*` takes one number, not a tensor of shape {tuple(scalar.shape)}. "
                "The matrix product is `@`."
            )
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Leading axes, then rows, then columns; a single row or column keeps its axis."""
        index = index if isinstance(index, tuple) else (index,)
        n_lead = self.ndim - 2
        if Ellipsis in index or len(index) > self.ndim:
            raise IndexError(f"cannot index {self!r} with {index}: give at most {self.ndim} axes.")
        lead, rows, columns = index[:n_lead], index[n_lead : n_lead + 1], index[n_lead + 1 :]
        A, B = self.A[lead], self.B[lead]
        if rows:
            A = A[..., _kept(rows[0]), :]
        if columns:
            B = B[..., _kept(columns[0])]
        return FactoredMatrix(A, B)

    def unsqueeze(self, axis: int) -> "FactoredMatrix":
        """With another leading axis."""
        return FactoredMatrix(self.A.unsqueeze(axis), self.B.unsqueeze(axis))

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        Q_A, R_A = torch.linalg.qr(self.A)
        Q_B, R_B = torch.linalg.qr(self.B.mT)
        U, S, Vh = torch.linalg.svd(R_A @ R_B.mT, full_matrices=False)
        return Q_A @ U, S, Q_B @ Vh.mT

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [... ldim k], S [... k], V [... rdim k], so that the matrix is U @ diag(S) @ V.mT."""
        return self._svd

    @property
    def U(self) -> Float[Tensor, "*lead ldim k"]:
        """Left singular vectors."""
        return self._svd[0]

    @property
    def S(self) -> Float[Tensor, "*lead k"]:
        """Singular values, largest first."""
        return self._svd[1]

    @property
    def V(self) -> Float[Tensor, "*lead rdim k"]:
        """Right singular vectors, as columns."""
        return self._svd[2]

    @property
    def Vh(self) -> Float[Tensor, "*lead rdim k"]:
        """V under the name that TransformerLens first gave it, with a warning: it is not transposed."""
        warnings.warn("`Vh` is V, as in TransformerLens: write `.V`, or `.V.mT`.", stacklevel=2)
        return self.V

    @property
    def eigenvalues(self) -> Complex[Tensor, "*lead mdim"]:
        """Those that need not be zero."""
        return torch.linalg.eigvals(self.BA)

    def norm(self) -> Float[Tensor, "*lead"]:
        """The Frobenius norm."""
        return self.S.square().sum(-1).sqrt()

    def collapse_l(self) -> Float[Tensor, "*lead k rdim"]:
        """diag(S) @ V.mT: the matrix without U, so that norms of `matrix @ x` stay."""
        return self.S[..., :, None] * self.V.mT

    def collapse_r(self) -> Float[Tensor, "*lead ldim k"]:
        """U @ diag(S): the matrix without V, so that norms of `x @ matrix` stay."""
        return self.U * self.S[..., None, :]

    def make_even(self) -> "FactoredMatrix":
        """The same matrix with factors of equal norm."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., :, None] * self.V.mT)


def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[Tensor, "*lead"]:
    """|left @ right| / (|left| |right|) in Frobenius norms, for every pair of leading indices.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    rows = left.collapse_l().flatten(0, -3)  # [left, k, d_model]
    columns = right.collapse_r().flatten(0, -3)  # [right, d_model, k]
    norms = torch.stack([(row @ columns).norm(dim=(-2, -1)) for row in rows])
    norms = norms / left.norm().flatten()[:, None] / right.norm().flatten()
    return norms.unflatten(1, right.shape[:-2]).unflatten(0, left.shape[:-2])


def _kept(index: Any) -> Any:
    """An index that keeps its axis."""
    return slice(index, index + 1 or None) if isinstance(index, int) else index
