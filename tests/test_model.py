"""The model: its mathematics against the reference, causality, and what it says to bad input."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, tiny_configs, token_batches
from reference_model import fixture_model, load_fixture

from othello_gpt import GPTConfig, OthelloGPT

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=16)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    return ((found - expected)[finite].abs().max() / expected[finite].abs().max()).item()


def test_every_activation_equals_the_reference():
    """All sites of TransformerLens 3.9 on random weights; measured 4e-7 relative at worst."""
    fixture, model = load_fixture(), fixture_model()
    logits, cache = model.run_with_cache(fixture["tokens"], model.hook_names)

    assert relative_error(logits, fixture["logits"]) < 1e-5
    expected = {key.removeprefix("act/") for key in fixture if key.startswith("act/")}
    assert set(cache) == expected
    for name in cache:
        assert relative_error(cache[name], fixture[f"act/{name}"]) < 1e-4, name


def test_logits_equal_the_reference_in_float64():
    """Rounding falls by eight orders of magnitude, a bug would not."""
    fixture = load_fixture()

    assert (
        fixture_model(torch.float64)(fixture["tokens"]) - fixture["logits64"]
    ).abs().max() < 1e-12


def test_normalized_after_weight_and_bias_is_what_transformer_lens_2_called_so():
    """`hook_normalized` changed meaning between TransformerLens 2 and 3; ours is the later one."""
    fixture, model = load_fixture(), fixture_model()
    _, cache = model.run_with_cache(fixture["tokens"])

    for key in (key for key in fixture if key.startswith("postln/")):
        name = key.removeprefix("postln/")
        norm = model.get_submodule(name.removesuffix(".hook_normalized"))
        assert relative_error(cache[name] * norm.w + norm.b, fixture[key]) < 1e-4, name


def test_edits_at_every_site_equal_the_reference():
    """Each site replaced by half of itself plus 0.01: a site that is only an alias would differ."""
    fixture, model = load_fixture(), fixture_model()

    def halve(activation, hook):
        return torch.where(activation.isfinite(), activation / 2 + 0.01, activation)

    keys = [key for key in fixture if key.startswith("edit_half/")]
    assert len(keys) == 57
    for key in keys:
        logits = model.run_with_hooks(fixture["tokens"], [(key.removeprefix("edit_half/"), halve)])
        assert relative_error(logits[:, -1], fixture[key]) < 1e-4, key


def test_gradients_equal_the_reference():
    """Of the mean loss, at every site and every parameter; at ln1 the true total of q, k and v."""
    fixture, model = load_fixture(), fixture_model()
    logits, cache = model.run_with_cache(fixture["tokens"], detach=False)
    targets = fixture["tokens"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    names = {
        key: key.split("/")[1] for key in fixture if key.split("/")[0] in ("grad", "grad_total")
    }
    grads = torch.autograd.grad(loss, [cache[name] for name in names.values()], retain_graph=True)
    loss.backward()

    assert relative_error(loss.detach(), fixture["loss"]) < 1e-6
    for key, grad in zip(names, grads, strict=True):
        assert relative_error(grad, fixture[key]) < 1e-4, key
    ours = {
        "embed.W_E": "W_E",
        "pos_embed.W_pos": "W_pos",
        "unembed.W_U": "W_U",
        "unembed.b_U": "b_U",
    }
    parameters = dict(model.named_parameters())
    for key in (key for key in fixture if key.startswith("pgrad/")):
        name = key.removeprefix("pgrad/")
        grad = parameters[ours.get(name, name)].grad
        bound = 1e-4 * fixture[key].abs().max() + 1e-8  # that of b_K is zero: softmax cancels it
        assert (grad - fixture[key]).abs().max() < bound, key


def test_a_partial_forward_gives_the_stream_that_enters_the_next_block():
    """`stop_at_layer` is exclusive and returns the residual stream; negative counts from the end."""
    fixture, model = load_fixture(), fixture_model()

    assert (
        relative_error(model(fixture["tokens"], stop_at_layer=1), fixture["stop_at_layer_1"]) < 1e-5
    )
    assert torch.equal(
        model(fixture["tokens"], stop_at_layer=-2), model(fixture["tokens"], stop_at_layer=1)
    )
    logits = model(fixture["stop_at_layer_1"], start_at_layer=1)
    assert relative_error(logits, fixture["start_at_layer_1"]) < 1e-5


@given(models(), token_batches(), st.data())
def test_a_run_can_be_cut_between_any_two_blocks(model, tokens, data):
    """Bit by bit: the second half goes on from what the first half gives; its cache has its sites only."""
    layer = data.draw(st.integers(-model.cfg.n_layers, model.cfg.n_layers))
    resid = model(tokens, stop_at_layer=layer)
    logits, cache = model.run_with_cache(resid, start_at_layer=layer)
    first = layer % model.cfg.n_layers if layer < model.cfg.n_layers else layer

    assert torch.equal(logits, model(tokens))
    assert sum(name.endswith("resid_pre") for name in cache) == model.cfg.n_layers - first
    assert "hook_embed" not in cache


@given(models(), token_batches(min_pos=2), st.data())
def test_a_move_changes_no_logits_before_it(model, tokens, data):
    """Causality: the model cannot see the future."""
    pos = data.draw(st.integers(1, tokens.shape[1] - 1))
    changed = tokens.clone()
    changed[:, pos] = (changed[:, pos] + 1) % 61

    assert torch.allclose(model(tokens)[:, :pos], model(changed)[:, :pos], rtol=0, atol=1e-12)


@given(models(), token_batches(max_batch=3))
def test_games_of_a_batch_do_not_see_each_other(model, tokens):
    """A game gives the same logits alone as in company."""
    alone = torch.cat([model(game) for game in tokens])

    assert torch.allclose(model(tokens), alone, rtol=0, atol=1e-12)


@given(models(), token_batches())
def test_the_residual_stream_is_the_sum_of_what_was_written(model, tokens):
    """embed + pos_embed + every attn_out and mlp_out; each head's result adds up to attn_out."""
    _, cache = model.run_with_cache(tokens, model.hook_names)
    stream = cache["embed"] + cache["pos_embed"]

    for layer in range(model.cfg.n_layers):
        attn_out = cache["result", layer].sum(2) + model.b_O[layer]
        assert torch.allclose(attn_out, cache["attn_out", layer], rtol=0, atol=1e-12)
        assert torch.allclose(stream, cache["resid_pre", layer], rtol=0, atol=1e-12)
        stream = stream + cache["attn_out", layer] + cache["mlp_out", layer]
    assert torch.allclose(stream, cache["resid_post", -1], rtol=0, atol=1e-12)


@given(tiny_configs())
def test_stacked_weights_have_the_shapes_that_the_field_expects(cfg):
    """[layer head d_model d_head] and so on; a stacked weight is a copy."""
    model = OthelloGPT(cfg)
    stacked = model.W_Q
    stacked.data.zero_()

    assert stacked.shape == (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
    assert model.W_O.shape == (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model)
    assert model.W_in.shape == (cfg.n_layers, cfg.d_model, cfg.d_mlp)
    assert model.b_out.shape == (cfg.n_layers, cfg.d_model)
    assert model.blocks[0].attn.W_Q.abs().max() > 0


def test_weights_lie_in_memory_as_they_are_multiplied():
    """Loading, casting and copying keep the strides that make the flattening of W_Q free."""
    model = random_model(SMALL, dtype=torch.float32)
    copies = [copy.deepcopy(model), model.double(), OthelloGPT(SMALL)]
    copies[-1].load_state_dict({k: v.contiguous() for k, v in model.state_dict().items()})

    for each in copies:
        W_Q = each.blocks[0].attn.W_Q
        assert W_Q.transpose(0, 1).flatten(1).data_ptr() == W_Q.data_ptr()


def test_copies_have_hooks_of_their_own():
    """A deep copy and an unpickled model are not hooked when the original is, and name the same sites."""
    model, file = random_model(SMALL), io.BytesIO()
    tokens = torch.tensor([[1, 2, 3]])
    with model.hooks([("blocks.0.hook_attn_out", lambda activation, hook: activation * 0)]):
        twin = copy.deepcopy(model)
        torch.save(model, file)
        hooked = model(tokens)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)

    for each in (twin, loaded):
        assert torch.equal(each(tokens), model(tokens))
        assert not torch.allclose(each(tokens), hooked)
        assert each.hook_names == model.hook_names
    with twin.hooks([("blocks.0.hook_attn_out", lambda activation, hook: activation * 0)]):
        assert torch.equal(twin(tokens), hooked)
        assert not torch.allclose(model(tokens), hooked)


def test_one_game_may_come_without_its_batch_axis():
    """And in any integer type: games are stored as bytes."""
    model, game = random_model(SMALL), torch.tensor([20, 19, 18])

    assert torch.equal(model(game), model(game[None]))
    assert torch.equal(model(game.to(torch.uint8)), model(game))
    assert model(game[None][:0]).shape == (0, 3, 61)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([[1, 2, 63]]), ValueError, "holds 63 at batch 0, pos 2.*square_to_token"),
        (torch.tensor([[1], [-1]]), ValueError, "holds -1 at batch 1, pos 0"),
        (torch.ones(1, 60, dtype=torch.long), ValueError, r"shape \(1, 60\).*tokens\[..., :59\]"),
        (torch.ones(1, 0, dtype=torch.long), ValueError, r"shape \(1, 0\)"),
        (torch.ones(1, 1, 5, dtype=torch.long), ValueError, r"shape \(1, 1, 5\)"),
        (torch.ones(1, 5), TypeError, "`tokens` is torch.float32.*torch.as_tensor"),
        (torch.ones(1, 5, dtype=torch.bool), TypeError, "`tokens` is torch.bool"),
        ([20, 19], TypeError, "`tokens` is list"),
    ],
)
def test_bad_tokens_are_named(tokens, error, message):
    """With the value and its place, and how to mend it."""
    with pytest.raises(error, match=message):
        random_model(SMALL)(tokens)


def test_bad_sizes_and_layers_are_named():
    """A size of zero; a layer that does not exist."""
    with pytest.raises(ValueError, match="`d_mlp` is 0"):
        GPTConfig(d_mlp=0)
    with pytest.raises(ValueError, match="`stop_at_layer` is 3, but the model has 2 layers"):
        random_model(SMALL)(torch.tensor([1]), stop_at_layer=3)
    with pytest.raises(
        ValueError, match="`start_at_layer` is 2, but the run stops before, at layer 1"
    ):
        random_model(SMALL)(torch.zeros(1, 3, 8), start_at_layer=2, stop_at_layer=1)
    with pytest.raises(
        ValueError, match=r"up to 59, 8\) torch.float64, but it is \(1, 3, 9\) float32"
    ):
        random_model(SMALL)(torch.zeros(1, 3, 9), start_at_layer=1)


def test_a_model_lies_where_torch_is_told_to_make_tensors():
    """Its causal mask too."""
    with torch.device("meta"):
        model = OthelloGPT(SMALL)

    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
