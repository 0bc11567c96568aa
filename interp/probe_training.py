"""Fitting probes of every layer and several targets in one streaming pass over games.

Activations are made once a batch, for all layers together, and never stored whole. Every position from which
somebody moves counts, whoever that is: the labels follow the engine's mover. There are two fits:

- `fit_probes`, in closed form: the linear discriminant, from sums of x, x x^T and x by class. No steps, no
  learning rate, and as many targets as one likes at almost the cost of one.
- `train_probes`, by gradient: linear or two-layer probes, which start from the discriminant. Activations are
  whitened first, so that all directions learn at one speed, and the whitening is folded into the weights.

Under `torchrun`, with `torch.distributed` initialised by the caller, each rank takes its share of every batch, and
all end with the same probes, equal to one process's to float noise.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from interp.probe_types import LinearProbe, Probe, TwoLayerProbe, stream_space
from interp.targets import MINE, Target
from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import square_to_label

EVERYWHERE = slice(None)
Games = Int[Tensor, "_game _ply"] | Int[ndarray, "_game _ply"]  # squares, -1 after a game's end


class Labelled(NamedTuple):
    """Activations of the positions of some games from which somebody moves, with their labels."""

    resid: Float[Tensor, "layer n d_model"]
    labels: tuple[Int[Tensor, "n 8 8"], ...]  # one for each target
    game: Int[Tensor, " n"]
    pos: Int[Tensor, " n"]


def as_games(squares: Games) -> Int[Tensor, "game ply"]:
    """The games as a tensor.

    Raises:
        ValueError: not one row a game.
    """
    squares = torch.as_tensor(squares)
    if squares.ndim != 2:
        raise ValueError(
            f"games are of shape {tuple(squares.shape)}, but must be [game ply]: give one alone as `squares[None]`."
        )
    return squares


@torch.no_grad()
def labelled_activations(
    model: OthelloGPT,
    squares: Int[Tensor, "game ply"],
    layers: Sequence[int],
    targets: Sequence[Target],
    positions: slice = EVERYWHERE,
) -> Labelled:
    """The residual stream after each of `layers` (-1: the embeddings), and what the targets say of it.

    Raises:
        ValueError: activations that are not finite; names the layer and the moves that lead there.
    """
    record = board.play(squares.numpy())
    counted = torch.from_numpy(record.to_move[:, : model.cfg.n_ctx] != 0)
    inside = torch.zeros(counted.shape[1], dtype=torch.bool)
    inside[positions] = True
    game, pos = (counted & inside).nonzero(as_tuple=True)
    resid = residual_stream(model, games_to_tokens(squares)[:, : model.cfg.n_ctx], layers)
    resid = resid[:, game, pos]
    # the sum is quick, and all is well where it is finite; a finite stream's may overflow
    if not resid.sum().isfinite() and len(strange := (~resid.isfinite().all(-1)).nonzero()):
        layer, n = strange[0].tolist()
        moves = map(square_to_label, squares[game[n], : pos[n] + 1].tolist())
        raise ValueError(
            f"activations after layer {layers[layer]} are not finite after the moves {' '.join(moves)}: "
            "look for NaN or overflow in the model's weights."
        )
    labels = tuple(target(record)[game, pos].to(resid.device) for target in targets)
    return Labelled(resid, labels, game, pos)


def residual_stream(
    model: OthelloGPT, tokens: Int[Tensor, "game pos"], layers: Sequence[int]
) -> Float[Tensor, "layer game pos d_model"]:
    """The residual stream after each of `layers`; -1 is what enters the first."""
    sites = [resid_site(layer) for layer in layers]
    _, cache = model.run_with_cache(tokens, sites, stop_at_layer=max(1, max(layers) + 1))
    return torch.stack([cache[site] for site in sites])


def resid_site(layer: int) -> str:
    """The hook site that a probe of that layer reads."""
    return "blocks.0.hook_resid_pre" if layer == -1 else f"blocks.{layer}.hook_resid_post"


def fit_probes(
    model: OthelloGPT,
    squares: Games,
    *,
    targets: Sequence[Target] = (MINE,),
    layers: Sequence[int] | None = None,
    positions: slice = EVERYWHERE,
    ridge: float = 1e-4,
    batch_size: int = 32,
    progress: bool = False,
) -> list[LinearProbe]:
    """Linear discriminants of every square, in closed form from one pass: target by target, layer by layer.

    Args:
        squares: games to fit on, 0 to 63 and -1 after the end. Score on other games.
        targets: questions, see `interp.targets`.
        layers: blocks whose `resid_post` is read, -1 for the embeddings; by default all of these.
        positions: which positions count, for instance `slice(5, 54)`.
        ridge: added to the covariance, as a share of its mean diagonal.

    Raises:
        ValueError: no games, positions or layers, unknown layers, or activations that are not finite.

    Source: Fisher 1936; Hastie, Tibshirani and Friedman, "Elements of Statistical Learning", section 4.3.
    """
    squares = as_games(squares)
    layers = _checked(model, squares, layers)
    moments = _moments(model, squares, layers, targets, positions, batch_size, progress)
    space = stream_space(model)
    fitted = []
    for target, by_class, n_class in zip(targets, moments.by_class, moments.n_class, strict=True):
        W, b = _discriminant(moments, by_class, n_class, ridge)
        fitted += _linear_probes(W.to(model.dtype), b.to(model.dtype), layers, target, space)
    return fitted


class _Moments(NamedTuple):
    """Sums over positions, in float64."""

    n: Tensor
    x: Float[Tensor, "layer d_model"]
    xx: Float[Tensor, "layer d_model d_model"]
    # Of each target; a column is a class of a square.
    by_class: list[Float[Tensor, "layer d_model column"]]
    n_class: list[Float[Tensor, " column"]]

    @property
    def mean(self) -> Float[Tensor, "layer d_model"]:
        return self.x / self.n

    def covariance(self, ridge: float) -> Float[Tensor, "layer d_model d_model"]:
        covariance = self.xx / self.n - self.mean[:, :, None] * self.mean[:, None]
        share = ridge * covariance.diagonal(dim1=1, dim2=2).mean(-1)
        return covariance + share[:, None, None] * torch.eye(len(covariance[0])).to(covariance)


def _moments(
    model: OthelloGPT,
    squares: Int[Tensor, "game ply"],
    layers: Sequence[int],
    targets: Sequence[Target],
    positions: slice,
    batch_size: int,
    progress: bool,
) -> _Moments:
    rank, n_ranks = _rank()
    total: list[Tensor] = []
    for games in shown(squares.split(batch_size), "moments", progress):
        batch = labelled_activations(model, games[rank::n_ranks], layers, targets, positions)
        across = batch.resid.mT  # [layer, d_model, n]
        answers = [_one_hot(labels, t) for labels, t in zip(batch.labels, targets, strict=True)]
        answers = [answer.to(across.dtype) for answer in answers]  # [n, square * k]
        sums = [torch.tensor(len(batch.pos)), across.sum(-1), across @ batch.resid]
        sums += [across @ answer for answer in answers] + [answer.sum(0) for answer in answers]
        sums = [part.double() for part in sums]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
    _sum_over_ranks(total)
    n_targets = len(targets)
    n, x, xx, *by_target = total
    if n == 0:
        raise ValueError(
            f"`positions` is {positions}, and no game has a position there from which somebody moves: take others."
        )
    return _Moments(n, x, xx, by_target[:n_targets], by_target[n_targets:])


def _one_hot(labels: Int[Tensor, "n 8 8"], target: Target) -> Int[Tensor, "n column"]:
    return F.one_hot(labels.flatten(1), len(target.classes)).flatten(1)


def _discriminant(
    moments: _Moments, by_class: Tensor, n_class: Tensor, ridge: float
) -> tuple[Float[Tensor, "layer d_model column"], Float[Tensor, "layer column"]]:
    """W = S^-1 m and b = log p - m^T S^-1 m / 2 - mean^T W, square by square.

    S is the covariance within the square's classes, m their means less the common one, p their shares. One
    solve with the common covariance C serves all squares: S = C - m p m^T, so by Woodbury's identity
    S^-1 m = C^-1 m (1 - p m^T C^-1 m)^-1.
    """
    mean = moments.mean
    seen = n_class > 0
    m = (by_class / n_class.clamp(min=1) - mean[..., None]) * seen
    k = len(n_class) // 64
    # not `torch.linalg.solve`: of several large matrices it can hang in MKL with more threads than one
    solved = torch.cholesky_solve(m, torch.linalg.cholesky(moments.covariance(ridge)))
    m, solved = (x.unflatten(-1, (64, k)).transpose(1, 2) for x in (m, solved))  # [layer, 64, d, k]
    n_class = n_class.view(64, k)
    inner = torch.eye(k).to(m) - (n_class / moments.n)[:, :, None] * (m.mT @ solved)
    W = solved @ torch.linalg.inv(inner)
    log_p = ((n_class + 0.5) / (moments.n + 0.5 * k)).log()  # finite for a class never seen
    b = log_p - (m * W).sum(2) / 2 - torch.einsum("ld,lsdk->lsk", mean, W)
    return W.transpose(1, 2).flatten(2), b.flatten(1)


def train_probes(
    model: OthelloGPT,
    squares: Games,
    *,
    targets: Sequence[Target] = (MINE,),
    layers: Sequence[int] | None = None,
    hidden: int | None = None,
    positions: slice = EVERYWHERE,
    epochs: int = 1,
    batch_size: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[Probe]:
    """Probes fitted by gradient on the cross-entropy: target by target, layer by layer.

    Linear ones start from the discriminant of the first quarter of the games, which is gone through twice; two-layer
    ones from that of all games.

    Args:
        squares: games to train on, 0 to 63 and -1 after the end. Score on other games.
        targets: questions, see `interp.targets`.
        layers: blocks whose `resid_post` is read, -1 for the embeddings; by default all of these.
        hidden: the size of a hidden layer, for two-layer probes; None for linear ones.
        positions: which positions count, for instance `slice(5, 54)`.
        epochs: how often the games are gone through; one is enough for linear probes.
        batch_size: games a step, shared out by rank.
        lr: Adam's learning rate at the start, for whitened activations; it falls linearly to zero.
        seed: of the order of games, and of the hidden layer's first weights.

    Raises:
        ValueError: no games, positions, layers, epochs or hidden units, unknown layers, or activations that are not
            finite.
    """
    squares = as_games(squares)
    layers = _checked(model, squares, layers)
    for name, value in (("epochs", epochs), ("hidden", hidden)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}: give 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(squares), generator=generator) for _ in range(epochs)]
    batches = [games for order in orders for games in squares[order].split(batch_size)]
    first = squares[orders[0][: (len(squares) + 3) // 4]] if hidden is None else squares
    moments = _moments(model, first, layers, targets, positions, 2 * batch_size, progress)
    whitening = _Whitening.of(moments, model.dtype)
    heads = [_head(moments, whitening, i, hidden, generator) for i in range(len(targets))]
    parameters = [weight.requires_grad_() for head in heads for weight in head]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    rank, n_ranks = _rank()
    for games in shown(batches, "probes", progress):
        batch = labelled_activations(model, games[rank::n_ranks], layers, targets, positions)
        white = torch.baddbmm(-whitening.offset, batch.resid, whitening.root)
        optimizer.zero_grad()
        _cross_entropy(heads, white, batch.labels).backward()
        _sum_over_ranks([weight.grad for weight in parameters if weight.grad is not None])
        optimizer.step()
        schedule.step()
    space = stream_space(model)
    trained = (whitening.folded(head) for head in heads)
    return [
        probe
        for target, head in zip(targets, trained, strict=True)
        for probe in _probes(head, layers, target, space)
    ]


# One target's probes of all layers: W [layer, rows, columns], b [layer, 1, columns], and again if two layers.
_Head = list[Tensor]


class _Whitening(NamedTuple):
    """x @ root - offset has mean 0 and covariance 1."""

    root: Float[Tensor, "layer d_model d_model"]
    offset: Float[Tensor, "layer 1 d_model"]

    @classmethod
    def of(cls, moments: _Moments, dtype: torch.dtype, ridge: float = 1e-4) -> "_Whitening":
        lower = torch.linalg.cholesky(moments.covariance(ridge))
        eye = torch.eye(lower.shape[-1]).to(lower).expand_as(lower)
        root = torch.linalg.solve_triangular(lower, eye, upper=False).mT
        return cls(root.to(dtype), (moments.mean[:, None] @ root).to(dtype))

    def unfolded(self, W: Tensor, b: Tensor) -> _Head:
        """Weights for whitened activations from those for plain ones."""
        W = torch.linalg.solve_triangular(self.root, W, upper=True)
        return [W, b + self.offset @ W]

    def folded(self, head: _Head) -> _Head:
        """Weights for plain activations from those for whitened ones."""
        W, b, *rest = (weight.detach() for weight in head)
        return [self.root @ W, b - self.offset @ W, *rest]


def _head(
    moments: _Moments, whitening: _Whitening, i: int, hidden: int | None, generator: torch.Generator
) -> _Head:
    W, b = _discriminant(moments, moments.by_class[i], moments.n_class[i], 1e-4)
    W, b = whitening.unfolded(*(x.to(whitening.root.dtype) for x in (W, b[:, None])))
    return [W, b] if hidden is None else _two_layers(W, b, hidden, generator)


def _two_layers(W: Tensor, b: Tensor, hidden: int, generator: torch.Generator) -> _Head:
    """A hidden layer with which two layers begin where one would end: x u = relu(x u) - relu(-x u).

    Each pair of units reads one singular direction u of W, the largest first; what units are left read random ones,
    and write nothing yet.
    """
    n = min(hidden // 2, int(torch.linalg.matrix_rank(W, rtol=1e-4).max()))
    U = torch.linalg.svd(W, full_matrices=False).U[..., :n]
    U = U * U.sum(1, keepdim=True).sign()  # else rounding decides, and ranks of a run could differ
    written = U.mT @ W
    n_layers, d_model, n_columns = W.shape
    others = torch.randn(n_layers, d_model, hidden - 2 * n, generator=generator).to(W)
    silent = W.new_zeros(n_layers, hidden - 2 * n, n_columns)
    W_in = torch.cat([U, -U, others * (2 / d_model) ** 0.5], 2)
    return [W_in, W.new_zeros(n_layers, 1, hidden), torch.cat([written, -written, silent], 1), b]


def _cross_entropy(
    heads: Sequence[_Head], white: Float[Tensor, "layer n d_model"], labels: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Nats, averaged over the positions of all ranks and squares, summed over layers and targets."""
    n = torch.tensor(float(white.shape[1]), device=white.device)
    _sum_over_ranks([n])
    loss = torch.zeros((), device=white.device)
    for head, answers in zip(heads, labels, strict=True):
        logits = _head_logits(head, white)
        logits = logits.reshape(-1, logits.shape[-1] // 64)  # [layer * n * square, k]
        answers = answers.flatten().repeat(len(white))
        loss = loss + F.cross_entropy(logits, answers, reduction="sum") / (64 * n)
    return loss


def _head_logits(head: _Head, x: Float[Tensor, "layer n d_model"]) -> Tensor:
    for i in range(0, len(head), 2):
        x = torch.baddbmm(head[i + 1], x if i == 0 else x.relu(), head[i])
    return x


def _probes(head: _Head, layers: Sequence[int], target: Target, space: str) -> list[Probe]:
    linear = _linear_probes(head[-2], head[-1][:, 0], layers, target, space)
    if len(head) == 2:
        return [*linear]
    W_in, b_in = head[0], head[1][:, 0]
    return [TwoLayerProbe(W_in[i], b_in[i], **vars(probe)) for i, probe in enumerate(linear)]


def _linear_probes(
    W: Tensor, b: Tensor, layers: Sequence[int], target: Target, space: str
) -> list[LinearProbe]:
    boards = (8, 8, len(target.classes))
    W, b = W.unflatten(-1, boards), b.unflatten(-1, boards)
    return [
        LinearProbe(W[i], b[i], layer, target.classes, space, target.name)
        for i, layer in enumerate(layers)
    ]


def _checked(
    model: OthelloGPT, squares: Int[Tensor, "game ply"], layers: Sequence[int] | None
) -> list[int]:
    if len(squares) == 0:
        raise ValueError(
            "`squares` holds no games: give at least one, for instance of `board.random_games`."
        )
    n_layers = model.cfg.n_layers
    layers = list(range(-1, n_layers)) if layers is None else list(layers)
    if not layers or not all(-1 <= layer < n_layers for layer in layers):
        raise ValueError(
            f"`layers` is {layers}, but the model has layers 0 to {n_layers - 1} (and -1, its embeddings)."
        )
    return layers


def _rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)


def _sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    if _is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def shown(batches: Sequence, what: str, progress: bool) -> Iterable:
    """The batches, under a progress bar if wanted."""
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc=what)
