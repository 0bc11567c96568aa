"""Checkpoints: conversion against the reference, folding that moves nothing, and every way to be wrong."""

import hashlib
import os
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from model_strategies import models, random_model, token_batches
from reference_model import ROOT_NAMES, fixture_model, load_fixture
from safetensors.torch import save_file

from othello_gpt import GPTConfig, OthelloGPT, board
from othello_gpt.games import games_to_tokens
from othello_gpt.weights import (
    WeightsError,
    convert,
    detect_layout,
    find_file,
    fold,
    fold_layer_norm,
    load_pretrained,
    read_state_dict,
    save_pretrained,
    to_transformer_lens,
)

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, d_mlp=16)


def with_weights(model: OthelloGPT, state_dict: dict) -> OthelloGPT:
    other = OthelloGPT(model.cfg).to(model.dtype)
    other.load_state_dict(state_dict)
    return other


def to_mingpt(model: OthelloGPT) -> dict[str, torch.Tensor]:
    """The model under minGPT's names, written out by hand; its head has no bias."""
    theirs = {"tok_emb.weight": model.W_E, "pos_emb": model.W_pos[None], "head.weight": model.W_U.T}
    theirs |= {"ln_f.weight": model.ln_final.w, "ln_f.bias": model.ln_final.b}
    for i, block in enumerate(model.blocks):
        attn, mlp, at = block.attn, block.mlp, f"module.blocks.{i}"
        for name, W, b in (
            ("query", attn.W_Q, attn.b_Q),
            ("key", attn.W_K, attn.b_K),
            ("value", attn.W_V, attn.b_V),
        ):
            theirs[f"{at}.attn.{name}.weight"] = torch.cat([head.T for head in W])
            theirs[f"{at}.attn.{name}.bias"] = b.flatten()
        theirs[f"{at}.attn.proj.weight"] = torch.cat([head.T for head in attn.W_O], 1)
        theirs[f"{at}.attn.proj.bias"] = attn.b_O
        theirs[f"{at}.attn.mask"] = torch.ones(1, 1, 59, 59)
        for ln in ("ln1", "ln2"):
            theirs[f"{at}.{ln}.weight"] = getattr(block, ln).w
            theirs[f"{at}.{ln}.bias"] = getattr(block, ln).b
        theirs[f"{at}.mlp.0.weight"], theirs[f"{at}.mlp.0.bias"] = mlp.W_in.T, mlp.b_in
        theirs[f"{at}.mlp.2.weight"], theirs[f"{at}.mlp.2.bias"] = mlp.W_out.T, mlp.b_out
    return {name: tensor.detach() for name, tensor in theirs.items()}


@pytest.mark.parametrize("stage", ["folded", "processed"])
def test_folding_gives_the_weights_of_the_reference(stage):
    """LayerNorm alone, and all of TransformerLens's processing."""
    fixture, ours = load_fixture(), fixture_model(torch.float64).state_dict()
    ours = fold_layer_norm(ours) if stage == "folded" else fold(ours)[0]
    keys = [key for key in fixture if key.startswith(f"{stage}_sd/")]

    assert len(keys) == 40
    for key in keys:
        name = key.removeprefix(f"{stage}_sd/")
        found, expected = ours[ROOT_NAMES.get(name, name)], fixture[key].double()
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, key
    logits = with_weights(fixture_model(torch.float64), ours)(fixture["tokens"])
    assert (logits - fixture[f"{stage}_logits"]).abs().max() < 1e-4


@given(models(), token_batches())
def test_folding_moves_no_log_probability(model, tokens):
    """In float64 to 1e-10; folding twice equals folding once."""
    state_dict, report = fold(model.state_dict())
    twice, again = fold(state_dict)
    log_probs = model(tokens).log_softmax(-1)

    assert (with_weights(model, state_dict)(tokens).log_softmax(-1) - log_probs).abs().max() < 1e-10
    assert max(step.largest_change for step in again.steps) < 1e-12
    assert {step.name for step in report.steps} >= {"fold_layer_norm", "center_unembed"}
    assert all(torch.allclose(twice[name], state_dict[name], atol=1e-12) for name in twice)


@given(models())
def test_folded_weights_have_nothing_left_to_remove(model):
    """What writes has no mean over d_model, what reads none either, and LayerNorm is the identity."""
    folded = with_weights(model, fold(model.state_dict())[0])

    for W in (
        folded.W_E,
        folded.W_pos,
        folded.W_O,
        folded.b_O,
        folded.W_out,
        folded.b_out,
        folded.W_U,
    ):
        assert W.mean(-1).abs().max() < 1e-12
    for W in (folded.W_Q, folded.W_K, folded.W_V, folded.W_in, folded.W_U):
        assert W.mean(-2).abs().max() < 1e-12
    assert folded.b_V.abs().max() == 0
    assert all((block.ln1.w == 1).all() and (block.ln2.b == 0).all() for block in folded.blocks)


def test_all_layouts_hold_the_same_model():
    """There and back through minGPT's and TransformerLens's names, bit by bit."""
    model = random_model(SMALL)
    with torch.no_grad():
        model.b_U.zero_()
    layouts = {
        "mingpt": to_mingpt(model),
        "transformer_lens": to_transformer_lens(model)
        | {"blocks.0.attn.mask": torch.ones(59, 59), "blocks.0.attn.IGNORE": torch.tensor(-1e5)},
        "othello_gpt": model.state_dict(),
    }

    for layout, stored in layouts.items():
        bare = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
        assert detect_layout(bare) == layout
        cfg, ours = convert(stored, n_heads=2)
        assert cfg == SMALL
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_transformer_lens_finds_all_its_names():
    """The buffers too, without which its `load_state_dict` refuses a dictionary."""
    theirs = {key.removeprefix("sd/") for key in load_fixture() if key.startswith("sd/")}

    assert set(to_transformer_lens(fixture_model())) == theirs


def test_a_folded_transformer_lens_file_gets_identity_layer_norms():
    """The published files have no LayerNorm parameters."""
    state_dict = fold(random_model(SMALL).state_dict())[0]
    folded = with_weights(random_model(SMALL), state_dict)
    stored = {k: v for k, v in to_transformer_lens(folded).items() if "ln" not in k}
    _, ours = convert(stored)

    assert all(torch.equal(ours[name], tensor) for name, tensor in state_dict.items())


@given(models())
def test_saving_and_loading_changes_no_bit(tmp_path_factory, model):
    """Of weights, sizes (the LayerNorm's eps too) or dtype, when loading is told not to fold."""
    folder = tmp_path_factory.mktemp("model")
    model = with_weights(OthelloGPT(replace(model.cfg, eps=1e-6)).double(), model.state_dict())
    save_pretrained(model, folder)
    loaded = load_pretrained(folder, fold=False, dtype=torch.float64)

    assert loaded.cfg == model.cfg
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_the_packaged_model_knows_the_rules():
    """Under 2 % of its best moves are illegal on random games (0.7 % measured), folded or not."""
    from othello_gpt.evaluate import legal_tokens

    games = board.random_games(40, seed=77)
    tokens = games_to_tokens(games)
    legal, live = legal_tokens(games)
    model, raw = load_pretrained(), load_pretrained(fold=False)
    with torch.no_grad():
        log_probs, raw_log_probs = model(tokens).log_softmax(-1), raw(tokens).log_softmax(-1)
    illegal = ~legal.gather(-1, log_probs.argmax(-1, keepdim=True))[..., 0]

    assert illegal[live].float().mean() < 0.02
    assert (log_probs - raw_log_probs).abs().max() < 1e-3
    assert not model.training


def test_everything_wrong_with_a_checkpoint_is_listed_at_once():
    """Missing, extra, misshapen, not finite, not floating."""
    stored = to_transformer_lens(random_model(SMALL))
    del stored["blocks.1.mlp.b_in"]
    stored["extra"] = torch.zeros(2)
    stored["unembed.b_U"] = torch.zeros(7)
    stored["pos_embed.W_pos"][3, 3] = torch.nan
    stored["blocks.0.ln1.b"] = torch.zeros(8, dtype=torch.long)

    with pytest.raises(WeightsError) as caught:
        convert(stored)
    for part in (
        r"missing: blocks.1.mlp.b_in (16,)",
        r"not expected: extra (2,)",
        r"b_U: (7,), expected (61,)",
        r"W_pos: holds nan or infinity",
        r"blocks.0.ln1.b: torch.int64, expected floating point",
    ):
        assert part in str(caught.value)


def test_heads_that_do_not_divide_are_an_error():
    """The minGPT layout does not say how many there are; nor do tensors of other axes say any size."""
    for n_heads in (3, 0, -2):
        with pytest.raises(WeightsError, match=f"{n_heads} heads do not divide.*give `n_heads=`"):
            convert(to_mingpt(random_model(SMALL)), n_heads)
    ours = dict(random_model(SMALL).state_dict())
    for n_heads in (3, 0):
        with pytest.raises(
            WeightsError, match=f"`n_heads` is {n_heads}, but .* has 8 .* leave it out"
        ):
            load_pretrained(n_heads=n_heads)
    for name, wrong in (
        ("W_E", (1, 2, 3)),
        ("blocks.0.attn.W_Q", (8, 8)),
        ("blocks.0.mlp.W_in", (8,)),
    ):
        with pytest.raises(WeightsError, match=f"sizes are unknown.*{name}"):
            convert(ours | {name: torch.zeros(wrong)})
    with pytest.raises(WeightsError, match="not expected: blocks.foo"):
        convert(ours | {"blocks.foo": torch.zeros(1)})
    with pytest.raises(WeightsError, match="has no token embedding under"):
        convert({"wte": torch.zeros(1)})


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.pth", b"<!DOCTYPE html><html>", "it is a web page"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("m.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "damaged or cut short"),
        (
            "m.pth",
            pickle.dumps(Evil()),
            "no safetensors file, nor a pickle that holds nothing but tensors",
        ),
    ],
)
def test_files_that_are_no_weights_say_what_they_are(tmp_path, capsys, name, content, message):
    """And no code of theirs runs."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(WeightsError, match=message) as caught:
        read_state_dict(tmp_path / name)
    assert "weights_only=False" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_cut_file_is_an_error(tmp_path):
    """Of both formats."""
    model = random_model(SMALL)
    torch.save(to_transformer_lens(model), tmp_path / "m.pth")
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "m.safetensors"
    )
    for name in ("m.pth", "m.safetensors"):
        assert load_pretrained(tmp_path / name, fold=False, dtype=torch.float64).cfg == SMALL
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(WeightsError, match="damaged or cut short"):
            load_pretrained(tmp_path / name)


def test_sources_and_configs_that_cannot_be_are_named(tmp_path):
    """A path that is not there, a folder without weights, keys that nobody knows, sizes that disagree."""
    save_pretrained(random_model(SMALL), tmp_path / "model")
    config = tmp_path / "model" / "config.json"

    with pytest.raises(
        WeightsError, match="no file and no folder here, nor a repository of the hub"
    ):
        load_pretrained(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="is a file itself: leave out `filename=`"):
        load_pretrained(tmp_path / "model" / "model.safetensors", filename="other.pth")
    for name in ("", "model.safetensors"):
        with pytest.raises(WeightsError, match="has no revisions: leave out `revision=`"):
            load_pretrained(tmp_path / "model" / name, revision="main")
    with pytest.raises(WeightsError, match="has no model.safetensors"):
        load_pretrained(tmp_path)
    config.write_text(config.read_text().replace("n_layers", "n_leyers"))
    with pytest.raises(WeightsError, match="unknown keys: n_leyers"):
        load_pretrained(tmp_path / "model")
    config.write_text('{"n_layers": 5}')
    with pytest.raises(WeightsError, match="config.json beside"):
        load_pretrained(tmp_path / "model")
    for content, message in (
        ("[1]", r"config.json' holds \[1\], not an object of sizes by their names"),
        ("3", "config.json' holds 3, not an object"),
        ('{"d_model": "16"}', "`d_model` is '16', but must be a number, whole"),
        ('{"n_layers": 1.5}', "`n_layers` is 1.5, but must be a number, whole"),
        ('{"d_model": 0}', "`d_model` is 0. Every size of a model must be positive"),
    ):
        config.write_text(content)
        with pytest.raises(WeightsError, match=message):
            load_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="has sha256 .* expected 00.* Fetch it again"):
        load_pretrained(tmp_path / "model" / "model.safetensors", sha256="00")


def test_a_wrong_hash_leaves_files_of_ones_own(tmp_path):
    """Also in a folder named as those of the hub's cache are."""
    folder = tmp_path / "snapshots" / "run"
    save_pretrained(random_model(SMALL), folder)

    with pytest.raises(WeightsError, match="Fetch it again"):
        load_pretrained(folder, sha256="00")
    assert load_pretrained(folder).cfg == SMALL


def test_shards_hold_the_same_model_and_replace_what_was_there(tmp_path):
    """As on the hub: an index and files of at most so many bytes; saved again whole, they are gone."""
    model = random_model(SMALL)
    save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, shard_bytes=2500)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    loaded = load_pretrained(tmp_path, fold=False, dtype=torch.float64)

    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    joined = hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    load_pretrained(tmp_path, sha256=joined)
    with pytest.raises(WeightsError, match="expected 00"):
        load_pretrained(tmp_path, sha256="00")
    shards[1].unlink()
    with pytest.raises(WeightsError, match=f"lists {shards[1].name}, which is not beside it"):
        load_pretrained(tmp_path)
    save_pretrained(model, tmp_path)
    assert not list(tmp_path.glob("model-*"))


def test_shards_of_two_models_do_not_load(tmp_path, monkeypatch):
    """A save over other shards that is broken off in the middle leaves nothing that could be taken for either."""
    save_pretrained(random_model(SMALL, 0), tmp_path, shard_bytes=2500)
    replace_file, replaced = os.replace, []

    def broken_off(partial, path):
        if len(replaced) == 2:
            raise KeyboardInterrupt
        replaced.append(path)
        replace_file(partial, path)

    monkeypatch.setattr(os, "replace", broken_off)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(random_model(SMALL, 1), tmp_path, shard_bytes=2500)
    with pytest.raises(WeightsError, match="has no model.safetensors"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"W_E": 3}}',
        '{"weight_map": {"W_E": [3]}}',
        '{"weight_map": {"W_E": "a/b"}}',
    ],
)
def test_what_is_no_index_of_shards_says_so(tmp_path, content):
    """Cut short, of another shape, or without names of files beside it."""
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(WeightsError, match="is no index of shards .* fetch it again"):
        load_pretrained(tmp_path)


def test_half_precision_is_stored_as_such(tmp_path):
    """Two bytes a number, which is all that it loses."""
    model = random_model(SMALL)
    save_pretrained(model, tmp_path, dtype=torch.float16, card="mine")
    stored = read_state_dict(tmp_path / "model.safetensors")

    assert all(torch.equal(stored[k], v.half()) for k, v in model.state_dict().items())
    assert (tmp_path / "README.md").read_text() == "mine"


def test_shipped_weights_are_found_by_name(tmp_path, monkeypatch):
    """ "small" is the default; a set that is not there says where it belongs; a folder here comes first."""
    monkeypatch.chdir(tmp_path)

    assert find_file("small") == find_file(None)
    if not find_file(None).parent.with_name("full").exists():
        with pytest.raises(WeightsError, match="copy othello_gpt/assets/full of the project"):
            find_file("full")
    save_pretrained(random_model(SMALL), "full")
    assert load_pretrained("full").cfg == SMALL
