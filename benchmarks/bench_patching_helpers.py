"""How much faster are compat's patching helpers than TransformerLens 3.9's own?

Published size, the same random weights on both sides, one thread, two pairs of 21 moves: the example pair,
which differs in its last move, and two unrelated games, which share no prefix, so that only lower layers and,
for patches by position, earlier positions are saved. Needs transformer_lens 3 beside this library.
"""

import sys
from importlib.metadata import version

import torch
from paired import compare, report
from peers import hooked_transformer

from othello_gpt import GPTConfig
from othello_gpt.board import random_games
from othello_gpt.compat import HookedTransformer, patching
from othello_gpt.games import example_pair, games_to_tokens

HELPERS = ("get_act_patch_block_every", "get_act_patch_attn_head_all_pos_every")


def main() -> None:
    try:
        from transformer_lens import patching as their_patching
    except ImportError:
        sys.exit("needs the other side: pip install 'transformer_lens>=3.9,<4'")
    their_patching.tqdm = lambda rows, *args, **kwargs: rows  # no progress bar in the time
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    ours = HookedTransformer(GPTConfig())
    for parameter in ours.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    theirs = hooked_transformer(ours)

    pairs = {"last move": example_pair()[:2], "unrelated": random_games(2, seed=0)[:, :21]}
    comparisons, gaps = [], {}
    for pair, games in pairs.items():
        clean, corrupted = (games_to_tokens(game[None]) for game in games)
        for helper in HELPERS:
            name = f"{helper.removeprefix('get_act_patch_')}, {pair}"
            calls = (
                _call(getattr(patching, helper), ours, clean, corrupted),
                _call(getattr(their_patching, helper), theirs, clean, corrupted),
            )
            mine, other = (call() for call in calls)
            gaps[name] = (mine - other).abs().max().item()
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
            comparisons.append(compare(name, *calls, pairs=3, warm_up=1))
    report(
        "Patching helpers: compat against TransformerLens.",
        comparisons,
        largest_difference=gaps,
        transformer_lens=version("transformer-lens"),
    )


def _call(helper, model, clean: torch.Tensor, corrupted: torch.Tensor):
    _, clean_cache = model.run_with_cache(clean)
    return lambda: helper(model, corrupted, clean_cache, lambda logits: logits[0, -1, 24])


if __name__ == "__main__":
    main()
