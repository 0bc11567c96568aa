"""The files in which probes of Othello-GPT were published, read into the fields of our own probes.

Source: the formats are those of likenneth/othello_world, ajyl/mech_int_othelloGPT and
DeanHazineh/Emergent-World-Representations-Othello.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.targets import BLACK, FLIPPED, MINE, Target

MODES = ("black to play", "white to play", "all")


def read_published(
    path: Path, layer: int | None, classes: tuple[str, ...] | None, mode: str | None
) -> dict[str, Any]:
    """The fields of the probe of a published file; see `Probe.load`."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"'{path}' is no file that `torch.save` wrote of tensors: {error}"
        ) from None
    if isinstance(stored, dict):
        refuse_options(path, mode=mode)
        return _from_projection(stored, path, layer, classes)
    if not isinstance(stored, Tensor):
        raise ValueError(
            f"'{path}' holds a {type(stored).__name__}. Published probes are tensors or dicts of them."
        )
    refuse_options(path, classes=classes)
    return _from_modes(stored.detach(), path, layer, mode)


def refuse_options(path: Path, **options: object) -> None:
    """Refuses options that were given, but mean nothing for this file.

    Raises:
        ValueError: one of them is not None.
    """
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(
            f"`{given[0]}` says nothing of '{path}': `classes` is for files with `proj`, `mode` for files with "
            "three modes. Leave it out."
        )


def _from_modes(stored: Tensor, path: Path, layer: int | None, mode: str | None) -> dict[str, Any]:
    """Probes stored as [mode d_model row col class], without a bias."""
    is_boards = stored.ndim == 5 and stored.shape[2:4] == (8, 8)
    n_modes, n_classes = (stored.shape[0], stored.shape[-1]) if is_boards else (0, 0)
    if mode is not None and (mode not in MODES or n_modes != 3):
        raise ValueError(
            f"`mode` is '{mode}', but must be one of {', '.join(MODES)}, of a file with three modes."
        )
    if (n_modes, n_classes) == (3, 3):
        layer = 6 if layer is None else layer
        W, target = _mine_of_modes(stored), MINE
        if mode is not None:
            W, target = stored[MODES.index(mode)], BLACK
    elif (n_modes, n_classes) == (1, 3):
        W, target = stored[0], MINE
    elif (n_modes, n_classes) == (1, 2):
        W, target = stored[0], FLIPPED
    else:
        raise ValueError(
            f"'{path}' holds a tensor of shape {tuple(stored.shape)}. Published probes are "
            "[3 d_model 8 8 3], [1 d_model 8 8 3] or [1 d_model 8 8 2]."
        )
    return _fields(W.clone(), torch.zeros(W.shape[1:]), _known_layer(path, layer), target)


def _mine_of_modes(stored: Float[Tensor, "mode=3 d_model 8 8 3"]) -> Float[Tensor, "d_model 8 8 3"]:
    """Black's and white's probes averaged, colours exchanged in the second; both: empty, white, black."""
    return (stored[0] + stored[1][..., [0, 2, 1]]) / 2


def _from_projection(
    stored: dict[str, Tensor], path: Path, layer: int | None, classes: tuple[str, ...] | None
) -> dict[str, Any]:
    """Probes stored as matrices whose last rows are square * 3 + class, trained on the raw residual stream."""
    last = "proj.2" if "proj.2.weight" in stored else "proj"
    first = ("proj.0.weight", "proj.0.bias") if last == "proj.2" else ()
    if missing := {f"{last}.weight", f"{last}.bias", *first} - set(stored):
        raise ValueError(
            f"'{path}' holds {', '.join(stored)}, but a linear probe has `proj.weight` and `proj.bias`, "
            f"and a two-layer probe those of `proj.0` and `proj.2`; {', '.join(sorted(missing))} is missing."
        )
    _check_shapes(path, stored, last)
    names = classes or _named_classes(path)
    target = MINE if set(names) == set(MINE.classes) else BLACK
    if set(names) != set(target.classes):
        raise ValueError(
            f"`classes` is {names}; give the file's order of {MINE.classes} or {BLACK.classes}."
        )
    by_class = [names.index(name) for name in target.classes]
    W = rearrange(stored[f"{last}.weight"], "(row col k) d -> d row col k", row=8, col=8)
    b = rearrange(stored[f"{last}.bias"], "(row col k) -> row col k", row=8, col=8)
    # their layer l is the stream after l blocks
    layer = _known_layer(path, layer, offset=-1)
    hidden = dict(W_in=stored[first[0]].T, b_in=stored[first[1]]) if first else {}
    return hidden | _fields(W[..., by_class], b[..., by_class], layer, target, "raw")


def _check_shapes(path: Path, stored: dict[str, Tensor], last: str) -> None:
    width = stored[f"{last}.weight"].shape[-1:]  # of what the last layer reads
    expected = {f"{last}.weight": (192, *width), f"{last}.bias": (192,)}
    if last == "proj.2":
        d_model = stored["proj.0.weight"].shape[-1:]
        expected |= {"proj.0.weight": (*width, *d_model), "proj.0.bias": (*width,)}
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"'{path}' holds `{name}` of shape {tuple(stored[name].shape)}, but {shape} was expected: the last "
                "rows are 64 squares of 3 classes, and each layer fits the one before."
            )


def _named_classes(path: Path) -> tuple[str, ...]:
    """Hazineh's order where the file's name says "Map_New", else Li's."""
    if "map_new" in path.name.lower():
        return ("mine", "empty", "theirs")
    return ("white", "empty", "black")


def _fields(
    W: Tensor, b: Tensor, layer: int, target: Target, space: str = "centred"
) -> dict[str, Any]:
    return dict(W=W, b=b, layer=layer, classes=target.classes, space=space, target=target.name)


def _known_layer(path: Path, layer: int | None, offset: int = 0) -> int:
    if layer is not None:
        return layer
    for name in (path.name, path.parent.name):
        if match := re.search(r"(?:resid_|[Ll]ayer_?)(\d+)", name):
            return int(match[1]) + offset
    raise ValueError(f"'{path}' does not say which layer it reads: give `layer=`.")
