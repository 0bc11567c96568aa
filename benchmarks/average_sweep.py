"""Which activations of the shipped model restore a reply, on average over 300 pairs, and is it linear?

Pairs are those of `sure_pairs`, as in the report: they differ in the last move only, exactly one reply changes
legality, and of random games they have the nearest boards, then the surest replies. Means come with
bootstrap intervals of 95 %. Attribution patching, the gradient's estimate, is shown beside the exact sweep: the
correlation over all pairs and parts, and the worst case.
"""

import time

import torch
from paired import QUICK, report

from interp.gradients import agreement, attribution_sweep
from interp.pairs import pair_tokens, pairs_metric, sure_pairs
from interp.patching import patch_sweep
from othello_gpt import OthelloGPT
from othello_gpt.bootstrap import bootstrap_mean

SITES = ("attn_out", "mlp_out", "z", "post")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model, n_pairs = OthelloGPT.from_pretrained(), 30 if QUICK else 300
    pairs = sure_pairs(model, n_pairs)
    clean, corrupted, _ = pair_tokens(pairs)
    metric = pairs_metric(model, pairs)
    start = time.process_time()
    exact = patch_sweep(model, clean, corrupted, metric, SITES)
    seconds = time.process_time() - start
    estimated = attribution_sweep(model, clean, corrupted, metric, SITES)
    facts = {"pairs": len(pairs), "seconds_of_the_sweep": round(seconds, 1)}
    for site in SITES:
        correlation, worst_error = agreement(exact[site], estimated[site])
        facts[f"{site}: correlation of the estimate"] = round(correlation, 4)
        facts[f"{site}: worst error of the estimate"] = round(worst_error, 3)
    for site in ("attn_out", "mlp_out"):
        means = bootstrap_mean(exact[site])
        facts[site] = [[round(x, 4) for x in row] for row in torch.stack(means).T.tolist()]
        print(f"{site}, by layer: mean (95 % interval)")
        for layer, (mean, low, high) in enumerate(facts[site]):
            print(f"  {layer}  {mean:7.3f} ({low:.3f} to {high:.3f})")
    report(
        "The averaged sweep of the shipped model (1 is fully restored, 0 not at all).", [], **facts
    )


if __name__ == "__main__":
    main()
