"""The sweep: equal to the plain loop of hooked runs, to the reference, and clear about what it cannot do."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches
from reference_model import fixture_model, load_fixture
from torch.utils._python_dispatch import TorchDispatchMode

from interp import rows
from interp.ablation import ablation_sweep, last_values
from interp.gradients import attribution_sweep
from interp.metrics import (
    LastMetric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability_mass,
)
from interp.patching import (
    SITES,
    Patch,
    last_logits,
    onto,
    patch_grid,
    patch_sweep,
    patch_sweep_by_rank,
    patch_together,
    patching_metric,
)
from interp.paths import path_sweep
from othello_gpt import GPTConfig, OthelloGPT, get_act_name
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.model import MLP, LayerNorm
from othello_gpt.onednn import HAS_ONEDNN, onednn_linear
from othello_gpt.vocab import square_to_token

ROOT = Path(__file__).parent.parent
SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, d_mlp=16)
CLEAN, CORRUPTED = torch.tensor([[20, 19, 18]]), torch.tensor([[20, 19, 21]])


def last_log_prob(logits):
    return logits[0, -1].log_softmax(-1)[7]


def site_name(site, layer):
    return get_act_name(site, None if site == "embed" else layer)


@torch.no_grad()
def plain_loop(model, clean, corrupted, metric, sites, within=None):
    """One hooked forward pass a patch: the oracle. Subspaces need the write of a part, so take whole sites."""
    _, cache = model.run_with_cache(clean, lambda name: True)

    def effect(site, layer, part):
        def patch(activation, hook):
            change = cache[hook.name][0, -1][part] - activation[0, -1][part]
            activation[0, -1][part] += change if within is None else change @ within

        return metric(model.run_with_hooks(corrupted, [(site_name(site, layer), patch)]))

    n_parts = {"z": model.cfg.n_heads, "result": model.cfg.n_heads, "post": model.cfg.d_mlp}
    looped = {}
    for site in sites:
        parts = range(n_parts[site]) if site in n_parts else [slice(None)]
        layers = range(1 if site == "embed" else model.cfg.n_layers)
        effects = [[torch.as_tensor(effect(site, at, part)) for part in parts] for at in layers]
        found = torch.stack([torch.stack(row) for row in effects])
        found = found if site in n_parts else found[:, 0]
        looped[site] = found[0] if site == "embed" else found
    return looped


@st.composite
def pairs(draw, max_pairs=3, max_pos=6):
    """Clean and corrupted games of different lengths, which differ in the last move only."""
    game = st.lists(st.integers(0, 60), min_size=1, max_size=max_pos)
    clean = [torch.tensor(moves) for moves in draw(st.lists(game, min_size=1, max_size=max_pairs))]
    last = [torch.tensor([draw(st.integers(0, 60))]) for _ in clean]
    return clean, [torch.cat([game[:-1], move]) for game, move in zip(clean, last, strict=True)]


@settings(max_examples=15)
@given(models(), token_batches(max_batch=1), st.integers(0, 60))
def test_a_sweep_equals_the_plain_loop(model, tokens, last):
    """At every site, head by head and neuron by neuron, in float64 to 1e-10; one-move games too."""
    other = tokens.clone()
    other[0, -1] = last
    swept = patch_sweep(model, tokens, other, last_log_prob, SITES)
    looped = plain_loop(model, tokens, other, last_log_prob, SITES)

    assert list(swept) == list(SITES)
    for site in SITES:
        assert swept[site].shape == looped[site].shape
        assert torch.allclose(swept[site], looped[site], rtol=0, atol=1e-10), site


@settings(max_examples=10)
@given(models(), token_batches(max_batch=1), st.integers(0, 60))
def test_a_sweep_runs_the_layer_norms_that_the_model_has(model, tokens, last):
    """One exchanged for another, here without its scale, acts in the sweep as in the loop."""

    class Centred(LayerNorm):
        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) * self.w + self.b

    for block in model.blocks:
        block.ln1 = block.ln2 = Centred(model.cfg).to(model.dtype)
    other = tokens.clone()
    other[0, -1] = last
    swept = patch_sweep(model, tokens, other, last_log_prob)
    looped = plain_loop(model, tokens, other, last_log_prob, swept)

    for site, effects in swept.items():
        assert torch.allclose(effects, looped[site], rtol=0, atol=1e-10), site


@settings(max_examples=10)
@given(models(), pairs(), st.integers(1, 2**18))
def test_a_sweep_of_many_pairs_equals_the_plain_loop_of_each(model, games, memory):
    """Different lengths, each pair its own metric, and any memory, down to one run at a time."""
    clean, corrupted = games
    tokens = torch.arange(len(clean)) % 61
    swept = patch_sweep(model, clean, corrupted, log_probability(tokens), SITES, memory=memory)
    for i, pair in enumerate(zip(clean, corrupted, strict=True)):
        looped = plain_loop(model, *pair, log_probability(i), SITES)
        for site in SITES:
            assert torch.allclose(swept[site][i], looped[site], rtol=0, atol=1e-10), site


def test_rows_stay_within_the_memory(monkeypatch):
    """No half block sees more rows than the budget has room for, and all neurons pass."""
    seen, model = [], random_model(GPTConfig(n_layers=3, d_model=8, n_heads=2, d_head=4, d_mlp=900))
    half_block = rows.half_block

    def recorded(model, place, stream, *rest):
        seen.append(stream.shape[0] * stream.shape[1])
        return half_block(model, place, stream, *rest)

    monkeypatch.setattr(rows, "half_block", recorded)
    clean, corrupted = CLEAN.repeat(4, 1), CORRUPTED.repeat(4, 1)
    memory = 300 * rows.bytes_of_a_row(model.cfg, 3, 8)
    swept = patch_sweep(model, clean, corrupted, log_probability(7), ["post"], memory=memory)

    assert swept["post"].shape == (4, 3, 900)
    assert 250 < max(seen) <= 300
    seen.clear()
    many, within = CLEAN.repeat(40, 1), torch.eye(8, dtype=torch.float64).repeat(64, 1, 1)
    patch_sweep(
        model, many, CORRUPTED.repeat(40, 1), log_probability(7), ["z"], within, memory=memory
    )
    assert max(seen) <= 300


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made meanwhile, views aside of one that was there."""

    def __init__(self, given):
        super().__init__()
        self.given, self.nbytes = given.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            if storage.data_ptr() != self.given:
                self.nbytes = max(self.nbytes, storage.nbytes())
        return made


def test_subspaces_are_not_copied():
    """However many there are, the memory is that of the rows."""
    model = random_model(GPTConfig(n_layers=2, d_model=64, n_heads=2, d_head=4, d_mlp=16))
    within = torch.eye(64, dtype=torch.float64).repeat(100, 1, 1)
    memory = within.nbytes // 2
    with LargestTensor(within) as largest:
        patch_sweep(model, CLEAN, CORRUPTED, log_probability(7), within=within, memory=memory)

    assert 0 < largest.nbytes < memory


@settings(max_examples=10)
@given(models(), token_batches(max_batch=1, min_pos=2))
def test_any_metric_and_a_clean_cache_give_the_same(model, tokens):
    """One call a run or one for all; with the keys and values of the clean run, of the whole logits too."""
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 61
    _, cache = model.run_with_cache(tokens)
    at_once = patch_sweep(model, tokens, other, log_probability(7), SITES, clean_cache=cache)

    def earlier_too(logits):
        return logits[0, 0].sum() + last_log_prob(logits)

    expected = plain_loop(model, tokens, other, earlier_too, SITES)
    for options in ({}, {"clean_cache": cache}):
        one_by_one = patch_sweep(model, tokens, other, earlier_too, SITES, **options)
        for site in SITES:
            assert torch.allclose(one_by_one[site], expected[site], rtol=0, atol=1e-9), site
    for site, effects in patch_sweep(model, tokens, other, last_log_prob, SITES).items():
        assert torch.allclose(at_once[site], effects, rtol=0, atol=1e-10), site


def test_what_is_patched_in_is_what_the_clean_cache_holds():
    """Of clean runs under hooks, too: here one that doubles what the first MLP writes last. One pair a time."""
    model, metric = random_model(SMALL), log_probability(7)
    clean = torch.tensor([[20, 19, 18], [5, 6, 7], [1, 1, 1]])
    corrupted = clean + torch.tensor([0, 0, 1])

    def double_last(activation, hook):
        activation[:, -1] *= 2

    _, cache = model.run_with_cache(clean, fwd_hooks=[("blocks.0.hook_mlp_out", double_last)])
    swept = patch_sweep(model, clean, corrupted, metric, ["mlp_out"], clean_cache=cache, memory=1)

    for layer in range(SMALL.n_layers):

        def patch(activation, hook):
            activation[:, -1] = cache[hook.name][:, -1]

        logits = model.run_with_hooks(corrupted, [(get_act_name("mlp_out", layer), patch)])
        looped = torch.stack([metric(each[None]) for each in logits])
        assert torch.allclose(swept["mlp_out"][:, layer], looped, rtol=0, atol=1e-10)


@settings(max_examples=10)
@given(models(), token_batches(max_batch=1), st.integers(0, 2**16))
def test_a_restricted_patch_equals_the_loop_that_projects(model, tokens, seed):
    """Several subspaces at once; nothing of a patch is left without one, all of it in the whole space."""
    other, d_model = tokens.clone(), model.cfg.d_model
    other[0, -1] = (other[0, -1] + 1) % 61
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_model, 2, generator=generator, dtype=torch.float64)
    eye = torch.eye(d_model, dtype=torch.float64)
    within = torch.stack([onto(directions), eye - onto(directions), eye, 0 * eye])
    whole_sites = [site for site in SITES if site not in ("z", "post")]
    swept = patch_sweep(model, tokens, other, last_log_prob, SITES, within=within)
    for i, projection in enumerate(within):
        looped = plain_loop(model, tokens, other, last_log_prob, whole_sites, projection)
        for site in whole_sites:
            assert torch.allclose(swept[site][..., i], looped[site], rtol=0, atol=1e-10), site
    plain = patch_sweep(model, tokens, other, last_log_prob, ("z", "post"))
    for site, effects in plain.items():
        assert torch.allclose(swept[site][..., 2], effects, rtol=0, atol=1e-10)
        unpatched = last_log_prob(model(other)).expand_as(effects)
        assert torch.allclose(swept[site][..., 3], unpatched, rtol=0, atol=1e-10)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**16))
def test_a_projection_keeps_what_lies_in_the_span_and_removes_the_rest(d_model, k, seed):
    """Whether or not the directions depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_model, k, generator=generator, dtype=torch.float64)
    projection = onto(torch.cat([directions, directions.sum(1, keepdim=True)], 1))

    assert torch.allclose(directions.T @ projection, directions.T, atol=1e-9)
    assert torch.allclose(projection @ projection, projection, atol=1e-9)
    assert torch.allclose(projection.trace(), torch.tensor(float(min(d_model, k))).double())


@settings(max_examples=10)
@given(models(), token_batches(max_batch=1, min_pos=2), st.data())
def test_patches_together_equal_a_hooked_run_of_each(model, tokens, data):
    """Any positions, several patches at once, games that differ anywhere, any memory."""
    n_pos, cfg = tokens.shape[1], model.cfg
    clean, corrupted = tokens[0], tokens[0].flip(0)
    a_patch = st.builds(
        lambda site, layer, pos, part: Patch(site, layer, pos, part if site == "z" else None),
        st.sampled_from(["resid_pre", "attn_out", "k", "z", "mlp_out", "post", "result"]),
        st.integers(0, cfg.n_layers - 1),
        st.integers(0, n_pos - 1),
        st.integers(0, cfg.n_heads - 1),
    )
    runs = data.draw(st.lists(st.lists(a_patch, max_size=3), min_size=1, max_size=5))
    memory = data.draw(st.integers(1, 2**18))

    def first_and_last(logits):
        return logits[0, 0, 3] + logits[0, -1, 7]

    together = patch_together(model, clean, corrupted, first_and_last, runs, memory)
    _, cache = model.run_with_cache(clean, lambda name: True)
    for effect, run in zip(together, runs, strict=True):
        hooks = []
        for patch in run:

            def hook_fn(activation, hook, patch=patch):
                part = slice(None) if patch.part is None else patch.part
                activation[0, patch.pos, part] = cache[hook.name][0, patch.pos, part]

            hooks.append((get_act_name(patch.site, patch.layer), hook_fn))
        expected = first_and_last(model.run_with_hooks(corrupted, hooks))
        assert torch.allclose(effect, expected, rtol=0, atol=1e-10), run


def test_patterns_are_patched_at_the_query():
    """Of one head or of all, by any of the site's names; a game may come with its batch axis."""
    model, metric = random_model(SMALL), log_probability(7)
    for site, head in (
        ("pattern", None),
        ("attn_scores", 1),
        ("attn", 1),
        ("blocks.1.attn.hook_pattern", 0),
    ):
        patch, heads = Patch(site, 1, 2, head), slice(None) if head is None else head
        effect = patch_together(model, CLEAN, CORRUPTED, metric, [[patch]])
        _, cache = model.run_with_cache(CLEAN)

        def take_row(activation, hook, heads=heads, cache=cache):
            activation[0, heads, 2] = cache[hook.name][0, heads, 2]

        hooks = [(get_act_name(site, 1), take_row)]
        expected = metric(model.run_with_hooks(CORRUPTED, hooks))
        assert torch.allclose(effect[0], expected, rtol=0, atol=1e-10)
        assert (expected - metric(model(CORRUPTED))).abs() > 1e-6


@settings(max_examples=10)
@given(models(), token_batches(max_batch=1, min_pos=2))
def test_the_last_column_of_a_grid_is_the_sweep(model, tokens):
    """At positions before the first difference a patch changes nothing; at the last it is the sweep's."""
    clean, corrupted = tokens[0], tokens[0].clone()
    corrupted[-1] = (corrupted[-1] + 1) % 61
    metric = log_probability(7)
    grid = patch_grid(model, clean, corrupted, metric, SITES)
    swept = patch_sweep(model, clean, corrupted, metric, SITES)
    plain = metric(model(corrupted))
    for site, effects in grid.items():
        at_last = effects[0, -1] if site == "embed" else effects[:, -1]
        assert torch.allclose(at_last, swept[site], rtol=0, atol=1e-10), site
        earlier = effects[:, :-1]
        assert torch.allclose(earlier, plain.expand_as(earlier), rtol=0, atol=1e-10)


@settings(max_examples=10)
@given(models(), pairs(max_pairs=4))
def test_last_logits_are_those_of_each_game(model, games):
    """Whatever the lengths and the batch."""
    logits = last_logits(model, games[0], batch_size=2)
    for game, last in zip(games[0], logits, strict=True):
        assert torch.allclose(model(game)[0, -1:], last, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_ranks_together_equal_one_process(tmp_path):
    """Pairs are shared out by rank, gathered, and come back in their order, on every rank."""
    script = tmp_path / "sweep.py"
    script.write_text(
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "import torch; from torch import distributed\n"
        "from interp.metrics import log_probability\n"
        "from interp.patching import SITES, patch_sweep, patch_sweep_by_rank\n"
        "from model_strategies import random_model\n"
        "from test_patching import SMALL\n"
        "distributed.init_process_group('gloo')\n"
        "clean = [torch.arange(1, n) for n in (4, 7, 3, 4, 9)]\n"
        "corrupted = [torch.cat([game[:-1], game[:-1].new_tensor([50])]) for game in clean]\n"
        "metric, model = log_probability(torch.arange(5)), random_model(SMALL)\n"
        "shared = patch_sweep_by_rank(model, clean, corrupted, metric, SITES)\n"
        "alone = patch_sweep(model, clean, corrupted, metric, SITES)\n"
        "assert all(torch.allclose(shared[s], alone[s], rtol=0, atol=1e-12) for s in SITES)\n"
        "open(f'{sys.argv[1]}/equal on rank {distributed.get_rank()}', 'w').close()\n"
        "distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )

    assert (tmp_path / "equal on rank 0").exists(), run.stderr
    assert (tmp_path / "equal on rank 1").exists(), run.stderr


@pytest.mark.slow
def test_neurons_of_the_packaged_model_equal_the_plain_loop():
    """A random sample of 200 of 16 384, in float32, to 1e-5."""
    pair, model = example_pair(), OthelloGPT.from_pretrained()
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    with torch.no_grad():
        metric = patching_metric(model(clean), model(corrupted), square_to_token(pair.answer))
        _, cache = model.run_with_cache(clean, lambda name: name.endswith("hook_post"))
    swept = patch_sweep(model, clean, corrupted, metric, ["post"])["post"]
    for i in torch.randperm(swept.numel())[:200].tolist():
        layer, neuron = divmod(i, model.cfg.d_mlp)

        def patch(activation, hook, neuron=neuron):
            activation[0, -1, neuron] = cache[hook.name][0, -1, neuron]

        with torch.no_grad():
            effect = metric(model.run_with_hooks(corrupted, [(f"post{layer}", patch)]))
        assert (swept[layer, neuron] - effect).abs() < 1e-5


@pytest.mark.parametrize("given", ["floats", "doubles", "autocast", "gradients", "strides", "own"])
def test_an_mlp_of_rows_is_the_models_whoever_multiplies(monkeypatch, given):
    """oneDNN does from four rows of floats on, and where anything else is asked for or given, the model itself."""
    model, multiplied = random_model(SMALL, dtype=torch.float32), []

    def counted(x, *rest):
        multiplied.append(x.shape[1])
        return onednn_linear(x, *rest)

    monkeypatch.setattr(rows, "onednn_linear", counted)
    mlp, context = model.blocks[0].mlp, nullcontext()
    if given == "doubles":
        model.double()
    elif given == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif given == "strides":
        mlp.W_in = torch.nn.Parameter(torch.randn(8, 32)[:, ::2])
    elif given == "own":
        mlp.__class__ = type("Own", (MLP,), {"write": lambda self, post: post.sum(-1, True)})

    for n in (1, 3, 4, 30):
        x = torch.randn(2, n, 8, dtype=model.dtype)[: 1 + (n == 30)]
        with torch.set_grad_enabled(given == "gradients"), context:
            post, written = rows.half_block(model, 1, x, 0, [])
            expected = mlp.neurons(model.blocks[0].ln2(x))
            close = {"rtol": 0, "atol": 0.1 if given == "autocast" else 1e-5}
            torch.testing.assert_close(post, expected, **close)
            torch.testing.assert_close(written, mlp.write(expected), **close)
        assert written.requires_grad == (given == "gradients")
    both = HAS_ONEDNN and torch.backends.mkl.is_available()
    assert multiplied == ([4, 4, 30, 30] if given == "floats" and both else [])


def test_a_metric_may_take_gradients():
    """Of its own: the probability of a token is the slope of the logsumexp along its logit."""

    def slope(logits):
        with torch.enable_grad():
            given = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(given.logsumexp(-1).sum(), given)
        return gradient[..., 7]

    model, chosen = random_model(SMALL), torch.arange(61) == 7
    found, expected = (
        patch_sweep(model, CLEAN, CORRUPTED, metric, SITES)
        for metric in (LastMetric(slope), probability_mass(chosen))
    )
    for site in SITES:
        assert torch.allclose(found[site], expected[site], rtol=0, atol=1e-10), site
        assert not found[site].is_inference()


@settings(max_examples=10)
@given(models(), token_batches(max_batch=1))
def test_a_run_patched_with_itself_is_itself(model, tokens):
    """Every patch, and patching the whole stream gives the clean run."""
    plain = last_log_prob(model(tokens)).detach()
    swept = patch_sweep(model, tokens, tokens, last_log_prob, SITES)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 61

    for effects in swept.values():
        assert torch.allclose(effects, plain.expand_as(effects), rtol=0, atol=1e-10)
    whole = patch_sweep(model, tokens, other, last_log_prob, ["resid_post"])["resid_post"]
    assert torch.allclose(whole, plain.expand_as(whole), rtol=0, atol=1e-10)


def test_a_sweep_of_the_packaged_model_equals_the_plain_loop():
    """The 21 moves of the example; float32 to 1e-5, float64 to 1e-10."""
    pair = example_pair()
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    sites = ("attn_out", "mlp_out", "resid_pre", "z")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = OthelloGPT.from_pretrained(dtype=dtype)
        with torch.no_grad():
            metric = patching_metric(model(clean), model(corrupted), square_to_token(pair.answer))
        swept = patch_sweep(model, clean, corrupted, metric, sites)
        looped = plain_loop(model, clean, corrupted, metric, sites)
        for site in sites:
            assert (swept[site] - looped[site]).abs().max() < tolerance, (site, dtype)


def test_patches_equal_the_reference():
    """attn_out and mlp_out, all heads and all neurons of TransformerLens 3.9; measured 4e-7."""
    fixture, model = load_fixture(), fixture_model()
    answer = int(fixture["patch/answer"])
    metric = patching_metric(
        fixture["patch/clean_logits"], fixture["patch/corrupted_logits"], answer
    )
    swept = patch_sweep(
        model, fixture["patch/clean_tokens"], fixture["patch/corrupted_tokens"], metric, SITES
    )
    neurons = swept["post"][tuple(fixture["patch/neurons_index"].T)]

    components = torch.stack([swept["attn_out"], swept["mlp_out"]])
    assert (components - fixture["patch/metric"]).abs().max() < 1e-5
    assert (swept["z"] - fixture["patch/heads_metric"]).abs().max() < 1e-5
    assert (neurons - fixture["patch/neurons_metric"]).abs().max() < 1e-5


def test_a_metric_of_many_pairs_takes_each_its_own_values():
    """And as many as there are."""
    logits = torch.randn(3, 2, 61)
    metric = LastMetric(lambda logits, k: logits[..., 0] * k, (torch.tensor([1.0, 10, 100]),))

    assert torch.equal(metric.rows(logits)[2], 100 * logits[2, :, 0])
    some = metric.of_pairs(torch.tensor([2]))
    assert torch.equal(some.rows(logits[2:]), metric.rows(logits)[2:])


@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 4))
def test_metrics_of_many_rows_are_those_of_each_run(seed, n_pairs, n_rows):
    """And equal to their formulas, written out for one run."""
    torch.manual_seed(seed)
    logits = torch.randn(n_pairs, n_rows, 61, dtype=torch.float64)
    reference = torch.randn(n_pairs, 2, 61, dtype=torch.float64)
    a, b = torch.randint(61, (2, n_pairs))
    legal = torch.rand(n_pairs, 61) < 0.3
    metrics = {
        log_probability(a): lambda p, i, run: run.log_softmax(-1)[a[i]],
        logit_difference(a, b): lambda p, i, run: run[a[i]] - run[b[i]],
        kl_divergence(reference): lambda p, i, run: (
            p[i] * (p[i].log() - run.log_softmax(-1))
        ).sum(),
        probability_mass(legal): lambda p, i, run: run.softmax(-1)[legal[i]].sum(),
    }
    p = reference[:, -1].softmax(-1)
    for metric, formula in metrics.items():
        for i in range(n_pairs):
            for row, run in zip(metric.rows(logits)[i], logits[i], strict=True):
                alone = metric.of_pairs(torch.tensor([i]))(run[None, None])
                assert torch.allclose(row, formula(p, i, run), rtol=0, atol=1e-12)
                assert torch.allclose(row, alone, rtol=0, atol=1e-12)


def test_the_metric_is_one_for_clean_zero_for_corrupted_and_linear_in_log_probabilities():
    """The closed form at the mean of both log-probabilities holds: 1/2 - ln(BC) / (clean - corrupted)."""
    clean, corrupted = torch.randn(2, 1, 5, 61, dtype=torch.float64)
    metric = patching_metric(clean, corrupted, 7)
    p, q = (logits[0, -1].log_softmax(-1) for logits in (clean, corrupted))
    bhattacharyya = ((p + q) / 2).exp().sum()
    mean = (clean.log_softmax(-1) + corrupted.log_softmax(-1)) / 2

    assert torch.allclose(metric(clean), torch.tensor(1.0).double())
    assert torch.allclose(metric(corrupted), torch.tensor(0.0).double())
    assert torch.allclose(metric(mean), 0.5 - bhattacharyya.log() / (p[7] - q[7]))
    with pytest.raises(ValueError, match="token 7 has log-probability .* in both runs"):
        patching_metric(clean, clean, 7)


@pytest.mark.parametrize(
    ("clean", "corrupted", "sites", "message"),
    [
        (CLEAN, CORRUPTED, ["attn"], "cannot patch 'attn'. Sites are embed, resid_pre"),
        (
            CLEAN,
            torch.tensor([[20, 21, 18]]),
            SITES,
            "already differ at pos 1, before their last move",
        ),
        (CLEAN, CORRUPTED[:, :2], SITES, r"`clean` has shape \(3,\) and `corrupted` \(2,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_swept_is_an_error(clean, corrupted, sites, message):
    """Unknown sites, games that differ earlier, other shapes."""
    with pytest.raises(ValueError, match=message):
        patch_sweep(random_model(SMALL), clean, corrupted, last_log_prob, sites)


def test_the_cache_of_other_games_is_an_error():
    """Its keys and values would be of other positions, and nothing would fail."""
    model = random_model(SMALL)
    _, cache = model.run_with_cache(CLEAN[:, :2])
    with pytest.raises(ValueError, match="holds 1 games of 2 positions, but the pairs are 1 of 3"):
        patch_sweep(model, CLEAN, CORRUPTED, last_log_prob, clean_cache=cache)
    for names in (None, lambda name: name.endswith(("hook_k", "hook_v", "_out"))):
        _, cache = model.run_with_cache(CLEAN, names)
        with pytest.raises(ValueError, match="is of other games than `clean`"):
            patch_sweep(model, CORRUPTED, CLEAN, last_log_prob, clean_cache=cache)


def test_a_cache_with_edited_keys_of_block_0_is_an_error():
    """The sweep would attend to them, while all that enters the block is as it should be."""
    model = random_model(SMALL)
    edit = [("blocks.0.attn.hook_k", lambda k, hook: k + 1)]
    _, cache = model.run_with_cache(CLEAN, fwd_hooks=edit)
    with pytest.raises(ValueError, match="is of other games than `clean`"):
        patch_sweep(model, CLEAN, CORRUPTED, last_log_prob, clean_cache=cache)


def test_values_of_other_pairs_are_an_error():
    """A metric or ablations made for more games than are swept would score each by another's."""
    model, metric = random_model(SMALL), log_probability(torch.tensor([1, 2, 3]))
    clean, corrupted = CLEAN.repeat(2, 1), CORRUPTED.repeat(2, 1)
    sweeps = (
        lambda: patch_sweep(model, clean, corrupted, metric),
        lambda: attribution_sweep(model, clean, corrupted, metric),
        lambda: path_sweep(model, clean, corrupted, metric),
    )
    for sweep in sweeps:
        with pytest.raises(ValueError, match="made for 3 pairs, but 2 are swept"):
            sweep()
    with pytest.raises(ValueError, match="made for 3 pairs, but 1 are swept"):
        patch_together(model, CLEAN, CORRUPTED, metric, [[]])
    for called, logits in ((metric, model(CLEAN)), (log_probability(1), model(clean))):
        with pytest.raises(ValueError, match="a call scores one run of one pair: use `rows`"):
            called(logits)
    values = last_values(model, [CLEAN[0]] * 3)
    with pytest.raises(ValueError, match="`values` are of 3 games, but 2 are swept"):
        ablation_sweep(model, clean, last_log_prob, values=values)


@pytest.mark.usefixtures("unchecked")
def test_the_slower_road_takes_two_games_of_equal_length():
    """One each."""
    model, games = random_model(SMALL), CLEAN.repeat(2, 1)
    with pytest.raises(ValueError, match="`clean` has 3 moves and `corrupted` 2"):
        patch_together(model, CLEAN, CORRUPTED[:, :2], last_log_prob, [[]])
    with pytest.raises(ValueError, match="one game is wanted"):
        patch_grid(model, games, games, last_log_prob)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (Patch("blocks.0.hook_attn_out", 1, 2), "is no site of block 1, where the run would start"),
        (Patch("hook_embed", 0, 2), "'resid_pre' of block 0 stands for the embeddings"),
        (Patch("attn_out", 0, 2, 1), "'attn_out' has no heads or neurons, but `part` is 1"),
        (Patch("embed", 0, 2), "no hook site named 'blocks.0.hook_embed'"),
    ],
)
def test_a_patch_that_would_do_nothing_or_half_is_an_error(patch, message):
    """A site outside the block that is named with it, and parts where there are none."""
    with pytest.raises((ValueError, KeyError), match=message):
        patch_together(random_model(SMALL), CLEAN, CORRUPTED, last_log_prob, [[patch]])


@pytest.mark.usefixtures("unchecked")
def test_directions_in_place_of_a_projection_are_an_error():
    """They would be spread over the whole stream without a word."""
    model, direction = random_model(SMALL), torch.randn(8, 1, dtype=torch.float64)
    for sweep in (patch_sweep, attribution_sweep):
        with pytest.raises(ValueError, match=r"a projection is \(8, 8\): make one .* with `onto`"):
            sweep(model, CLEAN, CORRUPTED, log_probability(7), within=direction)


def test_a_sweep_of_one_rank_is_the_sweep():
    """In its shape and its errors too; a cache, of which every rank would need a part, is refused."""
    model, metric = random_model(SMALL), log_probability(7)
    shared = patch_sweep_by_rank(model, CLEAN, CORRUPTED, metric)
    for site, effects in patch_sweep(model, CLEAN, CORRUPTED, metric).items():
        assert torch.equal(shared[site], effects)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        patch_sweep_by_rank(model, [CLEAN[0]], [CORRUPTED[0]] * 2, metric)
    _, cache = model.run_with_cache(CLEAN)
    with pytest.raises(ValueError, match="leave `clean_cache` out"):
        patch_sweep_by_rank(model, CLEAN, CORRUPTED, metric, clean_cache=cache)


def test_runs_that_differ_by_rounding_have_nothing_to_recover():
    """One game, alone and in a batch: in float32 its logits differ in their last bits."""
    model, game = OthelloGPT.from_pretrained(), games_to_tokens(example_pair().clean[None])
    alone, batched = (last_logits(model, list(game) * n)[:1] for n in (1, 16))
    for token in range(1, 61):
        with pytest.raises(ValueError, match=f"token {token} has log-probability .* in both runs"):
            patching_metric(alone, batched, token)


def test_a_hooked_model_is_refused():
    """Its hooks would not fire in the replayed position, and nobody would know."""
    model = random_model(SMALL)
    with (
        model.hooks([("hook_embed", lambda activation, hook: activation * 2)]),
        pytest.raises(ValueError, match="they would not fire in a sweep"),
    ):
        patch_sweep(model, CLEAN, CORRUPTED, last_log_prob)
