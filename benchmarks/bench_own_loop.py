"""How much faster is the exact last-position sweep than one hooked forward pass a patch?

The packaged model, the example pair of 21 moves, attn_out and mlp_out of eight layers, the same metric. The
loop is this library's own hooked forward pass, sixteen times, its clean run not counted.
"""

import torch
from paired import compare, report

from interp import arena
from interp.patching import patching_metric
from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.vocab import square_to_token


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {
        "shipped model": OthelloGPT.from_pretrained(),
        "published size, random weights": OthelloGPT(GPTConfig()),
    }
    report(
        "Sixteen patches: the sweep against sixteen hooked forward passes.",
        [_sweep_against_loop(name, model) for name, model in models.items()],
    )


def _sweep_against_loop(name: str, model: OthelloGPT):
    pair = example_pair()
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    metric = patching_metric(model(clean), model(corrupted), square_to_token(pair.answer))
    _, clean_cache = model.run_with_cache(clean)

    def sweep():
        return arena.get_act_patch_attn_mlp(model, clean, corrupted, metric)

    def loop():
        return arena.get_act_patch_resid_pre(model, corrupted, clean_cache, metric)

    largest = loop().abs().max().item()  # the metric magnifies rounding where nothing was learnt
    torch.testing.assert_close(sweep(), loop(), rtol=0, atol=1e-4 * max(largest, 1))
    return compare(name, sweep, loop, pairs=40)


if __name__ == "__main__":
    main()
