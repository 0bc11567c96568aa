"""The notebooks run again: their calls, in our words, on the weights and probes that ship in the package.

Each test stands for a part of a public notebook and uses TransformerLens's API as that part does: the exercise
page's sections 1 to 3 (ARENA 1.5.3), and Nanda's notebooks on Othello-GPT. What they find is compared with
what the rest of the library finds by its own means.
"""

from functools import partial
from types import SimpleNamespace

import einops
import numpy as np
import othello_gpt.compat.utils as utils
import pytest
import torch
from test_model import relative_error

import othello_gpt.compat.patching as patching
from interp import arena, neurons
from interp.attribution import contributions, direct_logit_attribution
from interp.patching import patch_sweep, patching_metric
from interp.probes import LinearProbe
from othello_gpt import OthelloGPT, board
from othello_gpt.compat import ActivationCache, HookedTransformer, HookedTransformerConfig
from othello_gpt.compat.hook_points import HookPoint
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.vocab import square_to_token
from othello_gpt.weights import to_transformer_lens

LAYER, PLAYED = 6, [square for square in range(64) if square not in (27, 28, 35, 36)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the notebooks make first: the model from a downloaded file, games, their cache, three-mode probe."""
    folder = tmp_path_factory.mktemp("hub")
    torch.save(published_file(OthelloGPT.from_pretrained()), folder / "synthetic_model.pth")
    cfg = HookedTransformerConfig(
        n_layers=8,
        d_model=256,
        d_head=32,
        n_heads=8,
        d_mlp=1024,
        d_vocab=61,
        n_ctx=59,
        act_fn="gelu",
        normalization_type="LNPre",
        device="cpu",
    )
    model = HookedTransformer(cfg).to("cpu")
    model.load_state_dict(utils.download_file_from_hf(folder, "synthetic_model.pth"))

    squares = torch.from_numpy(board.random_games(20, seed=3)).long()
    games_square = squares[(squares >= 0).all(1)]  # whole games only, as on the page
    games_id = square_to_token(games_square)
    with torch.no_grad():
        logits, cache = model.run_with_cache(games_id[:, :-1].to(model.cfg.device))
    record = board.play(games_square.numpy())
    return SimpleNamespace(
        model=model,
        games_square=games_square,
        games_id=games_id,
        logits=logits,
        cache=cache,
        states=torch.from_numpy(record.state),
        relative=torch.from_numpy(board.piece_classes(record)),
        full_linear_probe=three_modes(LinearProbe.from_pretrained(layer=LAYER)),
    )


def published_file(model: OthelloGPT) -> dict[str, torch.Tensor]:
    """The weights as the published file has them: folded, without LayerNorm, with two buffers a layer."""
    stored = to_transformer_lens(model)
    stored = {name: weight for name, weight in stored.items() if not name.endswith((".w", ".b"))}
    for layer in range(model.cfg.n_layers):
        stored[f"blocks.{layer}.attn.mask"] = torch.ones(59, 59).tril().bool()
        stored[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    return stored


def three_modes(probe: LinearProbe) -> torch.Tensor:
    """The published probe's form [mode d_model row col option]: black to play, white to play, all moves.

    Options are empty, white, black; the third mode, which the page does not use, stays empty.
    """
    empty, theirs, mine = probe.W.unbind(-1)
    black_to_play = torch.stack([empty, theirs, mine], -1)
    white_to_play = torch.stack([empty, mine, theirs], -1)
    return torch.stack([black_to_play, white_to_play, torch.zeros_like(probe.W)])


def directions(page) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The page's probe of empty, theirs and mine from the modes, and its blank and mine directions."""
    full = page.full_linear_probe
    linear_probe = torch.zeros_like(full[0])
    linear_probe[..., 0] = full[[0, 1], ..., [0, 0]].mean(0)
    linear_probe[..., 1] = full[[0, 1], ..., [1, 2]].mean(0)
    linear_probe[..., 2] = full[[0, 1], ..., [2, 1]].mean(0)
    empty, theirs, mine = linear_probe.unbind(-1)
    return linear_probe, empty - theirs / 2 - mine / 2, mine - theirs


def test_section_1_the_model_plays_legally(page):
    """A sample input; the three replies to C3; log-probabilities laid out on the board."""
    sample = torch.tensor([[20, 19, 18, 10, 2, 1, 27, 3, 41, 42]])
    logits = page.model(sample)
    logprobs = logits.log_softmax(-1)
    logprobs_board = torch.full((8, 8), -13.0)
    logprobs_board.flatten()[PLAYED] = logprobs[0, 0, 1:]

    assert logits.shape == (1, 10, 61)
    assert set(logprobs[0, 0].topk(3).indices.tolist()) == {21, 33, 19}
    assert logprobs_board.flatten().topk(3).indices.sort().values.tolist() == [18, 20, 34]
    best = page.logits[:, 10:30].argmax(-1)
    legal = torch.from_numpy(board.play(page.games_square.numpy()).legal)[:, 10:30].flatten(2)
    assert legal.gather(2, torch.tensor([0, *PLAYED])[best][..., None]).float().mean() > 0.9


def test_section_1_the_probe_reads_the_board(page):
    """Modes averaged to empty, theirs, mine; accuracy over the middle of the games."""
    linear_probe, blank, mine = directions(page)
    shipped = LinearProbe.from_pretrained(layer=LAYER)
    assert torch.allclose(linear_probe, shipped.W)
    assert torch.allclose(blank, shipped.blank, atol=1e-5)
    assert torch.allclose(mine, shipped.mine, atol=1e-5)

    resid = page.cache["resid_post", LAYER]
    out = einops.einsum(
        resid, linear_probe, "game move d_model, d_model row col option -> game move row col option"
    )
    correct = (out + shipped.b).argmax(-1) == page.relative[:, :-1]
    assert correct[:, 5:-5].float().mean() > 0.9


def test_section_1_a_flipped_square_changes_the_reply(page):
    """`apply_scale` in a partial hook, by name, at each scale; scale 0 erases, 1 mirrors."""
    _, _, mine = directions(page)
    row, col, move, game = 5, 4, 20, page.games_id[:1, :21]
    flip_dir = mine[:, row, col]
    original = page.model(game)[0, move]

    def flip(resid: torch.Tensor, hook: HookPoint, scale: float) -> torch.Tensor:
        return arena.apply_scale(resid, flip_dir, scale, pos=move)

    name = utils.get_act_name("resid_post", 4)
    with torch.no_grad():
        for scale in [0, 1, 2, 4]:
            hook = partial(flip, scale=scale)
            edited = page.model.run_with_hooks(game, fwd_hooks=[(name, hook)])[0, move]
            assert not torch.allclose(edited, original, atol=1e-2)
        _, cache = page.model.run_with_cache(game, names_filter=name)
    unit = flip_dir / flip_dir.norm()
    before = cache["resid_post", 4][0, move]
    after = arena.apply_scale(cache["resid_post", 4].clone(), flip_dir, 1, pos=move)[0, move]
    assert torch.allclose(after @ unit, -(before @ unit), atol=1e-4)


def test_section_2_contributions_of_layers(page):
    """Marginal and accumulated scores, layer by layer, as the library's own attribution has them."""
    _, blank, mine = directions(page)
    game, move = 1, 20
    for probe in (blank, mine):
        attn = torch.stack([page.cache["attn_out", i][game, move] for i in range(LAYER + 1)])
        attn = einops.einsum(attn, probe, "layer d_model, d_model row col -> layer row col")
        total = einops.einsum(
            page.cache.stack_activation("resid_post")[: LAYER + 1, game, move],
            probe,
            "layer d_model, d_model row col -> layer row col",
        )
        expected, _ = arena.calculate_attn_and_mlp_probe_score_contributions(
            page.cache, probe, LAYER, game, move
        )
        assert torch.allclose(attn, expected, atol=1e-4)
        expected = arena.calculate_accumulated_probe_score(page.cache, probe, LAYER, game, move)
        assert torch.allclose(total, expected, atol=1e-4)


def test_section_2_neurons_in_the_probe_basis(page):
    """Weights stacked over layers, unit probes, SVD, ranking by spread and kurtosis with einops."""
    _, blank, mine = directions(page)
    unit = blank / blank.norm(dim=0, keepdim=True)
    unit[:, [3, 3, 4, 4], [3, 4, 3, 4]] = 0
    layer, neuron = 5, 393
    w_in = page.model.W_in[layer, :, neuron].detach().clone()
    w_in /= w_in.norm()
    w_out = page.model.W_out[layer, neuron, :].detach().clone()
    w_out /= w_out.norm()

    reads = einops.einsum(w_in, unit, "d_model, d_model row col -> row col")
    probe = LinearProbe.from_pretrained(layer=LAYER)
    expected = neurons.input_weights(page.model, layer, probe.normalised().blank)[neuron]
    assert torch.allclose(reads, expected, atol=1e-5)
    W_U = page.model.W_U[:, 1:].detach()
    cosines = w_out @ (W_U / W_U.norm(dim=0))
    expected = neurons.logit_weights(page.model, layer, neuron, cosine=True)
    assert torch.allclose(cosines, expected, atol=1e-5)
    U, _, _ = torch.svd(torch.cat([mine.flatten(1), blank.flatten(1)], 1))
    fraction = (w_in @ U[:, :-4]).square().sum()
    basis = neurons.probe_basis(probe, convention="arena")
    assert torch.allclose(fraction, neurons.span_fraction(w_in, basis), atol=1e-4)

    acts = page.cache["post", layer][:, 3:-3]
    spread = acts.std(dim=[0, 1]).argsort(descending=True)[:10]
    assert spread.tolist() == neurons.top_neurons(page.cache, layer).tolist()
    heaviness = einops.reduce(acts, "game move neuron -> neuron", arena.kurtosis)
    assert heaviness.shape == (page.model.cfg.d_mlp,)


def test_section_2_activation_patching(page):
    """One-dimensional tokens, `reset_hooks`, a partial hook that edits in place, sixteen runs."""
    model, pair = page.model, example_pair()
    clean, corrupted = (games_to_tokens(game[None])[0] for game in pair[:2])
    answer = square_to_token(pair.answer)
    with torch.no_grad():
        clean_logits, clean_cache = model.run_with_cache(clean)
        corrupted_logits, _ = model.run_with_cache(corrupted)
    ends = [run.log_softmax(-1)[0, -1, answer] for run in (corrupted_logits, clean_logits)]

    def metric(logits):
        return (logits.log_softmax(-1)[0, -1, answer] - ends[0]) / (ends[1] - ends[0])

    def patch_final(activation: torch.Tensor, hook: HookPoint, clean_cache: ActivationCache):
        activation[0, -1, :] = clean_cache[hook.name][0, -1, :]
        return activation

    model.reset_hooks()
    results = torch.zeros(2, model.cfg.n_layers, device=model.cfg.device)
    hook_fn = partial(patch_final, clean_cache=clean_cache)
    with torch.no_grad():
        for i, activation in enumerate(["attn_out", "mlp_out"]):
            for layer in range(model.cfg.n_layers):
                hooks = [(utils.get_act_name(activation, layer), hook_fn)]
                results[i, layer] = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks))
    swept = patch_sweep(
        model, clean, corrupted, patching_metric(clean_logits, corrupted_logits, answer)
    )
    expected = torch.stack([swept["attn_out"], swept["mlp_out"]])
    assert torch.allclose(results, expected, atol=1e-4)
    every = patching.get_act_patch_block_every(model, corrupted, clean_cache, metric)
    assert torch.allclose(every[1:, :, -1], expected, atol=1e-4)


def test_section_3_a_neuron_in_depth(page):
    """Its direct effect on logits, its most exciting moves, and the spectrum by what the board shows."""
    _, neuron = 5, int(page.cache["post", 5].std(dim=[0, 1]).argmax())
    w_out = page.model.blocks[5].mlp.W_out[neuron].detach()
    state = torch.zeros(8, 8)
    state.flatten()[PLAYED] = w_out @ page.model.W_U[:, 1:].detach()
    square = int(state.abs().argmax())

    acts = page.cache["post", 5, "mlp"][:, :, neuron]
    top = acts > acts.quantile(0.99)
    mean_board = page.relative[:, :-1][top].float().mean(0)
    assert 0 < top.sum() <= 0.01 * acts.numel() + 1
    assert mean_board.shape == (8, 8)

    label = utils.to_numpy(page.states[:, :-1].flatten(2)[..., square] == 0).flatten()
    values = utils.to_numpy(acts.flatten())
    edges = np.linspace(values.min(), values.max(), 101)
    shares = [np.histogram(values[label == kind], edges)[0] / len(values) for kind in (True, False)]
    assert sum(share.sum() for share in shares) == pytest.approx(1)
    mean = [values[label == kind].mean() for kind in (True, False)]
    assert abs(mean[0] - mean[1]) > 0.1  # it tells whether its square is empty


def test_author_s_notebook_decomposes_the_stream(page):
    """`return_type=None`, one position, labels, the final LayerNorm: contributions to probe and logit."""
    game, move, token = 2, 20, 19
    _, _, mine = directions(page)
    result, cache = page.model.run_with_cache(page.games_id[:, :-1], return_type=None)
    stack, labels = cache.decompose_resid(-1, pos_slice=move, return_labels=True)
    normalised = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=move)
    attrs = cache.logit_attrs(stack, token, pos_slice=move)
    lens = cache.accumulated_resid(-1, apply_ln=True, pos_slice=move) @ page.model.W_U

    assert result is None
    assert labels[:3] == ["embed", "pos_embed", "0_attn_out"]
    parts = torch.tensordot(stack[:, game], mine, 1)
    expected = contributions(page.cache, mine).values[:, game, move]
    assert torch.allclose(parts, expected, atol=1e-4)
    dla = direct_logit_attribution(page.model, cache, token, pos=move)
    assert relative_error(attrs, dla.values[:-1]) < 1e-4
    assert torch.allclose(normalised.sum(0), cache["normalized"][:, move], atol=1e-4)
    assert relative_error(lens[-1] + page.model.b_U, page.logits[:, move]) < 1e-4


def test_author_s_notebook_takes_heads_apart(page):
    """Heads stacked and attributed, patterns read, OV circuits factored, composition scored."""
    heads, labels = page.cache.stack_head_results(
        layer=-1, pos_slice=-1, incl_remainder=True, return_labels=True
    )
    attrs = page.cache.logit_attrs(heads, page.games_id[:, -1], pos_slice=-1)
    cfg = page.model.cfg
    answer = page.logits[torch.arange(len(attrs[0])), -1, page.games_id[:, -1]]
    constant = page.model.b_U[page.games_id[:, -1]]

    assert labels[:1] + labels[-2:] == ["L0H0", "L7H7", "remainder"]
    assert torch.allclose(attrs.sum(0) + constant, answer, atol=1e-3)
    pattern = page.cache["pattern", 0]
    assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-5)
    full_OV = page.model.W_E @ page.model.OV[0, 3] @ page.model.W_U
    product = page.model.W_E @ page.model.W_V[0, 3] @ page.model.W_O[0, 3] @ page.model.W_U
    assert relative_error(full_OV.AB, product) < 1e-4
    scores = page.model.all_composition_scores("K")
    assert scores.shape == (cfg.n_layers, cfg.n_heads, cfg.n_layers, cfg.n_heads)


def test_author_s_notebook_trains_a_probe_on_the_cache(page):
    """Tokens cut by a slice, `return_type=None`, one site kept, an optimiser on the probe alone."""
    probe = torch.zeros(page.model.cfg.d_model, 64, 3, requires_grad=True)
    optimiser = torch.optim.AdamW([probe], lr=1e-4)
    targets = page.relative[:, :-1].flatten(2).long()
    losses = []
    for _ in range(3):
        name = utils.get_act_name("resid_post", LAYER)
        with torch.inference_mode():
            _, cache = page.model.run_with_cache(
                page.games_id[:, :-1], return_type=None, names_filter=lambda n, name=name: n == name
            )
        out = torch.tensordot(cache["resid_post", LAYER].clone(), probe, 1)
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 2), targets.flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
