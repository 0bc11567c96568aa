"""Activation patching at the last position: exact, and one token step for all patches together.

Two games differ in their last move only. The model is causal, so before the last position both runs are
equal, and so are their keys and values. A patch at the last position therefore changes nothing but the
last position from the patched layer up. `patch_sweep` runs one game whole and then replays only that
position: all patches are rows of one batch, and each row joins the batch at the layer of its patch.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from othello_gpt import ActivationCache, OthelloGPT
from othello_gpt.model import Attention, Block, from_heads, into_heads

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""] | float]

SITES = ("resid_pre", "attn_out", "z", "resid_mid", "mlp_out", "post", "resid_post")


def patching_metric(
    clean_logits: Float[Tensor, "batch pos d_vocab"],
    corrupted_logits: Float[Tensor, "batch pos d_vocab"],
    token: int,
) -> Metric:
    """A metric that is 1 at the clean log-probability of `token` and 0 at the corrupted one.

    It is linear in the log-probability of the token after the last move of the first game, so it may leave
    [0, 1]. It takes logits; log-probabilities give the same.

    Raises:
        ValueError: both runs give the token the same log-probability, so there is nothing to recover.

    Source: ARENA 1.5.3, section 2, whose `patching_metric` closes over global variables.
    """
    clean, corrupted = (_log_prob(logits, token) for logits in (clean_logits, corrupted_logits))
    if torch.isclose(clean, corrupted, rtol=0, atol=1e-9):
        raise ValueError(
            f"token {token} has log-probability {clean.item():.4f} in both runs. "
            "Choose a token that the last move makes more or less likely."
        )
    return lambda logits: (_log_prob(logits, token) - corrupted) / (clean - corrupted)


def _log_prob(logits: Float[Tensor, "batch pos d_vocab"], token: int) -> Float[Tensor, ""]:
    return logits[0, -1].log_softmax(-1)[token]


@torch.no_grad()
def patch_sweep(
    model: OthelloGPT,
    clean: Int[Tensor, "*batch pos"],
    corrupted: Int[Tensor, "*batch pos"],
    metric: Metric,
    sites: Iterable[str] = ("attn_out", "mlp_out"),
) -> dict[str, Float[Tensor, "layer *part"]]:
    """The metric of the corrupted run with one activation of its last position taken from the clean run.

    Exchange `clean` and `corrupted` for noising in place of denoising.

    Args:
        model: a model that nobody has hooked: hooks would not fire in the replayed position.
        clean: tokens of one game, [pos] or [1 pos].
        corrupted: the same game with another last move.
        metric: a function of the logits [1 pos d_vocab] of the patched run, such as `patching_metric`.
        sites: any of "resid_pre", "attn_out", "z", "resid_mid", "mlp_out", "post", "resid_post".
            "z" patches head by head, "post" neuron by neuron.

    Returns:
        For each site the metric by layer: [layer], for "z" [layer head], for "post" [layer d_mlp].

    Raises:
        ValueError: unknown sites, games that differ before the last move, or a hooked model.
    """
    sites = _checked_sites(sites)
    clean, corrupted = _checked_pair(clean, corrupted)
    if model.registry.hooks:
        raise ValueError(
            "the model has hooks attached, and they would not fire in a sweep, which replays one "
            "position. Leave the `with model.hooks(...)` block, or call `model.reset_hooks()`."
        )
    needed = [
        name for name in model.hook_names if name.rpartition("hook_")[2] in ("k", "v", *sites)
    ]
    clean_logits, cache = model.run_with_cache(clean, names_filter=needed)
    logits, joined = _replay_last_position(model, corrupted[0, -1], cache, sites)

    results: dict[str, list[Tensor]] = {site: [] for site in sites}
    for (site, _), rows in zip(joined, logits[1:].split([n for _, n in joined]), strict=True):
        effects = torch.stack([_effect(metric, clean_logits, row) for row in rows])
        results[site].append(effects if site in ("z", "post") else effects[0])
    return {site: torch.stack(effects) for site, effects in results.items()}


def _effect(metric: Metric, clean_logits: Tensor, last: Float[Tensor, " d_vocab"]) -> Tensor:
    logits = clean_logits.clone()  # before the last position the patched run equals the clean one
    logits[0, -1] = last
    return torch.as_tensor(metric(logits))


def _replay_last_position(
    model: OthelloGPT, token: Int[Tensor, ""], clean: ActivationCache, sites: tuple[str, ...]
) -> tuple[Float[Tensor, "row d_vocab"], list[tuple[str, int]]]:
    """Last-position logits of the corrupted run (row 0) and of every patched run, and who the rows are.

    A row is one run's residual stream at the last position. A patched run equals the corrupted one up to
    its patch, so its row joins there; `joined` lists (site, number of rows) in the order of joining.
    """
    last = clean["v", 0].shape[1] - 1
    rows = (model.W_E[token] + model.W_pos[last])[None]  # [row, d_model]
    joined: list[tuple[str, int]] = []

    def join(rows: Tensor, patches: dict[str, Tensor]) -> Tensor:
        joined.extend((site, len(patch)) for site, patch in patches.items())
        return torch.cat([rows, *patches.values()])

    for layer, block in enumerate(model.blocks):
        past = {name: clean[name, layer][0, :last] for name in ("k", "v")}
        at = {site: clean[site, layer][0, last] for site in sites}
        if "resid_pre" in at:
            rows = join(rows, {"resid_pre": at["resid_pre"][None]})
        z = _attend(block.attn, block.ln1(rows), past["k"], past["v"])
        resid_mid = rows + from_heads(z, block.attn.W_O, block.attn.b_O)
        rows = join(resid_mid, _patched_resid_mid(block, at, rows[0], z[0], resid_mid[0]))
        post = block.mlp.neurons(block.ln2(rows))
        resid_post = rows + block.mlp.write(post)
        rows = join(resid_post, _patched_resid_post(block, at, rows[0], post[0], resid_post[0]))
    return model.unembed(rows), joined


def _attend(
    attn: Attention,
    x: Float[Tensor, "row d_model"],
    past_k: Float[Tensor, "key_pos head d_head"],
    past_v: Float[Tensor, "key_pos head d_head"],
) -> Float[Tensor, "row head d_head"]:
    """z of the last position, which sees the positions before it and itself."""
    q = into_heads(x, attn.W_Q, attn.b_Q)
    k = into_heads(x, attn.W_K, attn.b_K)
    v = into_heads(x, attn.W_V, attn.b_V)
    past_scores = torch.einsum("rhd,khd->rhk", q, past_k)
    own_score = (q * k).sum(-1, keepdim=True)
    pattern = (torch.cat([past_scores, own_score], -1) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("rhk,khd->rhd", pattern[..., :-1], past_v) + pattern[..., -1:] * v


def _patched_resid_mid(
    block: Block, clean: dict[str, Tensor], resid_pre: Tensor, z: Tensor, resid_mid: Tensor
) -> dict[str, Float[Tensor, "row d_model"]]:
    """What `resid_mid` of the corrupted run becomes under each patch inside or after attention."""
    patches = {}
    if "attn_out" in clean:
        patches["attn_out"] = (resid_pre + clean["attn_out"])[None]
    if "z" in clean:
        patches["z"] = resid_mid + torch.einsum("hd,hdm->hm", clean["z"] - z, block.attn.W_O)
    if "resid_mid" in clean:
        patches["resid_mid"] = clean["resid_mid"][None]
    return patches


def _patched_resid_post(
    block: Block, clean: dict[str, Tensor], resid_mid: Tensor, post: Tensor, resid_post: Tensor
) -> dict[str, Float[Tensor, "row d_model"]]:
    """What `resid_post` of the corrupted run becomes under each patch inside or after the MLP."""
    patches = {}
    if "mlp_out" in clean:
        patches["mlp_out"] = (resid_mid + clean["mlp_out"])[None]
    if "post" in clean:
        patches["post"] = resid_post + (clean["post"] - post)[:, None] * block.mlp.W_out
    if "resid_post" in clean:
        patches["resid_post"] = clean["resid_post"][None]
    return patches


def _checked_sites(sites: Iterable[str]) -> tuple[str, ...]:
    sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if unknown := [site for site in sites if site not in SITES]:
        raise ValueError(
            f"cannot patch {', '.join(map(repr, unknown))}. Sites are {', '.join(SITES)}."
        )
    return sites


def _checked_pair(clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor]:
    clean, corrupted = torch.atleast_2d(clean), torch.atleast_2d(corrupted)
    if clean.shape != corrupted.shape or clean.shape[0] != 1:
        raise ValueError(
            f"`clean` has shape {tuple(clean.shape)} and `corrupted` {tuple(corrupted.shape)}. "
            "A sweep takes one pair of games of equal length, [pos] or [1 pos] each."
        )
    earlier = (clean != corrupted)[0, :-1].nonzero()
    if len(earlier):
        raise ValueError(
            f"the games already differ at pos {int(earlier[0])}, before their last move. "
            "Cut both after their first difference."
        )
    return clean, corrupted
