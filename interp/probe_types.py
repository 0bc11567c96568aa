"""Probes themselves: what they read from the residual stream, their directions, their files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.probe_formats import read_published, refuse_options
from interp.targets import MINE
from othello_gpt import OthelloGPT
from othello_gpt.vocab import CENTRE

# The probes of every layer that ship with the packaged model.
SHIPPED = Path(str(resources.files("othello_gpt") / "assets" / "small" / "probes.safetensors"))

Kind = TypeVar("Kind", bound="Probe")  # a kind of probe: what `load` was called on


class Directions(NamedTuple):
    """The two directions of every square in the residual stream."""

    blank: Float[Tensor, "d_model row=8 col=8"]  # towards empty
    mine: Float[Tensor, "d_model row=8 col=8"]  # towards mine, away from theirs


class Probe:
    """What linear and two-layer probes have in common: a layer, a question, its classes, and logits."""

    W: Float[Tensor, "reads row=8 col=8 state"]
    b: Float[Tensor, "row=8 col=8 state"]
    layer: int  # reads blocks.{layer}.hook_resid_post; -1 reads the embeddings
    classes: tuple[str, ...]
    space: str  # "centred", or "raw": trained on a residual stream whose mean was not removed
    target: str  # the name of the target that it was trained for

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 8 8 state"]:
        """Logits of the classes of every square."""
        raise NotImplementedError

    def probabilities(
        self, resid: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 8 8 state"]:
        """What the probe believes of every square; sums to 1 over the classes."""
        return self.logits(resid).softmax(-1)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name; the first is what reads the residual stream."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self: Kind, target: torch.device | torch.dtype | str) -> Kind:
        """The same probe on another device, or of another dtype."""
        moved = {name: tensor.to(target) for name, tensor in self.tensors().items()}
        return type(self)(**(vars(self) | moved))

    @classmethod
    def load(
        cls: type[Kind],
        path: str | Path,
        layer: int | None = None,
        classes: tuple[str, ...] | None = None,
        mode: str | None = None,
    ) -> Kind:
        """A probe from our own safetensors, or from any probe published for Othello-GPT.

        `LinearProbe.load` and `TwoLayerProbe.load` insist on their kind; `Probe.load` takes either.

        Args:
            path: `main_linear_probe.pth` (three modes; the first two are averaged into mine and
                theirs), `resid_{l}_linear.pth`, `resid_{l}_flipped.pth`, or a `checkpoint.ckpt` of
                Li et al. or Hazineh et al. with `proj.weight`, or `proj.0.weight` and `proj.2.weight`.
            layer: which layer of our own files, or what the others read; by default what the file or its
                name says, or its folder's.
            classes: for `proj` files, the names of its three classes in the file's order, by
                default Li's ("white", "empty", "black"), or ("mine", "empty", "theirs") of Hazineh's
                files, whose names say "Map_New".
            mode: one mode of three as it is: "black to play", "white to play" or "all".

        Raises:
            ValueError: another format, shape or kind of probe, a layer that cannot be known, or an option that says
                nothing of such a file.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            refuse_options(path, classes=classes, mode=mode)
            probe = _load_own(path, layer)
        else:
            probe = _assembled(read_published(path, layer, classes, mode))
        if not isinstance(probe, cls):
            kinds = type(probe).__name__, cls.__name__
            hint = "A two-layer probe is not linear and has no directions. " * (cls is LinearProbe)
            raise ValueError(
                f"'{path}' holds a {kinds[0]}, not a {kinds[1]}. {hint}Use `{kinds[0]}.load`."
            )
        return probe

    @classmethod
    def load_all(cls: type[Kind], path: str | Path) -> list[Kind]:
        """The probes of every layer of one of our own files."""
        with safe_open(path, "pt") as file:
            layers = json.loads(_metadata(file, path)["layers"])
        return [cls.load(path, layer) for layer in layers]


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Logits of each square's classes: `resid @ W + b`, after block `layer`."""

    W: Float[Tensor, "d_model row=8 col=8 state"]
    b: Float[Tensor, "row=8 col=8 state"]
    layer: int
    classes: tuple[str, ...] = MINE.classes
    space: str = "centred"
    target: str = "mine"

    @classmethod
    def from_pretrained(cls, layer: int = 6) -> "LinearProbe":
        """The probe of one layer (-1: of the embeddings) that ships with the packaged model."""
        return cls.load(SHIPPED, layer=layer)

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 8 8 state"]:
        """Logits of the classes of every square."""
        return torch.tensordot(resid, self.W, 1) + self.b

    def direction(self, toward: str, away: str) -> Float[Tensor, "d_model row=8 col=8"]:
        """Along which each square's logit of one class grows most over that of another."""
        if missing := {toward, away} - set(self.classes):
            raise ValueError(
                f"this probe reads {', '.join(self.classes)}, not {', '.join(sorted(missing))}."
            )
        return self.W[..., self.classes.index(toward)] - self.W[..., self.classes.index(away)]

    @property
    def blank(self) -> Float[Tensor, "d_model row=8 col=8"]:
        """Towards empty: empty - (mine + theirs) / 2."""
        self._check_mine()
        return (self.direction("empty", "mine") + self.direction("empty", "theirs")) / 2

    @property
    def mine(self) -> Float[Tensor, "d_model row=8 col=8"]:
        """Towards mine: mine - theirs, given that the square is not empty."""
        self._check_mine()
        return self.direction("mine", "theirs")

    def normalised(self) -> Directions:
        """Both directions at unit length; blank is zero on the centre squares, which never are.

        Source: ARENA 1.5.3, section 2, `blank_probe_normalised` and `my_probe_normalised`.
        """
        blank, mine = (d / d.norm(dim=0) for d in (self.blank, self.mine))
        centre = torch.tensor(CENTRE)
        blank[:, centre // 8, centre % 8] = 0
        return Directions(blank, mine)

    def _check_mine(self) -> None:
        if missing := set(MINE.classes) - set(self.classes):
            raise ValueError(
                f"this probe reads {', '.join(self.classes)}, not {', '.join(sorted(missing))}. "
                "Directions of blank and mine need a probe of empty, theirs and mine."
            )


@dataclass(frozen=True)
class TwoLayerProbe(Probe):
    """Logits `relu(resid @ W_in + b_in) @ W + b`; Li et al.'s nonlinear probe."""

    W_in: Float[Tensor, "d_model hidden"]
    b_in: Float[Tensor, " hidden"]
    W: Float[Tensor, "hidden row=8 col=8 state"]
    b: Float[Tensor, "row=8 col=8 state"]
    layer: int
    classes: tuple[str, ...] = MINE.classes
    space: str = "centred"
    target: str = "mine"

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 8 8 state"]:
        """Logits of the classes of every square."""
        hidden = (resid @ self.W_in + self.b_in).relu()
        return torch.tensordot(hidden, self.W, 1) + self.b


def check_reads(probes: Sequence[Probe], model: OthelloGPT) -> None:
    """Refuses probes that were not made for this model's residual stream.

    Raises:
        ValueError: another d_model or dtype, a layer that the model lacks, or the raw stream in place of the
            centred one (or the reverse).
    """
    space = stream_space(model)
    for probe in probes:
        first = next(iter(probe.tensors().values()))
        d_model = first.shape[0]
        if first.dtype != model.dtype:
            raise ValueError(
                f"the probe is {first.dtype}, but the model {model.dtype}: give `probe.to({model.dtype})`."
            )
        if d_model != model.cfg.d_model:
            raise ValueError(
                f"the probe reads {d_model} dimensions, but the model's residual stream has "
                f"{model.cfg.d_model}: take a probe that was trained on this model."
            )
        if not -1 <= probe.layer < model.cfg.n_layers:
            raise ValueError(
                f"the probe reads layer {probe.layer}, but the model has layers 0 to "
                f"{model.cfg.n_layers - 1} (and -1, its embeddings)."
            )
        if probe.space != space:
            raise ValueError(
                f"the probe reads the {probe.space} residual stream, but this model's is {space}. Load "
                f"the model with `fold={probe.space == 'centred'}`, or train a probe on it as it is."
            )


def check_reads_mine(probes: Sequence[Probe], model: OthelloGPT) -> None:
    """Refuses probes that were not made for this model's stream, or do not read empty, theirs and mine.

    Raises:
        ValueError: as `check_reads`, or other classes.
    """
    check_reads(probes, model)
    for probe in probes:
        if probe.classes != MINE.classes:
            raise ValueError(
                f"the probe of layer {probe.layer} reads {', '.join(probe.classes)}: give one of "
                f"{', '.join(MINE.classes)}."
            )


def stream_space(model: OthelloGPT) -> str:
    """Which stream probes of this model read: "centred" if nothing writes to its mean (as folded), else "raw"."""
    blocks = [w for b in model.blocks for w in (b.attn.W_O, b.attn.b_O, b.mlp.W_out, b.mlp.b_out)]
    for written in (model.W_E, model.W_pos, *blocks):
        along_ones = written.sum(-1) / model.cfg.d_model**0.5
        rounding = 0.01 * written.norm(dim=-1)  # of weights stored in float16, amply
        if (along_ones.abs() > rounding).any():
            return "raw"
    return "centred"


def save_probes(probes: Sequence[Probe], path: str | Path) -> None:
    """Writes probes of one kind and target, one a layer, as safetensors with their metadata.

    Raises:
        ValueError: none, probes of several kinds, targets, classes or spaces, two of one layer, or a path that does
            not end in .safetensors.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"'{path}' does not end in .safetensors, by which `Probe.load` knows our own files: let it."
        )
    layers = [probe.layer for probe in probes]
    kinds = {(type(probe), probe.classes, probe.space, probe.target) for probe in probes}
    if len(kinds) != 1 or len(set(layers)) != len(layers):
        raise ValueError(
            f"`probes` has {len(kinds)} kinds of probes, of layers {layers}, but a file holds one kind: same "
            "type, target, classes and space, one probe a layer."
        )
    metadata = {
        "layers": json.dumps(layers),
        "classes": json.dumps(probes[0].classes),
        "space": probes[0].space,
        "target": probes[0].target,
    }
    tensors = [probe.tensors() for probe in probes]
    stacked = {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}
    partial = Path(f"{path}.partial")
    save_file(stacked, partial, metadata)
    partial.replace(path)


def _metadata(file, path: str | Path) -> dict[str, str]:
    metadata = file.metadata() or {}
    if missing := {"layers", "classes", "space"} - set(metadata):
        raise ValueError(
            f"'{path}' is no file of probes, for its metadata lacks {', '.join(sorted(missing))}: `save_probes` "
            "writes one."
        )
    return metadata


def _load_own(path: Path, layer: int | None) -> Probe:
    with safe_open(path, "pt") as file:
        metadata = _metadata(file, path)
        layers = json.loads(metadata["layers"])
        if layer is None and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            raise ValueError(
                f"'{path}' holds probes of layers {layers}, not of layer {layer}. Give one of them as `layer=`."
            )
        stored = {name: file.get_slice(name)[layers.index(layer)] for name in file.keys()}  # noqa: SIM118
    stored = {name: x.to(torch.promote_types(x.dtype, torch.float)) for name, x in stored.items()}
    return _assembled(
        stored
        | {
            "layer": layer,
            "classes": tuple(json.loads(metadata["classes"])),
            "space": metadata["space"],
            "target": metadata.get("target", "mine"),
        }
    )


def _assembled(fields: dict[str, Any]) -> Probe:
    return TwoLayerProbe(**fields) if "W_in" in fields else LinearProbe(**fields)
