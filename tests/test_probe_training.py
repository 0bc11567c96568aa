"""Fitting probes: a planted code comes back, by both fits, from the right positions and the right mover."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_strategies import random_model

from interp import probe_training
from interp.probes import (
    BLACK,
    LEGAL,
    MINE,
    PLAYED,
    Target,
    fit_probes,
    labelled_activations,
    majority_baseline,
    probe_accuracy,
    train_probes,
)
from othello_gpt import GPTConfig, OthelloGPT, board
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import square_to_token, token_to_square

SMALL = GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=4, d_mlp=16)
PLANTED = GPTConfig(n_layers=1, d_model=136, n_heads=1, d_head=4, d_mlp=4)
GAMES = torch.from_numpy(board.random_games(24, seed=3))


def planted_stream(code: torch.Tensor, positions: slice):
    """Each square's mine and blank coordinates along directions of its own, by whoever moves next.

    Outside `positions`, and where nobody moves, everything is reversed, and a hundred times as long.
    """

    noise = seeded()

    def stream(model, tokens, layers):
        record = board.play(token_to_square(tokens).numpy())
        relative = torch.from_numpy(record.state * record.to_move[..., None, None]).flatten(2)
        coordinates = torch.cat([relative, relative == 0], -1).double()
        resid = coordinates @ code.T
        resid += 0.02 * torch.randn(resid.shape, generator=noise)
        misleading = torch.from_numpy(record.to_move == 0)
        outside = torch.ones(resid.shape[1], dtype=torch.bool)
        outside[positions] = False
        misleading[:, outside] = True
        resid[misleading] *= -100
        return resid.expand(len(layers), *resid.shape)

    return stream


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fit", [fit_probes, train_probes])
def test_a_planted_code_comes_back(monkeypatch, fit):
    """Cosines above 0.999 with the planted directions, and every square of other games read right.

    Positions left out, or labels by the ply's parity, fail: the former mislead, and the latter are wrong at
    forfeits, on which a tenth of these games turn.
    """
    generator = torch.Generator().manual_seed(0)
    code = torch.linalg.qr(torch.randn(136, 128, generator=generator).double()).Q
    positions = slice(5, None)
    monkeypatch.setattr(probe_training, "residual_stream", planted_stream(code, positions))
    n_games = 600 if fit is fit_probes else 2000  # the start of training sees a quarter
    squares = torch.from_numpy(board.random_games(n_games, seed=1))
    (probe,) = fit(random_model(PLANTED), squares, layers=[0], positions=positions)
    held_out = torch.from_numpy(board.random_games(60, seed=2))
    accuracy = probe_accuracy(random_model(PLANTED), [probe], held_out, positions=positions)
    cosines = torch.cosine_similarity(probe.mine.flatten(1), code[:, :64], dim=0)

    assert cosines.min() > 0.999
    assert accuracy.by_layer.item() > 0.99999


@pytest.mark.usefixtures("unchecked")
def test_two_layers_learn_a_planted_code_too(monkeypatch):
    """Where one layer reads all of it, so do two, from as few games."""
    code = torch.linalg.qr(torch.randn(136, 128, generator=seeded()).double()).Q
    monkeypatch.setattr(probe_training, "residual_stream", planted_stream(code, slice(None)))
    games = torch.from_numpy(board.random_games(80, seed=1))
    model = random_model(PLANTED)
    two = train_probes(model, games[:60], layers=[0], hidden=256, epochs=2, batch_size=4)

    assert probe_accuracy(model, two, games[60:]).by_layer > 0.999


def test_activations_are_those_of_a_plain_run():
    """Each position from which somebody moves, its layer's stream, its labels; the embeddings as layer -1."""
    model = random_model(SMALL)
    batch = labelled_activations(model, GAMES, [-1, 1], [BLACK, LEGAL], slice(5, 54))
    _, cache = model.run_with_cache(games_to_tokens(GAMES))
    record = board.play(GAMES.numpy())
    live = torch.from_numpy(record.to_move[:, :59] != 0)
    live[:, :5] = live[:, 54:] = False

    assert torch.equal(torch.stack([batch.game, batch.pos], 1), live.nonzero())
    assert torch.allclose(batch.resid[0], cache["resid_pre", 0][live])
    assert torch.allclose(batch.resid[1], cache["resid_post", 1][live])
    assert torch.equal(batch.labels[1], LEGAL(record)[:, :59][live])


def test_fits_do_not_depend_on_the_batches():
    """Sums over games are sums, in whatever portions."""
    one, other = (
        fit_probes(random_model(SMALL), GAMES, targets=[MINE, PLAYED], batch_size=n)
        for n in (24, 7)
    )

    assert [(p.layer, p.target) for p in one] == [
        (layer, name) for name in ("mine", "played") for layer in (-1, 0, 1)
    ]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.W, b.W, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a.b, b.b, rtol=1e-6, atol=1e-8)


def test_the_closed_form_is_the_discriminant_of_each_square():
    """Against the textbook's formula, class by class, for one square."""
    model = random_model(SMALL)
    (probe,) = fit_probes(model, GAMES, layers=[1], ridge=0.0)
    batch = labelled_activations(model, GAMES, [1], [MINE])
    x, labels = batch.resid[0], batch.labels[0][:, 2, 3]
    means = torch.stack([x[labels == k].mean(0) for k in range(3)])
    within = (x - means[labels]).T @ (x - means[labels]) / len(x)
    shares = (torch.bincount(labels, minlength=3) + 0.5) / (len(x) + 1.5)
    W = torch.linalg.solve(within, means.T)
    logits = x @ W - (means.T * W).sum(0) / 2 + shares.log()
    expected = logits - logits[:, :1]
    found = probe.logits(x)[:, 2, 3]

    torch.testing.assert_close(found - found[:, :1], expected, rtol=1e-6, atol=1e-6)


def test_games_may_be_numpy_s():
    """As `board.random_games` gives them: the same probes, bit by bit."""
    for fit in (fit_probes, train_probes):
        one, other = (
            fit(random_model(SMALL), games, layers=[1]) for games in (GAMES, GAMES.numpy())
        )
        assert torch.equal(one[0].W, other[0].W)


def test_training_is_the_same_for_a_seed():
    """Bit by bit, for one layer and for two; another seed gives other probes."""
    for hidden in (None, 4):
        options = dict(layers=[1], hidden=hidden, batch_size=8)
        first, again, other = (
            train_probes(random_model(SMALL), GAMES, seed=seed, **options) for seed in (0, 0, 1)
        )
        assert torch.equal(first[0].W, again[0].W)
        assert not torch.equal(first[0].W, other[0].W)


def test_a_first_step_of_nothing_leaves_the_discriminant():
    """Whitening folded in and out again: with a learning rate of zero, probes of one layer and of two are the
    closed form, where there are two hidden units a dimension.
    """
    model = random_model(SMALL)
    quarter = GAMES[torch.randperm(8, generator=seeded())[:2]]
    resid = labelled_activations(model, GAMES[:2], [1], [MINE]).resid[0]
    for hidden, games in ((None, quarter), (32, GAMES[:8]), (41, GAMES[:8])):
        (fitted,) = fit_probes(model, games, layers=[1])
        options = dict(layers=[1], lr=0.0, batch_size=8, hidden=hidden)
        (trained,) = train_probes(model, GAMES[:8], **options)
        torch.testing.assert_close(
            trained.logits(resid), fitted.logits(resid), rtol=1e-5, atol=1e-5
        )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_target_of_ones_own_is_learnt():
    """A function of the record: whether the square has ever been played, easy on the packaged model."""
    model = OthelloGPT.from_pretrained()
    taken = Target("taken", ("no", "yes"), lambda record: record.state != 0)
    games = torch.from_numpy(board.random_games(60, seed=5))
    probes = fit_probes(model, games[:48], targets=[taken], layers=[2])

    assert probe_accuracy(model, probes, games[48:], targets=[taken]).by_layer.item() > 0.97


def test_wrong_games_layers_and_activations_are_refused():
    """No games, positions, epochs or hidden units, a layer that is not there, activations that are not finite."""
    model = random_model(SMALL)
    for fit in (fit_probes, train_probes):
        with pytest.raises(ValueError, match="holds no games: give at least one"):
            fit(model, GAMES[:0])
        with pytest.raises(ValueError, match=r"`layers` is \[2\], but the model has layers 0 to 1"):
            fit(model, GAMES, layers=[2])
        with pytest.raises(
            ValueError, match="no game has a position there from which somebody moves"
        ):
            fit(model, GAMES, positions=slice(70, 80))
    with pytest.raises(ValueError, match="`epochs` is 0: give 1 or more"):
        train_probes(model, GAMES, epochs=0)
    with pytest.raises(ValueError, match="`hidden` is 0: give 1 or more"):
        train_probes(model, GAMES, hidden=0)
    with torch.no_grad():
        model.blocks[1].mlp.b_out[0] = torch.nan
    with pytest.raises(
        ValueError, match="after layer 1 are not finite after the moves [A-H][0-7]: look for NaN"
    ):
        fit_probes(model, GAMES)


def test_the_moves_are_told_after_which_activations_are_not_finite():
    """Whatever the batch: here those of game 7, the only one to open so."""
    model, squares = random_model(SMALL), torch.full((9, 3), -1)
    squares[:, 0] = 19
    squares[7, :2] = torch.tensor([19, 18])
    with torch.no_grad():
        model.W_E[square_to_token(18)] = torch.nan
    with pytest.raises(ValueError, match="not finite after the moves C3 C2: look"):
        fit_probes(model, squares, batch_size=2)


@pytest.mark.usefixtures("unchecked")
def test_one_game_needs_its_axis():
    """As a row of its own."""
    model = random_model(SMALL)
    for take in (
        lambda game: fit_probes(model, game),
        lambda game: train_probes(model, game),
        lambda game: majority_baseline(model, GAMES, game),
        lambda game: probe_accuracy(model, fit_probes(model, GAMES[:2]), game),
    ):
        with pytest.raises(ValueError, match=r"of shape \(60,\), but .* as `squares\[None\]`"):
            take(GAMES[0])


@pytest.mark.slow
def test_two_ranks_fit_what_one_process_fits(tmp_path):
    """Games shared out by rank, an odd number of them: equal to float noise, and on both ranks the same."""
    alone = _fitted()
    mp.spawn(_fit_on_rank, args=(2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def _fit_on_rank(rank: int, n_ranks: int, folder) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=n_ranks)
    torch.save(_fitted(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _fitted() -> list[torch.Tensor]:
    model = random_model(SMALL)
    trained = train_probes(model, GAMES[:17], hidden=3, batch_size=8)
    linear = [*fit_probes(model, GAMES[:17]), *train_probes(model, GAMES[:17], batch_size=8)]
    return [tensor for probe in (*trained, *linear) for tensor in probe.tensors().values()]


@pytest.mark.slow
def test_probes_are_fitted_on_several_threads():
    """In a process of its own, for what it guards against is a solver that never comes back."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from interp.probes import fit_probes, train_probes\n"
        "from othello_gpt import OthelloGPT, board\n"
        "model, games = OthelloGPT.from_pretrained(), board.random_games(8, 3)\n"
        "for fit in (fit_probes, train_probes):\n"
        "    assert all(probe.W.isfinite().all() for probe in fit(model, games))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
