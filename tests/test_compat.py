"""compat: TransformerLens's names give TransformerLens's results, and an error where they would mislead."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from compat_models import FOLD_ONLY, hooked, reference, reference_hooked
from fake_hub import serving
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches
from reference_model import load_fixture
from test_model import relative_error

from othello_gpt import GPTConfig, OthelloGPT, compat
from othello_gpt.compat import HookedTransformer, HookedTransformerConfig, utils
from othello_gpt.weights import WeightsError, to_transformer_lens

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=16)
TOKENS = torch.tensor([[20, 19, 18], [20, 21, 10]])
SIZES = dict(n_layers=2, d_model=8, n_ctx=59, d_head=3, n_heads=2, d_mlp=16, d_vocab=61)


def small() -> HookedTransformer:
    return hooked(random_model(SMALL))


# --- Running ---


def test_logits_and_losses_equal_the_reference():
    """`return_type` as TransformerLens has it, whole and token by token."""
    fixture, model = load_fixture(), reference_hooked()
    tokens = fixture["tokens"]
    both = model(tokens, return_type="both")

    assert relative_error(model(tokens), fixture["logits"]) < 1e-5
    assert relative_error(model(tokens, return_type="loss"), fixture["loss"]) < 1e-5
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert relative_error(per_token, fixture["loss_per_token"]) < 1e-5
    assert torch.equal(both.logits, model(tokens))
    assert both.loss == per_token.mean()
    assert model(tokens, return_type=None) is None
    assert relative_error(model(tokens, stop_at_layer=1), fixture["stop_at_layer_1"]) < 1e-5
    resid = fixture["stop_at_layer_1"]
    started = model(resid, start_at_layer=1)
    assert relative_error(started, fixture["start_at_layer_1"]) < 1e-5
    loss = model(resid, "loss", start_at_layer=1, tokens=tokens)
    assert relative_error(loss, fixture["loss"]) < 1e-5


@pytest.mark.parametrize("key", ["zero_attn_out_0", "double_resid_mid_1_last", "uniform_pattern_1"])
def test_hooked_runs_equal_the_reference(key):
    """The notebook's way: keyword `fwd_hooks`, a list of (name, function) pairs, edits in place."""
    fixture, model = load_fixture(), reference_hooked()

    def zero(activation, hook):
        activation[:] = 0

    def double_last(activation, hook):
        activation[:, -1] *= 2

    def uniform(pattern, hook):
        mask = torch.ones_like(pattern).tril()
        pattern[:] = mask / mask.sum(-1, keepdim=True)

    edits = {
        "zero_attn_out_0": (utils.get_act_name("attn_out", 0), zero),
        "double_resid_mid_1_last": (utils.get_act_name("resid_mid", 1), double_last),
        "uniform_pattern_1": (lambda name: name == "blocks.1.attn.hook_pattern", uniform),
    }
    with torch.no_grad():
        logits = model.run_with_hooks(fixture["tokens"], fwd_hooks=[edits[key]])
    assert relative_error(logits, fixture[f"hooks/{key}_logits"]) < 1e-4


def test_cached_gradients_equal_the_reference():
    """`incl_bwd` at every site; at ln1 the true total, of which TransformerLens keeps one part in three."""
    fixture, model = load_fixture(), reference_hooked()
    _, cache = model.run_with_cache(fixture["tokens"], return_type="loss", incl_bwd=True)
    expected = reference("grad/") | reference("grad_total/")

    for name, grad in expected.items():
        assert relative_error(cache[f"{name}_grad"], grad) < 1e-4, name
    names = {"embed.W_E": "W_E", "pos_embed.W_pos": "W_pos"}
    names |= {"unembed.W_U": "W_U", "unembed.b_U": "b_U"}
    parameters = dict(model.named_parameters())
    for name, grad in reference("pgrad/").items():
        bound = 1e-4 * grad.abs().max() + 1e-8  # that of b_K is zero: softmax cancels it
        assert (parameters[names.get(name, name)].grad - grad).abs().max() < bound, name


@given(models(), token_batches(min_pos=2))
def test_the_gradient_at_ln1_is_the_whole_one(model, tokens):
    """Correction, in float64: LayerNorm's input has the gradient that its `normalized` passes back."""
    _, cache = hooked(model).run_with_cache(tokens, return_type="loss", incl_bwd=True)
    norm = "blocks.0.ln1"
    scale, normalized = cache[f"{norm}.hook_scale"], cache[f"{norm}.hook_normalized"]
    g = cache[f"{norm}.hook_normalized_grad"]
    passed = (
        g - g.mean(-1, keepdim=True) - normalized * (g * normalized).mean(-1, keepdim=True)
    ) / scale
    through_attention = (
        cache["blocks.0.hook_resid_pre_grad"] - cache["blocks.0.hook_resid_mid_grad"]
    )

    assert torch.allclose(passed, through_attention, rtol=1e-9, atol=1e-12)


@given(models(), token_batches(max_batch=1, min_pos=2), st.data())
def test_the_options_of_a_cached_run_select_and_do_not_change(model, tokens, data):
    """remove_batch_dim, pos_slice (an int keeps its axis, a tuple is a slice), filters, a plain dictionary."""
    model, n_pos = hooked(model), tokens.shape[1]
    _, cache = model.run_with_cache(tokens)
    pos = data.draw(st.integers(-n_pos, n_pos - 1))
    _, one = model.run_with_cache(tokens, pos_slice=pos)
    _, first = model.run_with_cache(tokens, pos_slice=(0, 2), remove_batch_dim=True)
    _, kept = model.run_with_cache(
        tokens, names_filter={"blocks.0.hook_attn_out"}, return_cache_object=False
    )

    assert torch.equal(one["z", 0], cache["z", 0][:, [pos]])
    assert torch.equal(one["pattern", 0], cache["pattern", 0][:, :, [pos]])
    assert torch.equal(first["resid_post", -1], cache["resid_post", -1][0, :2])
    assert type(kept) is dict
    assert list(kept) == ["blocks.0.hook_attn_out"]
    whole = cache["resid_post", 0].untyped_storage().nbytes()
    assert one["resid_post", 0].untyped_storage().nbytes() * n_pos == whole


def test_several_games_keep_their_batch_axis():
    """Correction: TransformerLens 3 kept the first game and said nothing."""
    with pytest.raises(ValueError, match="holds 2 games.*apply_slice_to_batch_dim"):
        small().run_with_cache(TOKENS, remove_batch_dim=True)


def test_head_results_are_kept_when_the_configuration_says_so():
    """`set_use_attn_result` and the configuration's field; a hook on them always fires."""
    model, seen = small(), []
    model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.0.attn.hook_result", lambda a, hook: seen.append(a.shape))]
    )
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(TOKENS)

    assert seen == [(2, 3, 2, 8)]
    attn_out = cache["result", 1].sum(2) + model.b_O[1]
    assert torch.allclose(attn_out, cache["attn_out", 1], rtol=0, atol=1e-12)


def test_hooks_stay_only_when_told_to():
    """`reset_hooks_end=False` as in TransformerLens, until `reset_hooks`; `clear_contexts` empties the notes."""
    model = small()

    def count(activation, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    with model.hooks(fwd_hooks=[("hook_embed", count)], reset_hooks_end=False) as same:
        same(TOKENS)
    model(TOKENS)
    assert model.hook_dict["hook_embed"].ctx == {"calls": 2}
    model.reset_hooks(clear_contexts=False)
    model(TOKENS)
    assert model.hook_dict["hook_embed"].ctx == {"calls": 2}
    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", count)], clear_contexts=True)
    assert model.hook_dict["hook_embed"].ctx == {}


def test_hooks_that_fail_leave_nothing():
    """A misspelt second name attaches no first; notes are cleared when the run raises."""
    model = small()

    def note(activation, hook):
        hook.ctx["seen"] = True

    hooks = [("hook_embed", note), ("hook_embeed", note)]
    with pytest.raises(KeyError, match="hook_embeed"), model.hooks(hooks, reset_hooks_end=False):
        pass
    assert not model.registry.hooks
    hooks = dict(
        fwd_hooks=[("hook_embed", note), ("blocks.0.hook_attn_out", lambda a, hook: 1 / 0)]
    )
    for run in (model.run_with_hooks, model.run_with_cache):
        with pytest.raises(ZeroDivisionError):
            run(TOKENS, clear_contexts=True, **hooks)
        assert model.hook_dict["hook_embed"].ctx == {}


def test_a_gradient_may_come_back_in_a_tuple():
    """As TransformerLens has it, by `hooks`, `add_hook` and hooks that stay."""
    model, site = small(), "blocks.1.hook_resid_post"

    def zero(grad, hook):
        return (grad * 0,)

    def gradient():
        model.zero_grad()
        model(TOKENS, return_type="loss").backward()
        return model.W_E.grad

    with model.hooks(bwd_hooks=[(site, zero)]):
        assert not gradient().any()
    assert gradient().any()
    with model.add_hook(site, zero, "bwd"):
        assert not gradient().any()
    with model.hooks(bwd_hooks=[(site, zero)], reset_hooks_end=False):
        pass
    assert not gradient().any()


# --- Weights ---


@pytest.mark.parametrize(("kind", "options"), [("folded", FOLD_ONLY), ("processed", {})])
def test_processed_weights_equal_the_reference(kind, options):
    """Folding only, and all of TransformerLens's processing; logits too."""
    model = reference_hooked(fold_ln=True, **options)
    ours = to_transformer_lens(model)

    for name, weight in reference(f"{kind}_sd/").items():
        assert (ours[name] - weight).abs().max() <= 1e-4 * weight.abs().max() + 1e-7, name
    fixture = load_fixture()
    assert relative_error(model(fixture["tokens"]), fixture[f"{kind}_logits"]) < 1e-4


@given(models(), token_batches(min_pos=2))
def test_processing_keeps_float64(model, tokens):
    """Correction: TransformerLens goes through float32, and logits of a float64 model move by 4e-7."""
    before, after = hooked(model), hooked(model)
    after.process_weights_()

    lens = [each(tokens).log_softmax(-1) for each in (before, after)]
    assert torch.allclose(*lens, rtol=0, atol=1e-11)
    assert after.cfg.normalization_type == "LNPre"
    assert not any(p.requires_grad for name, p in after.named_parameters() if "ln" in name)


def test_weights_load_under_every_name_into_a_model_of_their_size():
    """TransformerLens's dictionary with its buffers and our own; the packaged model by default."""
    model = small()
    theirs = to_transformer_lens(model) | {"blocks.0.attn.mask": torch.ones(59, 59)}
    twin = HookedTransformer(SIZES | dict(act_fn="gelu", normalization_type="LN", seed=3)).double()
    twin.load_state_dict(theirs)

    assert torch.equal(twin(TOKENS), model(TOKENS))
    shipped = HookedTransformer.from_pretrained()
    assert torch.equal(shipped(TOKENS), OthelloGPT.from_pretrained()(TOKENS))
    with pytest.raises(WeightsError, match="'LNPre', folded"):
        HookedTransformer(SIZES | dict(normalization_type="LNPre")).load_and_process_state_dict(
            theirs, fold_ln=False
        )
    raw = HookedTransformer.from_pretrained(fold_ln=False, center_writing_weights=False)
    assert raw.cfg.normalization_type == "LN"
    with pytest.raises(WeightsError, match="`n_layers` is 2, not 8.*`d_model` is 8, not 256"):
        HookedTransformer(shipped.cfg).load_state_dict(theirs)
    with pytest.raises(WeightsError, match="'LNPre', folded.*load_and_process_state_dict"):
        HookedTransformer(SIZES | dict(normalization_type="LNPre")).load_state_dict(theirs)
    with pytest.raises(WeightsError, match="no token embedding"):
        model.load_state_dict({"weight": torch.ones(1)}, strict=False)


def test_an_option_of_the_model_that_means_nothing_is_an_error():
    """A tokenizer or a misspelt name: neither is passed over in silence."""
    with pytest.raises(ValueError, match="no tokenizer here.*square_to_token"):
        HookedTransformer(SIZES, tokenizer=object())
    with pytest.raises(TypeError, match="move_to_devise"):
        HookedTransformer(SIZES, move_to_devise=False)
    assert HookedTransformer(SIZES, move_to_device=False).device.type == "cpu"


def test_published_files_come_from_the_hub_under_transformer_lens_s_names(tmp_path):
    """`download_file_from_hf`, and "othello-gpt", which is a file of another repository; raw or folded."""
    model, file = small(), io.BytesIO()
    torch.save(to_transformer_lens(model), file)
    repos = {
        "NeelNanda/Othello-GPT-Transformer-Lens": {"synthetic_model.pth": file.getvalue()},
        "Baidicoot/Othello-GPT-Transformer-Lens": {"final.pth": file.getvalue()},
    }
    with serving(repos) as hub:
        source = dict(endpoint=hub.url, cache_dir=tmp_path)
        stored = utils.download_file_from_hf(
            "NeelNanda/Othello-GPT-Transformer-Lens", "synthetic_model.pth", **source
        )
        options = dict(dtype=torch.float64, n_heads=2, **source)
        raw = HookedTransformer.from_pretrained_no_processing("othello-gpt", **options)
        folded = HookedTransformer.from_pretrained("othello-gpt", **options)
    assert torch.equal(stored["unembed.W_U"], model.W_U)
    assert torch.equal(raw(TOKENS), model(TOKENS))
    assert not torch.allclose(folded.W_U, model.W_U)
    log_probs = [each(TOKENS).log_softmax(-1) for each in (folded, model)]
    assert torch.allclose(*log_probs, rtol=0, atol=1e-11)


def test_a_loaded_model_can_be_saved_copied_and_cast(tmp_path):
    """It is an OthelloGPT in all else; its configuration knows where it lies."""
    model = small()
    model.save_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    unpickled = torch.load(file, weights_only=False)

    loaded = HookedTransformer.from_pretrained(tmp_path, fold_ln=False, dtype=torch.float64)
    assert loaded.cfg.dtype == torch.float64
    other = HookedTransformer(model.cfg).float()
    assert (model.cfg.dtype, other.cfg.dtype) == (torch.float64, torch.float32)
    for each in (copy.deepcopy(model), unpickled):
        assert torch.equal(each(TOKENS), model(TOKENS))
        assert each.cfg.device == torch.device("cpu")
    assert model.float().cfg.dtype == torch.float32


@given(models())
def test_head_circuits_are_products_of_weights(model):
    """W_E_pos, OV, QK, accumulated biases, columns of W_U, labels."""
    model = hooked(model)
    cfg, last = model.cfg, model.cfg.n_layers - 1
    OV = torch.einsum("lhmd,lhdn->lhmn", model.W_V, model.W_O)
    QK = torch.einsum("lhmd,lhnd->lhmn", model.W_Q, model.W_K)

    assert torch.allclose(model.OV.AB, OV)
    assert torch.allclose(model.QK.AB, QK)
    assert torch.equal(model.W_E_pos[cfg.d_vocab :], model.W_pos)
    assert model.all_head_labels()[-1] == f"L{last}H{cfg.n_heads - 1}"
    bias = model.b_O[:last].sum(0) + model.b_out[:last].sum(0) + model.b_O[last]
    assert torch.allclose(model.accumulated_bias(last, mlp_input=True), bias)
    assert torch.equal(model.tokens_to_residual_directions(7), model.W_U[:, 7])
    assert torch.equal(model.tokens_to_residual_directions(TOKENS)[1, 2], model.W_U[:, 10])


def test_composition_scores_are_ratios_of_norms():
    """Written out for one pair of heads; 0 where the reader is not later."""
    model = small()
    scores = {mode: model.all_composition_scores(mode) for mode in ("Q", "K", "V")}
    writes, reads = model.OV.AB[0, 1], model.QK.AB[1, 0]

    expected = (writes @ reads).norm() / writes.norm() / reads.norm()
    assert torch.allclose(scores["Q"][0, 1, 1, 0], expected)
    expected = (writes @ reads.T).norm() / writes.norm() / reads.norm()
    assert torch.allclose(scores["K"][0, 1, 1, 0], expected)
    for score in scores.values():
        assert score.shape == (2, 2, 2, 2)
        assert score[1].abs().max() == 0
        assert score[:, :, 0].abs().max() == 0
        assert (score[0, :, 1] > 0).all()
    with pytest.raises(ValueError, match="`mode` is 'O'"):
        model.all_composition_scores("O")


# --- What is not here ---


def test_a_configuration_of_transformer_lens_is_accepted():
    """Fields of its `to_dict()` beside the sizes, with the values that an Othello-GPT has there."""
    theirs = dict(d_vocab_out=61, original_architecture=None, n_params=1536, rotary_dim=None)
    theirs |= dict(default_prepend_bos=True, attn_scale=np.float64(3**0.5), use_qk_norm=False)

    assert HookedTransformerConfig(**SIZES, **theirs) == HookedTransformerConfig(**SIZES)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(act_fn="gelu_new"), r"`act_fn` is 'gelu_new'.*'gelu'.*transformer_lens<4"),
        (dict(normalization_type="RMS"), "`normalization_type` is 'RMS'.*'LN' or 'LNPre'"),
        (dict(attention_dir="bidirectional"), "'causal'"),
        (dict(use_split_qkv_input=True), "`use_split_qkv_input` is True"),
        (dict(rotary_dim=64), "`rotary_dim` is 64"),
        (dict(rotary_dimm=None), "`rotary_dimm` means nothing"),
        (dict(d_vocab_out=60), "`d_vocab_out` is 60.*-1 or 61"),
        (dict(attn_scale=1.0), "`attn_scale` is 1.0"),
        (dict(d_mlp=0), "`d_mlp` is 0"),
    ],
)
def test_other_architectures_are_refused(setting, message):
    """With the value, what is possible, and where to go."""
    with pytest.raises(ValueError, match=message):
        HookedTransformerConfig(**SIZES | setting)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(TOKENS), AttributeError, "no `generate`.*random_games"),
        (lambda m: m.to_tokens("C3"), AttributeError, "square_to_token"),
        (lambda m: m.set_use_split_qkv_input(True), AttributeError, "ln1.hook_normalized"),
        (lambda m: m.nonsense, AttributeError, "no attribute 'nonsense'"),
        (lambda m: m(TOKENS, return_type="probs"), ValueError, "'probs'.*'logits', 'loss'"),
        (lambda m: m(TOKENS, attention_mask=TOKENS), TypeError, "attention_mask"),
        (lambda m: m(m(TOKENS, stop_at_layer=1), "loss", start_at_layer=1), ValueError, "tokens="),
        (lambda m: m.run_with_cache(TOKENS, incl_bwd=True), ValueError, "return_type='loss'"),
        (lambda m: compat.hook_points.HookedRootModule(), TypeError, "hooks.Tapped"),
        (lambda m: compat.HookedEncoder, AttributeError, "no 'HookedEncoder'.*transformer_lens<4"),
    ],
)
def test_what_is_not_supported_says_what_to_use(call, error, message):
    """Methods, options and classes of TransformerLens that have no meaning here."""
    with pytest.raises(error, match=message):
        call(small())


@pytest.mark.parametrize("container", [list, tuple, set])
def test_filters_and_names_are_checked(container):
    """Corrections: sets and tuples are filters; a misspelt name, a predicate that fits nothing are errors."""
    model = small()
    names = container(["blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"])

    assert set(model.run_with_cache(TOKENS, names_filter=names)[1]) == set(names)
    with pytest.raises(KeyError, match="Did you mean 'blocks.0.hook_attn_out'"):
        model.run_with_cache(TOKENS, names_filter=container(["blocks.0.hook_atn_out"]))
    with pytest.raises(ValueError, match="holds for none"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: "atn" in name, print)])


# --- utils and imports ---


def test_utilities_are_those_of_notebooks(tmp_path):
    """Arrays of anything; tensors, data or the path of a file."""
    values = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    torch.save({"W_E": torch.ones(2)}, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text('{"n_layers": 8}')
    (tmp_path / "notes.txt").write_text("text")

    assert isinstance(utils.to_numpy(values), np.ndarray)
    assert utils.to_numpy(values)[1] == 2
    assert utils.to_numpy([1, 2]).tolist() == [1, 2]
    assert utils.to_numpy(3.0) == 3
    assert utils.get_act_name("post", 5, "mlp") == "blocks.5.mlp.hook_post"
    assert utils.download_file_from_hf(tmp_path, "model.pth")["W_E"].sum() == 2
    assert utils.download_file_from_hf(tmp_path, "config.json") == {"n_layers": 8}
    assert utils.download_file_from_hf(tmp_path, "notes.txt") == tmp_path / "notes.txt"

    with pytest.raises(AttributeError, match="compat.utils has no 'test_prompt'.*get_act_name"):
        _ = utils.test_prompt


@pytest.mark.slow
def test_notebooks_import_by_changing_the_package_name():
    """The import lines of notebooks, in a fresh process; and `import othello_gpt` brings none of it."""
    lines = """
import sys, othello_gpt
assert not [name for name in sys.modules if name.startswith("othello_gpt.compat")]
import othello_gpt.compat.utils as utils
import othello_gpt.compat.patching as patching
from othello_gpt.compat import ActivationCache, FactoredMatrix, HookedTransformer, HookedTransformerConfig
from othello_gpt.compat.hook_points import HookedRootModule, HookPoint
from othello_gpt.compat.utils import get_act_name, to_numpy
"""
    subprocess.run([sys.executable, "-c", lines], check=True)
