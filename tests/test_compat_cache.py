"""compat's cache: stacks and attributions as TransformerLens's, right without folding too; factored matrices."""

import pytest
import torch
from compat_models import FOLD_ONLY, hooked, reference_hooked, reference_metadata
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches
from reference_model import load_fixture
from test_model import relative_error

from othello_gpt import GPTConfig
from othello_gpt.compat import ActivationCache, FactoredMatrix, HookedTransformer

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=16)
LABELS = dict(pos_slice=-1, return_labels=True)
STACKS = {
    "decompose_resid": lambda cache: cache.decompose_resid(**LABELS),
    "accumulated_resid": lambda cache: cache.accumulated_resid(
        incl_mid=True, apply_ln=True, **LABELS
    ),
    "stack_head_results": lambda cache: cache.stack_head_results(incl_remainder=True, **LABELS),
    "full_decomposition": lambda cache: cache.get_full_resid_decomposition(
        expand_neurons=False, **LABELS
    ),
    "stack_neuron_results": lambda cache: cache.stack_neuron_results(
        -1, incl_remainder=True, **LABELS
    ),
}
KEYS = {"accumulated_resid": "accumulated_resid_ln"}  # where the fixture names its tensor otherwise
ATTRIBUTED = {
    "logit_attrs": "decompose_resid",
    "head_logit_attrs": "stack_head_results",
    "neuron_logit_attrs": "stack_neuron_results",
}
unfolded = pytest.mark.filterwarnings("ignore:LayerNorm is not folded")


@pytest.fixture(params=["", "_folded"])
def suffix_and_cache(request) -> tuple[str, ActivationCache]:
    model = reference_hooked(**FOLD_ONLY) if request.param else reference_hooked()
    return request.param, model.run_with_cache(load_fixture()["tokens"])[1]


def test_stacks_and_their_labels_equal_the_reference(suffix_and_cache):
    """Writers, streams, heads and the full decomposition, folded or not; labels word for word."""
    (suffix, cache), labels = suffix_and_cache, reference_metadata()["labels"]

    for name, stacked in STACKS.items():
        stack, found = stacked(cache)
        assert found == labels[name], name
        key = f"dla/{KEYS.get(name, name)}{suffix}"
        if key in load_fixture():
            assert relative_error(stack, load_fixture()[key]) < 1e-4, key
    stack, _ = STACKS["accumulated_resid"](cache)
    lens = stack @ cache.model.W_U + cache.model.b_U
    assert relative_error(lens, load_fixture()[f"dla/logit_lens{suffix}"]) < 1e-4


def test_attributions_equal_the_reference_where_it_is_right():
    """On folded weights; without folding, what TransformerLens leaves out is the weight and nothing else."""
    fixture = load_fixture()
    token, other = fixture["dla/tokens"], fixture["dla/incorrect_tokens"]
    for suffix, model in (("", reference_hooked()), ("_folded", reference_hooked(**FOLD_ONLY))):
        _, cache = model.run_with_cache(fixture["tokens"])
        with torch.no_grad():
            model.ln_final.w.fill_(1)  # already so if folded
        for key, stacked in ATTRIBUTED.items():
            attrs = cache.logit_attrs(STACKS[stacked](cache)[0], token, pos_slice=-1)
            assert relative_error(attrs, fixture[f"dla/{key}{suffix}"]) < 1e-4, key
        stack, _ = STACKS["decompose_resid"](cache)
        attrs = cache.logit_attrs(stack, token, other, pos_slice=-1)
        assert relative_error(attrs, fixture[f"dla/logit_attrs_diff{suffix}"]) < 1e-4


def test_unfolded_attributions_count_the_weight_and_say_so():
    """Correction: equal to the fixture's exact attribution, which TransformerLens's own misses."""
    fixture = load_fixture()
    _, cache = reference_hooked().run_with_cache(fixture["tokens"])
    stack = cache.decompose_resid(pos_slice=-1)

    with pytest.warns(UserWarning, match="LayerNorm is not folded.*fold_ln=True"):
        attrs = cache.logit_attrs(stack, fixture["dla/tokens"], pos_slice=-1)
    assert relative_error(attrs, fixture["dla/logit_attrs_exact"]) < 1e-4
    assert relative_error(fixture["dla/logit_attrs"], fixture["dla/logit_attrs_exact"]) > 0.01


@unfolded
@given(models(), token_batches(), st.data())
def test_attributions_sum_to_the_logit_less_a_constant(model, tokens, data):
    """In float64 and without folding; writers, heads with the rest, and the full decomposition alike."""
    model = hooked(model)
    logits, cache = model.run_with_cache(tokens)
    targets = data.draw(st.sampled_from([7, torch.tensor(7), tokens[:, :1] * 0 + 7, tokens]))
    index = torch.as_tensor(targets).expand(tokens.shape)[..., None]
    constant = (model.ln_final.b @ model.W_U + model.b_U).expand_as(logits).gather(-1, index)
    total = (logits.gather(-1, index) - constant)[..., 0]

    for stack in (
        cache.decompose_resid(),
        cache.stack_head_results(incl_remainder=True),
        cache.stack_neuron_results(-1, incl_remainder=True),
        cache.get_full_resid_decomposition(),
    ):
        attrs = cache.logit_attrs(stack, targets)
        assert torch.allclose(attrs.sum(0), total, rtol=0, atol=1e-10)


@given(models(), token_batches(), st.data())
def test_every_decomposition_sums_to_the_stream(model, tokens, data):
    """At every layer and at the MLP's input; normalised parts sum to `hook_normalized` there."""
    _, cache = hooked(model).run_with_cache(tokens)
    layer = data.draw(st.integers(0, model.cfg.n_layers))
    mlp_input = layer < model.cfg.n_layers and data.draw(st.booleans())
    end = layer == model.cfg.n_layers
    entering = (
        cache["resid_post", -1] if end else cache["resid_mid" if mlp_input else "resid_pre", layer]
    )
    ln = "ln2" if mlp_input else "ln1"
    normalized = cache["normalized"] if end else cache["normalized", layer, ln]

    for expected, apply_ln in ((entering, False), (normalized, True)):
        options = dict(layer=layer, mlp_input=mlp_input, apply_ln=apply_ln)
        for expand in (True, False):
            parts = cache.get_full_resid_decomposition(expand_neurons=expand, **options)
            assert torch.allclose(parts.sum(0), expected, rtol=0, atol=1e-10)
        parts = cache.decompose_resid(**options)
        assert torch.allclose(parts.sum(0), expected, rtol=0, atol=1e-10)
    streams, labels = cache.accumulated_resid(layer, mlp_input=mlp_input, return_labels=True)
    assert torch.equal(streams[-1], entering)
    assert labels[-1] == ("final_post" if end else f"{layer}_mid" if mlp_input else f"{layer}_pre")


@given(models(), token_batches(), st.data())
def test_projecting_early_equals_projecting_late(model, tokens, data):
    """What the neurons wrote need never be made; also with LayerNorm, a choice of neurons and of positions."""
    _, cache = hooked(model).run_with_cache(tokens)
    cfg = model.cfg
    layer = data.draw(st.integers(0, cfg.n_layers))
    onto = torch.randn(cfg.d_model, *data.draw(st.sampled_from([(), (3,)])), dtype=torch.float64)
    options = dict(
        apply_ln=data.draw(st.booleans()),
        pos_slice=data.draw(st.sampled_from([None, -1, 0, (0, 1), [0]])),
        return_labels=True,
    )
    neurons = data.draw(st.sampled_from([None, cfg.d_mlp - 1, (0, 2), [0]]))
    stack, labels = cache.stack_neuron_results(
        layer, neuron_slice=neurons, incl_remainder=True, **options
    )
    early, same = cache.stack_neuron_results(
        layer, neuron_slice=neurons, incl_remainder=True, project_output_onto=onto, **options
    )

    assert labels == same
    assert len(labels) == len(stack)
    assert torch.allclose(early, torch.tensordot(stack, onto, 1), rtol=0, atol=1e-10)
    mlp_input = layer < cfg.n_layers
    stack, _ = cache.get_full_resid_decomposition(layer, mlp_input, **options)
    early, _ = cache.get_full_resid_decomposition(
        layer, mlp_input, project_output_onto=onto, **options
    )
    assert torch.allclose(early, torch.tensordot(stack, onto, 1), rtol=0, atol=1e-10)
    if layer:
        one = cache.get_neuron_results(layer - 1, neurons, options["pos_slice"], onto)
        made = cache.get_neuron_results(layer - 1, neurons, options["pos_slice"])
        assert torch.allclose(one, torch.tensordot(made, onto, 1), rtol=0, atol=1e-10)


@given(models(), token_batches())
def test_head_results_are_what_the_head_site_holds(model, tokens):
    """Made after the run from `z`, and equal to the run's own `hook_result`."""
    model = hooked(model)
    _, cache = model.run_with_cache(tokens)
    _, results = model.run_with_cache(tokens, names_filter=lambda name: "hook_result" in name)
    _, only_z = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))
    stack = only_z.stack_head_results()
    cache.compute_head_results()

    for layer in range(model.cfg.n_layers):
        expected = results["result", layer]
        assert torch.allclose(cache["result", layer], expected, rtol=0, atol=1e-12)
        heads = stack.unflatten(0, (model.cfg.n_layers, -1))[layer]
        assert torch.allclose(heads.movedim(0, 2), expected, rtol=0, atol=1e-12)


@unfolded
@given(models(), token_batches(max_batch=1), st.data())
def test_a_cache_without_its_batch_axis_gives_the_same(model, tokens, data):
    """`remove_batch_dim`, and a single game out of many: every method, one axis less."""
    model = hooked(model)
    _, cache = model.run_with_cache(tokens)
    _, other = model.run_with_cache(tokens.repeat(3, 1))
    chosen = other.apply_slice_to_batch_dim(1)
    _, single = model.run_with_cache(tokens, remove_batch_dim=True)
    pos = data.draw(st.sampled_from([None, -1]))

    for batchless in (single, chosen):
        for stacked in (
            lambda c: c.decompose_resid(apply_ln=True, pos_slice=pos),
            lambda c: c.accumulated_resid(apply_ln=True, pos_slice=pos),
            lambda c: c.stack_head_results(pos_slice=pos, incl_remainder=True, apply_ln=True),
            lambda c: c.stack_neuron_results(1, pos_slice=pos, apply_ln=True),
            lambda c: c.get_full_resid_decomposition(pos_slice=pos, apply_ln=True),
            lambda c: c.logit_attrs(c.decompose_resid(pos_slice=pos), 7, pos_slice=pos),
        ):
            assert torch.allclose(stacked(batchless), stacked(cache)[:, 0], rtol=0, atol=1e-11)
        heads = batchless.stack_activation("z")
        assert torch.allclose(heads, cache.stack_activation("z")[:, 0], rtol=0, atol=1e-11)
    for games in (
        lambda c: c.apply_slice_to_batch_dim(0),
        lambda c: c.select(pos=0),
        lambda c: ActivationCache.concat([c, c]),
    ):
        with pytest.raises(
            ValueError, match="no batch axis any more: choose and join games before"
        ):
            games(single)
    with pytest.raises(ValueError, match="holds 3 games"):
        other.remove_batch_dim()


@unfolded
def test_some_games_of_a_stack_have_their_own_scale():
    """`batch_slice` takes games of the stack and of the scale; a slice stays a batch."""
    model = hooked(random_model(SMALL))
    _, cache = model.run_with_cache(torch.tensor([[20, 19], [20, 21], [18, 10]]))
    stack = cache.decompose_resid()

    for games, expected in ((1, 1), ((1, 3), slice(1, 3)), ([0, 2], [0, 2])):
        attrs = cache.logit_attrs(stack, 7, batch_slice=games)
        assert torch.allclose(attrs, cache.logit_attrs(stack, 7)[:, expected])
        part = cache.apply_slice_to_batch_dim(games)
        assert torch.equal(part["z", 0], cache["z", 0][expected])
    assert cache.to("cpu") is cache
    assert part.has_batch_dim


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_attributed_is_an_error():
    """Labels in place of tokens, two shapes, a layer or a mode that is not there."""
    model = HookedTransformer(SMALL)
    _, cache = model.run_with_cache(torch.tensor([[20, 19]]))
    stack = cache.decompose_resid()

    with pytest.raises(TypeError, match="square_to_token"):
        cache.logit_attrs(stack, "C0")
    with pytest.raises(ValueError, match="must have the same shape"):
        cache.logit_attrs(stack, 7, torch.tensor([7]))
    with pytest.raises(ValueError, match="`layer` is 3, but must be 0 to 2"):
        cache.accumulated_resid(3)
    with pytest.raises(ValueError, match="`mode` is 'heads'"):
        cache.decompose_resid(mode="heads")


# --- Factored matrices ---


@st.composite
def factored(draw) -> FactoredMatrix:
    left, middle, right = (draw(st.integers(1, 5)) for _ in range(3))
    lead = draw(st.sampled_from([(), (2,), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    A = torch.randn(*lead, left, middle, generator=generator, dtype=torch.float64)
    B = torch.randn(*lead[1:], middle, right, generator=generator, dtype=torch.float64)
    return FactoredMatrix(A, B)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-10)


@given(factored())
def test_a_factored_matrix_is_its_product(matrix):
    """Products from both sides, transposing, scaling, norm, singular values, indexing."""
    AB = matrix.AB
    right = torch.randn(matrix.rdim, 2, dtype=torch.float64)
    left = torch.randn(2, matrix.ldim, dtype=torch.float64)
    U, S, V = matrix.svd()

    assert close((matrix @ right).AB, AB @ right)
    assert close((left @ matrix).AB, left @ AB)
    assert close(matrix @ right[:, 0], AB @ right[:, 0])
    assert close(left[0] @ matrix, left[0] @ AB)
    assert close((matrix @ matrix.T).AB, AB @ AB.mT)
    assert close((2 * matrix * torch.tensor(3.0)).AB, 6 * AB)
    assert close(matrix.norm(), AB.norm(dim=(-2, -1)))
    assert close(U * S[..., None, :] @ V.mT, AB)
    assert close(matrix.make_even().AB, AB)
    assert close(matrix.collapse_l().norm(dim=(-2, -1)), matrix.norm())
    assert close(matrix.unsqueeze(0).AB, AB[None])
    index = (0,) * (matrix.ndim - 2)
    assert close(matrix[(*index, 0, slice(None))].AB, AB[index][:1])
    assert close(matrix[(*index, slice(None), -1)].AB, AB[index][:, -1:])


@given(factored())
def test_eigenvalues_are_those_of_the_product(matrix):
    """Their sum is the trace and their squares' the trace of the square: no order to compare."""
    square = matrix @ matrix.T
    trace = square.AB.diagonal(dim1=-2, dim2=-1).sum(-1)

    assert torch.allclose(square.eigenvalues.sum(-1).real, trace, rtol=1e-8, atol=1e-8)
    traces = (square.AB @ square.AB).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(square.eigenvalues.square().sum(-1).real, traces, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("unchecked")
def test_matrices_that_do_not_fit_are_an_error():
    """With their shapes; and `Vh`, which never was transposed, says so."""
    matrix = FactoredMatrix(torch.ones(2, 3), torch.ones(3, 4))

    with pytest.raises(ValueError, match=r"A has shape \(2, 3\) and B \(2, 3\)"):
        FactoredMatrix(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs a square matrix"):
        _ = matrix.BA
    with pytest.raises(ValueError, match="matrix product is `@`"):
        _ = matrix * torch.ones(2)
    with pytest.raises(IndexError, match="at most 2 axes"):
        _ = matrix[0, 0, 0]
    with pytest.warns(UserWarning, match="write `.V`"):
        assert torch.equal(matrix.Vh, matrix.V)
    assert repr(matrix) == "FactoredMatrix(shape (2, 4), hidden dim 3)"
