"""Activation patching at the last position: exact, and one token step for all patches together.

Two games differ in their last move only. The model is causal, so before the last position both runs are
equal, and so are their keys and values. A patch at the last position therefore changes nothing but the
last position from the patched layer up. `patch_sweep` runs one batch of rows through the model: the positions
of the clean game, the last position of the corrupted one, and one row for every patch, from its layer up.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from othello_gpt import OthelloGPT
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
    rows = torch.cat([model.embed(clean)[0], model.embed(corrupted)[0, -1:]])  # [row, d_model]
    last, joined = clean.shape[1] - 1, []
    for block in model.blocks:
        rows = _block_with_patches(block, rows, last, sites, joined)
    logits = model.unembed(rows)  # [row, d_vocab]

    clean_logits, patched = logits[None, : last + 1], logits[last + 2 :]
    results: dict[str, list[Tensor]] = {site: [] for site in sites}
    for (site, _), those in zip(joined, patched.split([n for _, n in joined]), strict=True):
        effects = torch.stack([_effect(metric, clean_logits, row) for row in those])
        results[site].append(effects if site in ("z", "post") else effects[0])
    return {site: torch.stack(effects) for site, effects in results.items()}


def _effect(metric: Metric, clean_logits: Tensor, last: Float[Tensor, " d_vocab"]) -> Tensor:
    logits = clean_logits.clone()  # before the last position the patched run equals the clean one
    logits[0, -1] = last
    return torch.as_tensor(metric(logits))


def _block_with_patches(
    block: Block,
    rows: Float[Tensor, "row d_model"],
    last: int,
    sites: tuple[str, ...],
    joined: list[tuple[str, int]],
) -> Float[Tensor, "more_rows d_model"]:
    """The residual stream after the block, of every row that entered and every patch made in the block.

    Rows up to `last` are the positions of the clean run; row `last + 1` is the last position of the
    corrupted run; the rest, of patched runs. A patched run equals the corrupted one up to its patch, so its
    row joins there; `joined` lists (site, number of rows) in the order of joining.
    """

    def join(rows: Tensor, patches: dict[str, Tensor]) -> Tensor:
        chosen = [(site, patch) for site, patch in patches.items() if site in sites]
        joined.extend((site, len(patch)) for site, patch in chosen)
        return torch.cat([rows, *(patch for _, patch in chosen)])

    clean, corrupted = slice(last, last + 1), slice(last + 1, last + 2)
    attn, mlp = block.attn, block.mlp

    resid_pre = join(rows, {"resid_pre": rows[clean]})
    z = _attend(attn, block.ln1(resid_pre), last)  # [row, head, d_head]
    attn_out = from_heads(z, attn.W_O, attn.b_O)
    resid_mid = resid_pre + attn_out
    patches = {"attn_out": resid_pre[corrupted] + attn_out[clean], "resid_mid": resid_mid[clean]}
    if "z" in sites:
        by_head = torch.einsum("hd,hdm->hm", (z[clean] - z[corrupted])[0], attn.W_O)
        patches["z"] = resid_mid[corrupted] + by_head
    resid_mid = join(resid_mid, patches)

    post = mlp.neurons(block.ln2(resid_mid))
    mlp_out = mlp.write(post)
    resid_post = resid_mid + mlp_out
    patches = {"mlp_out": resid_mid[corrupted] + mlp_out[clean], "resid_post": resid_post[clean]}
    if "post" in sites:
        by_neuron = (post[clean] - post[corrupted]).T * mlp.W_out  # [d_mlp, d_model]
        patches["post"] = resid_post[corrupted] + by_neuron
    return join(resid_post, patches)


def _attend(
    attn: Attention, x: Float[Tensor, "row d_model"], last: int
) -> Float[Tensor, "row head d_head"]:
    """z of every row, which sees the clean positions before its own, and itself."""
    q = into_heads(x, attn.W_Q, attn.b_Q)
    k = into_heads(x, attn.W_K, attn.b_K)
    v = into_heads(x, attn.W_V, attn.b_V)
    row, key_pos = torch.arange(len(x), device=x.device), torch.arange(last, device=x.device)
    before = (
        key_pos < row[:, None, None]
    )  # [row, 1, key_pos]: all of them for rows of the last position
    past_scores = torch.einsum("rhd,khd->rhk", q, k[:last]).masked_fill(~before, -torch.inf)
    own_score = (q * k).sum(-1, keepdim=True)
    pattern = (torch.cat([past_scores, own_score], -1) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("rhk,khd->rhd", pattern[..., :-1], v[:last]) + pattern[..., -1:] * v


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
