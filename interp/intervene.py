"""Editing the believed board: moving the residual stream along a square's direction."""

import torch
from jaxtyping import Float
from torch import Tensor


def scale_coordinate(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], scale: float
) -> Float[Tensor, "*batch d_model"]:
    """The stream with its coordinate along `direction` multiplied by `-scale`; the rest untouched.

    Scale 1 mirrors the coordinate (mine becomes theirs), 0 erases it, -1 changes nothing. Larger scales
    exaggerate the mirrored belief; from about 4 on they begin to move other squares.

    Source: ARENA 1.5.3, section 1, `apply_scale`.
    """
    unit = direction / direction.norm()
    coordinate = resid @ unit
    return resid - (scale + 1) * coordinate[..., None] * unit


def flip_hook(direction: Float[Tensor, " d_model"], scale: float = 1.0, pos: int = -1):
    """A hook that mirrors one coordinate of the residual stream at one position, in every game."""

    def flip(activation: Tensor, *, hook: object) -> Tensor:
        edited = torch.clone(activation)
        edited[:, pos] = scale_coordinate(activation[:, pos], direction, scale)
        return edited

    return flip
