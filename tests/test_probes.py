"""Probes themselves: published formats, directions, files, and what they may read."""

from dataclasses import replace

import pytest
import torch
from model_strategies import random_model
from safetensors.torch import save_file

from interp.probe_types import check_reads, stream_space
from interp.probes import LinearProbe, Probe, TwoLayerProbe, save_probes
from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.weights import fold

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
    torch.save({"proj.weight": weight}, path)
    with pytest.raises(
        ValueError, match="a linear probe has `proj.weight` .* proj.bias is missing"
    ):
        LinearProbe.load(path)
    torch.save(torch.zeros(3, 3), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds a tensor of shape \(3, 3\)"):
        LinearProbe.load(tmp_path / "x.pth")


def test_two_layer_probes_are_read_too(tmp_path):
    """Li's nonlinear probes: a ReLU between two matrices; they have no directions."""
    path = tmp_path / "layer8.ckpt"
    first, last = torch.nn.Linear(16, 5), torch.nn.Linear(5, 192)
    parts = {"0": first, "2": last}
    torch.save(
        {f"proj.{i}.{k}": v for i, part in parts.items() for k, v in part.state_dict().items()},
        path,
    )
    resid = torch.randn(4, 16)
    expected = last(first(resid).relu()).view(4, 8, 8, 3)[..., [1, 0, 2]]
    probe = Probe.load(path)

    assert isinstance(probe, TwoLayerProbe)
    assert (probe.layer, probe.space, probe.target) == (7, "raw", "black")
    assert torch.allclose(probe.logits(resid), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no directions. Use `TwoLayerProbe.load`"):
        LinearProbe.load(path)


def test_published_files_of_other_shapes_are_refused(tmp_path):
    """Other boards, rows that are no squares and classes, layers that do not fit each other."""
    path = tmp_path / "layer3.ckpt"
    one = {"proj.weight": (192, 16), "proj.bias": (192,)}
    two = {"proj.0.weight": (5, 16), "proj.0.bias": (5,), "proj.2.weight": (192, 5)}
    two["proj.2.bias"] = (192,)
    for shapes in (one, two):
        torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, path)
        assert Probe.load(path).layer == 2
    for shapes, name, shape in (
        (one, "proj.weight", (256, 16)),
        (one, "proj.weight", (100, 16)),
        (one, "proj.weight", ()),
        (one, "proj.bias", (128,)),
        (two, "proj.0.bias", (7,)),
        (two, "proj.0.weight", (6, 16)),
        (two, "proj.2.weight", (192, 9)),
    ):
        wrong = shapes | {name: shape}
        torch.save({name: torch.ones(shape) for name, shape in wrong.items()}, path)
        with pytest.raises(
            ValueError, match=r"of shape .*, but .* was expected: the last rows are"
        ):
            Probe.load(path)
    torch.save(torch.ones(3, 16, 4, 5, 3), path)
    with pytest.raises(ValueError, match=r"of shape \(3, 16, 4, 5, 3\). Published probes are"):
        Probe.load(path)


def test_a_name_says_whose_classes_a_file_has(tmp_path):
    """Hazineh's new map is of mine and theirs, the old one of the colours."""
    stored = {"proj.weight": torch.randn(192, 16), "proj.bias": torch.randn(192)}
    for name, order in (("New", ("mine", "empty", "theirs")), ("old", ("white", "empty", "black"))):
        path = tmp_path / f"linearProbe_Map_{name}_8L8H_GPT_Layer7.ckpt"
        torch.save(stored, path)
        loaded, told = LinearProbe.load(path), LinearProbe.load(path, classes=order)
        assert (loaded.layer, loaded.target) == (6, "mine" if name == "New" else "black")
        assert loaded.classes == told.classes
        assert torch.equal(loaded.W, told.W)


def test_one_mode_of_three_can_be_read_as_it_is(tmp_path):
    """Absolute colours, in the file's order."""
    modes = torch.randn(3, 16, 8, 8, 3)
    torch.save(modes, tmp_path / "main_linear_probe.pth")
    probe = LinearProbe.load(tmp_path / "main_linear_probe.pth", mode="white to play")

    assert torch.equal(probe.W, modes[1])
    assert probe.target == "black"
    assert torch.equal(probe.direction("black", "white"), modes[1, ..., 2] - modes[1, ..., 1])
    with pytest.raises(ValueError, match="must be one of black to play, white to play, all"):
        LinearProbe.load(tmp_path / "main_linear_probe.pth", mode="odd")


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
    with pytest.raises(ValueError, match="a file holds one kind: same type, target, classes"):
        save_probes([made[0], replace(made[1], target="black")], tmp_path / "probes.safetensors")
    with pytest.raises(ValueError, match=r"of layers \[0, 0\], but a file holds one kind"):
        save_probes([made[0], made[0]], tmp_path / "probes.safetensors")


def test_probes_are_saved_as_they_are_where_they_are_found_again(tmp_path):
    """In float64 as in float32, halves as float32; under a name by which they are known."""
    probe = LinearProbe(torch.randn(16, 8, 8, 3), torch.randn(8, 8, 3), 0)
    dtypes = {torch.float64: torch.float64, torch.float32: torch.float32, torch.half: torch.float32}
    for stored, loaded in dtypes.items():
        save_probes([probe.to(stored)], tmp_path / "probes.safetensors")
        found = LinearProbe.load(tmp_path / "probes.safetensors")
        assert torch.equal(found.W, probe.W.to(stored).to(loaded))
        assert found.W.dtype == loaded
    with pytest.raises(ValueError, match="probes.pt' does not end in .safetensors"):
        save_probes([probe], tmp_path / "probes.pt")


def test_saved_two_layer_probes_come_back(tmp_path):
    """Both layers and the target's name."""
    hidden = torch.randn(16, 5), torch.randn(5)
    probe = TwoLayerProbe(*hidden, torch.randn(5, 8, 8, 2), torch.randn(8, 8, 2), 4, ("a", "b"))
    save_probes([replace(probe, target="own")], tmp_path / "probes.safetensors")
    loaded = Probe.load(tmp_path / "probes.safetensors")

    assert isinstance(loaded, TwoLayerProbe)
    assert loaded.tensors().keys() == probe.tensors().keys()
    assert all(torch.equal(loaded.tensors()[name], probe.tensors()[name]) for name in ["W", "b"])
    assert (loaded.target, loaded.classes, loaded.layer) == ("own", ("a", "b"), 4)


def test_normalised_directions_have_unit_length_and_no_blank_centre():
    """Over d_model, square by square."""
    probe = LinearProbe(torch.randn(16, 8, 8, 3), torch.zeros(8, 8, 3), 0)
    blank, mine = probe.normalised()
    norms = blank.norm(dim=0)

    assert torch.allclose(mine.norm(dim=0), torch.ones(8, 8))
    assert (norms[3:5, 3:5] == 0).all()
    assert norms.sum().item() == pytest.approx(60)
    assert torch.allclose(blank[:, 0, 0] * probe.blank[:, 0, 0].norm(), probe.blank[:, 0, 0])


def test_a_probe_reads_only_the_stream_that_it_was_made_for():
    """Another width or dtype, a layer that is not there, the raw stream in place of the centred one."""
    raw = random_model(SMALL)
    weights, _ = fold(raw.state_dict())
    centred = OthelloGPT(SMALL).double()
    centred.load_state_dict(weights)
    probe = LinearProbe(torch.randn(8, 8, 8, 3), torch.zeros(8, 8, 3), layer=1).to(torch.float64)

    assert (stream_space(raw), stream_space(centred)) == ("raw", "centred")
    assert stream_space(OthelloGPT.from_pretrained()) == "centred"
    check_reads([probe], centred)
    check_reads([replace(probe, space="raw")], raw)
    for wrong, model, message in (
        (
            replace(probe, W=torch.randn(9, 8, 8, 3).double()),
            centred,
            "reads 9 dimensions, but .* has 8",
        ),
        (replace(probe, layer=2), centred, "reads layer 2, but the model has layers 0 to 1"),
        (probe.to(torch.float32), centred, r"give `probe.to\(torch.float64\)`"),
        (probe, raw, "reads the centred residual stream, but this model's is raw. Load the model"),
    ):
        with pytest.raises(ValueError, match=message):
            check_reads([wrong], model)


def test_options_that_say_nothing_of_a_file_are_refused(tmp_path):
    """Each where its kind of file has no use for it."""
    own, one, projection = (
        tmp_path / name for name in ("own.safetensors", "resid_3.pth", "layer2")
    )
    save_probes([LinearProbe(torch.randn(16, 8, 8, 3), torch.randn(8, 8, 3), 4)], own)
    torch.save(torch.randn(1, 16, 8, 8, 3), one)
    torch.save({"proj.weight": torch.randn(192, 16), "proj.bias": torch.randn(192)}, projection)
    for path, name, value in (
        (own, "mode", "banana"),
        (own, "classes", ("x", "y")),
        (one, "classes", ("mine", "empty", "theirs")),
        (projection, "mode", "all"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` says nothing of '.*{path.name}'"):
            LinearProbe.load(path, **{name: value})


def test_files_that_hold_no_probes_are_refused(tmp_path):
    """Text, a pickled list, and tensors that `save_probes` did not write."""
    text, listed, weights = (tmp_path / name for name in ("a.pth", "b.pth", "c.safetensors"))
    text.write_text("no probe at all\n")
    torch.save([1, 2], listed)
    save_file({"W": torch.ones(1)}, weights)
    for path, message in (
        (text, "is no file that `torch.save` wrote"),
        (listed, "holds a list. Published probes are tensors or dicts"),
        (weights, "is no file of probes, for its metadata lacks classes, layers, space"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearProbe.load(path)
    with pytest.raises(ValueError, match="is no file of probes"):
        LinearProbe.load_all(weights)


def test_a_file_s_name_says_its_layer_before_its_folder_s(tmp_path):
    """The folder's number may be the model's size."""
    (tmp_path / "layer8_model").mkdir()
    torch.save(torch.randn(1, 16, 8, 8, 3), tmp_path / "layer8_model" / "resid_3_linear.pth")

    assert LinearProbe.load(tmp_path / "layer8_model" / "resid_3_linear.pth").layer == 3
