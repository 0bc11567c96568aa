"""Linear probes of the board: load every published format, train, score, and read off directions.

A probe reads, for each square, one of a few classes from the residual stream after a block. The classes
that the model itself uses are empty, theirs and mine, where `mine` is the colour of whoever moves next. It
comes from the engine's mover: forfeits break the parity of plies in a third of full-length random games.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens

MINE_THEIRS = ("empty", "theirs", "mine")
BLACK_WHITE = ("empty", "white", "black")
CENTRE_ROWS, CENTRE_COLS = [3, 3, 4, 4], [3, 4, 3, 4]


class Directions(NamedTuple):
    """The two directions of every square in the residual stream."""

    blank: Float[Tensor, "d_model row=8 col=8"]  # towards empty
    mine: Float[Tensor, "d_model row=8 col=8"]  # towards mine, away from theirs


@dataclass(frozen=True)
class LinearProbe:
    """Logits of each square's classes: `resid_post @ W + b`, after block `layer`."""

    W: Float[Tensor, "d_model row=8 col=8 state"]
    b: Float[Tensor, "row=8 col=8 state"]
    layer: int  # reads blocks.{layer}.hook_resid_post; -1 reads the embeddings
    classes: tuple[str, ...] = MINE_THEIRS
    space: str = "centred"  # or "raw": trained on a residual stream whose mean was not removed

    @classmethod
    def from_pretrained(cls, layer: int = 6) -> "LinearProbe":
        """The probe of one layer that ships with the packaged model."""
        path = resources.files("othello_gpt") / "assets" / "small" / "probes.safetensors"
        return cls.load(Path(str(path)), layer=layer)

    @classmethod
    def load(
        cls, path: str | Path, layer: int | None = None, classes: tuple[str, ...] | None = None
    ) -> "LinearProbe":
        """A probe from our own safetensors, or from any linear probe published for Othello-GPT.

        Args:
            path: `main_linear_probe.pth` (three modes; the odd and even ones are averaged into mine and
                theirs), `resid_{l}_linear.pth`, `resid_{l}_flipped.pth`, or a `checkpoint.ckpt` of
                Li et al. or Hazineh et al. with `proj.weight` and `proj.bias`.
            layer: which layer of our own files, or what the others read; by default what the file or its
                name says.
            classes: for `proj.weight` files, the names of its three classes in the file's order, by
                default Li's ("white", "empty", "black"); Hazineh's "New" probes are
                ("mine", "empty", "theirs").

        Raises:
            ValueError: another format, or a layer that cannot be known.

        Source: the formats are those of likenneth/othello_world, ajyl/mech_int_othelloGPT and
        DeanHazineh/Emergent-World-Representations-Othello.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            return cls(**_load_own(path, layer))
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(stored, dict):
            return cls(**_from_projection(stored, path, layer, classes))
        return cls(**_from_modes(stored.detach(), path, layer))

    @classmethod
    def load_all(cls, path: str | Path) -> "list[LinearProbe]":
        """The probes of every layer of one of our own files."""
        with safe_open(path, "pt") as file:
            layers = json.loads((file.metadata() or {}).get("layers", "[]"))
        return [cls.load(path, layer) for layer in layers]

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 8 8 state"]:
        """Logits of the classes of every square."""
        return torch.tensordot(resid, self.W, 1) + self.b

    def probabilities(
        self, resid: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 8 8 state"]:
        """What the probe believes of every square; sums to 1 over the classes."""
        return self.logits(resid).softmax(-1)

    @property
    def blank(self) -> Float[Tensor, "d_model row=8 col=8"]:
        """Towards empty: empty - (mine + theirs) / 2."""
        empty, theirs, mine = self._mine_theirs()
        return empty - (mine + theirs) / 2

    @property
    def mine(self) -> Float[Tensor, "d_model row=8 col=8"]:
        """Towards mine: mine - theirs, given that the square is not empty."""
        _, theirs, mine = self._mine_theirs()
        return mine - theirs

    def normalised(self) -> Directions:
        """Both directions at unit length; blank is zero on the centre squares, which never are.

        Source: ARENA 1.5.3, section 2, `blank_probe_normalised` and `my_probe_normalised`.
        """
        blank, mine = (d / d.norm(dim=0) for d in (self.blank, self.mine))
        blank[:, CENTRE_ROWS, CENTRE_COLS] = 0
        return Directions(blank, mine)

    def to(self, device: torch.device | str) -> "LinearProbe":
        """The same probe on another device."""
        return LinearProbe(
            self.W.to(device), self.b.to(device), self.layer, self.classes, self.space
        )

    def _mine_theirs(self) -> list[Tensor]:
        if missing := set(MINE_THEIRS) - set(self.classes):
            raise ValueError(
                f"this probe reads {', '.join(self.classes)}, not {', '.join(sorted(missing))}. "
                "Directions of blank and mine need a probe of empty, theirs and mine."
            )
        return [self.W[..., self.classes.index(name)] for name in MINE_THEIRS]


def save_probes(probes: Sequence[LinearProbe], path: str | Path) -> None:
    """Writes probes of one kind, one a layer, as safetensors with their metadata."""
    metadata = {
        "layers": json.dumps([probe.layer for probe in probes]),
        "classes": json.dumps(probes[0].classes),
        "space": probes[0].space,
    }
    stacked = {name: torch.stack([getattr(probe, name) for probe in probes]) for name in ("W", "b")}
    partial = Path(f"{path}.partial")
    save_file(stacked, partial, metadata)
    partial.replace(path)


def _load_own(path: Path, layer: int | None) -> dict:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        layers = json.loads(metadata.get("layers", "[]"))
        if layer is None and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            raise ValueError(
                f"'{path}' holds probes of layers {layers}, not of layer {layer}. Give one of them as `layer=`."
            )
        W, b = (file.get_slice(name)[layers.index(layer)].float() for name in ("W", "b"))
    classes, space = tuple(json.loads(metadata["classes"])), metadata["space"]
    return dict(W=W, b=b, layer=layer, classes=classes, space=space)


def _from_modes(stored: Tensor, path: Path, layer: int | None) -> dict:
    """Probes stored as [mode d_model row col class], without a bias."""
    n_modes, n_classes = (stored.shape[0], stored.shape[-1]) if stored.ndim == 5 else (0, 0)
    if (n_modes, n_classes) == (3, 3):
        black_to_play, white_to_play = stored[0], stored[1]  # classes: empty, white, black
        W = (black_to_play + white_to_play[..., [0, 2, 1]]) / 2
        classes, layer = MINE_THEIRS, 6 if layer is None else layer
    elif (n_modes, n_classes) == (1, 3):
        W, classes = stored[0], MINE_THEIRS
    elif (n_modes, n_classes) == (1, 2):
        W, classes = stored[0], ("flipped", "not flipped")
    else:
        raise ValueError(
            f"'{path}' holds a tensor of shape {tuple(stored.shape)}. Published probes are "
            "[3 d_model 8 8 3], [1 d_model 8 8 3] or [1 d_model 8 8 2]."
        )
    W = W.clone()
    return dict(W=W, b=torch.zeros(W.shape[1:]), layer=_known_layer(path, layer), classes=classes)


def _from_projection(
    stored: dict, path: Path, layer: int | None, classes: tuple[str, ...] | None
) -> dict:
    """Probes stored as one matrix whose rows are square * 3 + class, trained on the raw residual stream."""
    if "proj.weight" not in stored or "proj.bias" not in stored:
        raise ValueError(
            f"'{path}' holds {', '.join(stored)}, but a linear probe has `proj.weight` and `proj.bias`. "
            "A two-layer probe (`proj.0.weight`) is not linear and has no directions."
        )
    names = classes or ("white", "empty", "black")
    order = MINE_THEIRS if set(names) == set(MINE_THEIRS) else BLACK_WHITE
    if set(names) != set(order):
        raise ValueError(
            f"`classes` is {names}; give the file's order of {MINE_THEIRS} or {BLACK_WHITE}."
        )
    by_class = [names.index(name) for name in order]
    W = rearrange(stored["proj.weight"], "(row col k) d -> d row col k", row=8, col=8)
    b = rearrange(stored["proj.bias"], "(row col k) -> row col k", row=8, col=8)
    # their layer l is the stream after l blocks
    layer = _known_layer(path, layer, offset=-1)
    return dict(W=W[..., by_class], b=b[..., by_class], layer=layer, classes=order, space="raw")


def _known_layer(path: Path, layer: int | None, offset: int = 0) -> int:
    if layer is not None:
        return layer
    if match := re.search(r"(?:resid_|[Ll]ayer_?)(\d+)", str(Path(path.parent.name) / path.name)):
        return int(match[1]) + offset
    raise ValueError(f"'{path}' does not say which layer it reads: give `layer=`.")


class ProbeAccuracy(NamedTuple):
    """Shares of squares read right, over positions from which somebody still moves."""

    by_layer: Float[Tensor, " layer"]  # all squares and positions
    by_square: Float[Tensor, "layer 8 8"]
    by_pos: Float[Tensor, "layer pos"]
    whole_board: Float[Tensor, " layer"]  # positions whose 64 squares are all right


def train_probes(
    model: OthelloGPT,
    squares: Int[Tensor, "game ply"],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool = False,
) -> list[LinearProbe]:
    """Linear probes of empty, theirs and mine after each of `layers`, fitted in one pass over the games.

    Activations are made once a batch, for all layers together, and never stored whole. Every position
    from which somebody moves counts, whoever that is: the labels follow the engine's mover.

    Args:
        squares: games to train on, 0 to 63 and -1 after the end. Score on other games.
        layers: blocks whose `resid_post` is read; all by default.
        lr: AdamW's learning rate at the start; it falls linearly to zero.
        seed: of the order of games.
    """
    layers = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    shape = (len(layers), model.cfg.d_model, 8 * 8 * 3)
    W = torch.zeros(shape, device=model.device, requires_grad=True)
    b = torch.zeros(len(layers), 1, shape[-1], device=model.device, requires_grad=True)
    order = torch.randperm(len(squares), generator=torch.Generator().manual_seed(seed))
    batches = _progress(order.split(batch_size), "probes", progress)
    optimizer = torch.optim.AdamW([W, b], lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for games in batches:
        resid, labels = _labelled_activations(model, squares[games], layers)
        logits = rearrange(
            torch.baddbmm(b, resid, W), "layer n (square k) -> (layer n square) k", k=3
        )
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten().repeat(len(layers)))
        optimizer.zero_grad()
        (loss * len(layers)).backward()
        optimizer.step()
        schedule.step()
    W_boards = rearrange(W.detach(), "layer d (row col k) -> layer d row col k", row=8, col=8)
    b_boards = rearrange(b.detach(), "layer 1 (row col k) -> layer row col k", row=8, col=8)
    fitted = zip(W_boards, b_boards, layers, strict=True)
    return [LinearProbe(W, b, layer) for W, b, layer in fitted]


@torch.no_grad()
def probe_accuracy(
    model: OthelloGPT,
    probes: Sequence[LinearProbe],
    squares: Int[Tensor, "game ply"],
    batch_size: int = 64,
) -> ProbeAccuracy:
    """How often the probes of mine, theirs and empty are right on these games."""
    if any(probe.classes != MINE_THEIRS for probe in probes):
        raise ValueError(f"accuracy is counted for probes whose classes are {MINE_THEIRS}.")
    n_pos = min(squares.shape[1], model.cfg.n_ctx)
    right = torch.zeros(len(probes), n_pos, 8, 8, dtype=torch.double)
    whole, seen = (
        torch.zeros(len(probes), dtype=torch.double),
        torch.zeros(n_pos, dtype=torch.double),
    )
    for games in squares.split(batch_size):
        labels, valid = _labels(games, n_pos)
        pos = valid.nonzero()[:, 1]
        seen.index_add_(0, pos, torch.ones(len(pos), dtype=torch.double))
        resid, _ = _labelled_activations(model, games, [probe.layer for probe in probes])
        for i, probe in enumerate(probes):
            hit = probe.logits(resid[i]).argmax(-1).cpu() == labels[valid]  # [n, 8, 8]
            right[i].index_add_(0, pos, hit.double())
            whole[i] += hit.flatten(1).all(1).sum()
    return ProbeAccuracy(
        by_layer=(right.sum((1, 2, 3)) / seen.sum() / 64).float(),
        by_square=(right.sum(1) / seen.sum()).float(),
        by_pos=(right.sum((2, 3)) / seen / 64).float(),
        whole_board=(whole / seen.sum()).float(),
    )


@torch.no_grad()
def _labelled_activations(
    model: OthelloGPT, squares: Int[Tensor, "game ply"], layers: Sequence[int]
) -> tuple[Float[Tensor, "layer n d_model"], Int[Tensor, "n 8 8"]]:
    tokens = games_to_tokens(squares)[:, : model.cfg.n_ctx]
    labels, valid = _labels(squares, tokens.shape[1])
    sites = [_resid_site(layer) for layer in layers]
    _, cache = model.run_with_cache(tokens, sites, stop_at_layer=model.cfg.n_layers)
    resid = torch.stack([cache[site][valid.to(model.device)] for site in sites])
    return resid, labels[valid].to(model.device)


def _resid_site(layer: int) -> str:
    return "blocks.0.hook_resid_pre" if layer == -1 else f"blocks.{layer}.hook_resid_post"


def _labels(
    squares: Int[Tensor, "game ply"], n_pos: int
) -> tuple[Int[Tensor, "game pos 8 8"], Bool[Tensor, "game pos"]]:
    """Each position's classes (0 empty, 1 theirs, 2 mine), and where somebody still moves."""
    record = board.play(squares.numpy())
    classes = torch.from_numpy(board.piece_classes(record)[:, :n_pos]).long()
    return classes, torch.from_numpy(record.to_move[:, :n_pos] != 0)


def _progress(batches, what: str, shown: bool):
    if not shown:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc=what)
