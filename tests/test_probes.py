"""Probes: formats, directions, training on the mover's labels, accuracy."""

import numpy as np
import pytest
import torch
from model_strategies import random_model

from interp import probes as module
from interp.probes import LinearProbe, probe_accuracy, save_probes, train_probes
from othello_gpt import GPTConfig, OthelloGPT, board

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, d_mlp=16)


def test_three_modes_become_mine_and_theirs(tmp_path):
    """Black-to-play and white-to-play probes averaged, colours exchanged in the second."""
    modes = torch.randn(3, 16, 8, 8, 3)
    torch.save(modes.requires_grad_(), tmp_path / "main_linear_probe.pth")
    probe = LinearProbe.load(tmp_path / "main_linear_probe.pth")
    black, white = modes.detach()[0], modes.detach()[1]
    mine = (black[..., 2] + white[..., 1]) / 2
    theirs = (black[..., 1] + white[..., 2]) / 2
    empty = (black[..., 0] + white[..., 0]) / 2

    assert (probe.layer, probe.classes, probe.space) == (6, ("empty", "theirs", "mine"), "centred")
    assert torch.allclose(probe.mine, mine - theirs, atol=1e-6)
    assert torch.allclose(probe.blank, empty - (mine + theirs) / 2, atol=1e-6)
    assert not probe.W.requires_grad


def test_one_mode_files_say_their_layer(tmp_path):
    """Per-layer and flipped probes; without a layer in the name it must be given."""
    for name, n_classes, classes in (
        ("resid_4_linear.pth", 3, ("empty", "theirs", "mine")),
        ("resid_2_flipped.pth", 2, ("flipped", "not flipped")),
    ):
        stored = torch.randn(1, 16, 8, 8, n_classes)
        torch.save(stored, tmp_path / name)
        probe = LinearProbe.load(tmp_path / name)
        assert (probe.layer, probe.classes) == (int(name[6]), classes)
        assert torch.equal(probe.W, stored[0])
    with pytest.raises(ValueError, match="Directions of blank and mine need a probe of empty"):
        _ = probe.mine
    torch.save(stored, tmp_path / "probe.pth")
    with pytest.raises(ValueError, match="does not say which layer it reads: give `layer=`"):
        LinearProbe.load(tmp_path / "probe.pth")


def test_projections_are_read_square_by_square(tmp_path):
    """Rows are square * 3 + class; layer l there is after l blocks; trained on the raw stream."""
    (tmp_path / "layer5").mkdir()
    path = tmp_path / "layer5" / "checkpoint.ckpt"
    weight, bias = torch.randn(192, 16), torch.randn(192)
    torch.save({"proj.weight": weight, "proj.bias": bias}, path)
    resid = torch.randn(4, 16)
    expected = (resid @ weight.T + bias).reshape(4, 8, 8, 3)
    li = LinearProbe.load(path)
    new = LinearProbe.load(path, classes=("mine", "empty", "theirs"))

    assert (li.layer, li.space, li.classes) == (4, "raw", ("empty", "white", "black"))
    assert torch.allclose(li.logits(resid), expected[..., [1, 0, 2]], atol=1e-5)
    assert torch.allclose(new.logits(resid), expected[..., [1, 2, 0]], atol=1e-5)
    with pytest.raises(ValueError, match="give the file's order of"):
        LinearProbe.load(path, classes=("a", "b", "c"))
    torch.save({"proj.0.weight": weight}, path)
    with pytest.raises(ValueError, match="two-layer probe .* is not linear"):
        LinearProbe.load(path)
    torch.save(torch.zeros(3, 3), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds a tensor of shape \(3, 3\)"):
        LinearProbe.load(tmp_path / "x.pth")


def test_saved_probes_come_back(tmp_path):
    """Bit by bit, by layer, with their metadata."""
    made = [
        LinearProbe(torch.randn(16, 8, 8, 3), torch.randn(8, 8, 3), layer, space="raw")
        for layer in (0, 3)
    ]
    save_probes(made, tmp_path / "probes.safetensors")
    loaded = LinearProbe.load(tmp_path / "probes.safetensors", layer=3)

    assert torch.equal(loaded.W, made[1].W)
    assert torch.equal(loaded.b, made[1].b)
    assert (loaded.layer, loaded.space) == (3, "raw")
    assert [p.layer for p in LinearProbe.load_all(tmp_path / "probes.safetensors")] == [0, 3]
    with pytest.raises(ValueError, match=r"holds probes of layers \[0, 3\], not of layer 1"):
        LinearProbe.load(tmp_path / "probes.safetensors", layer=1)


def test_normalised_directions_have_unit_length_and_no_blank_centre():
    """Over d_model, square by square."""
    probe = LinearProbe(torch.randn(16, 8, 8, 3), torch.zeros(8, 8, 3), 0)
    blank, mine = probe.normalised()
    norms = blank.norm(dim=0)

    assert torch.allclose(mine.norm(dim=0), torch.ones(8, 8))
    assert (norms[3:5, 3:5] == 0).all()
    assert norms.sum().item() == pytest.approx(60)
    assert torch.allclose(blank[:, 0, 0] * probe.blank[:, 0, 0].norm(), probe.blank[:, 0, 0])


@pytest.mark.usefixtures("unchecked")  # a hundred small batches, each played afresh
def test_training_recovers_a_planted_code(monkeypatch):
    """Activations in which each square's class is written along a direction of its own, read back.

    A column that reads another square, or classes in another order, would point elsewhere.
    """
    generator = torch.Generator().manual_seed(0)
    d_model, n_pos = PLANTED.d_model, PLANTED.n_ctx
    code = torch.linalg.qr(torch.randn(d_model, 128, generator=generator)).Q  # [d_model, direction]

    def planted(model, squares, layers):
        record = board.play(squares.numpy())
        relative = torch.from_numpy(board.relative_state(record)[:, :n_pos]).float()
        valid = torch.from_numpy(record.to_move[:, :n_pos] != 0)
        signs = torch.cat([relative.flatten(2), (relative == 0).float().flatten(2)], -1)
        labels = torch.from_numpy(board.piece_classes(record)[:, :n_pos]).long()
        return (8 * signs @ code.T)[valid][None], labels[valid]

    monkeypatch.setattr(module, "_labelled_activations", planted)
    squares = torch.from_numpy(board.random_games(400, seed=1))
    (probe,) = train_probes(random_model(PLANTED), squares, layers=[0], lr=0.03, batch_size=4)
    held_out = torch.from_numpy(board.random_games(40, seed=2))
    accuracy = probe_accuracy(random_model(PLANTED), [probe], held_out)

    planted_mine = code[:, :64].reshape(d_model, 8, 8)
    in_code = torch.einsum("drc,dk->krc", probe.mine, code)
    cosines = torch.cosine_similarity(
        in_code, torch.einsum("drc,dk->krc", planted_mine, code), dim=0
    )
    assert accuracy.by_layer.item() > 0.995
    assert cosines.min() > 0.85


PLANTED = GPTConfig(n_layers=1, d_model=200, n_heads=1, d_head=4, d_mlp=4)


def test_training_is_the_same_for_a_seed_and_beats_no_information():
    """On the packaged model a few games already read most squares right."""
    model = OthelloGPT.from_pretrained()
    train, held_out = (
        torch.from_numpy(board.random_games(n, seed=s)) for n, s in ((48, 3), (12, 4))
    )
    first, second = (train_probes(model, train, layers=[5], batch_size=8) for _ in range(2))

    assert torch.equal(first[0].W, second[0].W)
    accuracy = probe_accuracy(model, first, held_out)
    assert accuracy.by_layer.item() > 0.65  # the majority class of each ply and square reads 62 %
    assert accuracy.by_pos.shape == (1, 59)
    assert accuracy.by_square.mean().item() == pytest.approx(accuracy.by_layer.item(), abs=1e-6)


def test_the_packaged_probes_read_the_board():
    """Best in the middle, at least 92 % there, above the first and the last layer."""
    probes = LinearProbe.load_all(packaged_path())
    held_out = torch.from_numpy(board.random_games(40, seed=555))
    accuracy = probe_accuracy(OthelloGPT.from_pretrained(), probes, held_out).by_layer

    assert [probe.layer for probe in probes] == list(range(8))
    assert accuracy.max() > 0.915
    assert accuracy.argmax() in (3, 4, 5)
    assert accuracy[4] > max(accuracy[0], accuracy[7])
    with pytest.raises(ValueError, match="accuracy is counted for probes whose classes are"):
        probe_accuracy(
            OthelloGPT(), [LinearProbe(probes[0].W, probes[0].b, 0, ("a", "b", "c"))], held_out
        )


def packaged_path():
    from importlib import resources
    from pathlib import Path

    return Path(str(resources.files("othello_gpt"))) / "assets" / "small" / "probes.safetensors"


def test_labels_follow_the_mover_through_a_forfeit():
    """Positions after a forfeit are labelled by who really moves next."""
    squares = board.random_games(50, seed=0)
    record = board.play(squares)
    labels, valid = module._labels(torch.from_numpy(squares), 59)
    same_side_again = (record.mover[:, 1:59] == record.mover[:, :58]) & (record.mover[:, 1:59] != 0)

    assert same_side_again.any()
    for game, ply in np.argwhere(same_side_again)[:10]:
        mine = record.state[game, ply] == record.mover[game, ply + 1]
        assert np.array_equal(labels[game, ply].numpy() == 2, mine)
    assert torch.equal(valid, torch.from_numpy(record.to_move[:, :59] != 0))
