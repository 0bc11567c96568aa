"""How much faster is a model with packed weights than the same model without?

Published size, random weights, one thread: forward passes, and sweeps of the last position of a 21-move pair.
"""

import time

import torch
from paired import QUICK, compare, report
from random_pair import random_pair
from twin import model_and_twin

from interp.patching import patch_sweep, patching_metric
from othello_gpt.packing import packed


@torch.no_grad()
def main() -> None:
    model, _ = model_and_twin()
    fast = packed(model)
    clean, corrupted = random_pair()
    metric = patching_metric(model(clean), model(corrupted), 7)
    cache = model.run_with_cache(clean)[1]
    start = time.process_time()
    fast(clean)
    packing_ms = round(1e3 * (time.process_time() - start))

    rows, worst = [], 0.0
    for n_games, n_pos in [(1, 1), (1, 4), (1, 20), (1, 59), (4, 59), (50, 59)][
        : 3 if QUICK else 6
    ]:
        tokens = torch.randint(1, 61, (n_games, n_pos))
        worst = max(worst, (fast(tokens) - model(tokens)).abs().max().item())
        pairs = 10 if QUICK or n_games > 1 else 100
        sides = [lambda m=m, t=tokens: m(t) for m in (fast, model)]
        rows.append(compare(f"forward {n_games}x{n_pos}", *sides, pairs))

    outputs = ("attn_out", "mlp_out")
    for name, sites, given, pairs in (
        ("16 layer outputs", outputs, {}, 40),
        ("16 layer outputs, keys and values given", outputs, {"clean_cache": cache}, 40),
        ("64 heads", ("z",), {}, 20),
        ("16 384 neurons", ("post",), {}, 4),
    ):
        sides = [
            lambda m=m, s=sites, g=given: patch_sweep(m, clean, corrupted, metric, s, **g)
            for m in (fast, model)
        ]
        found, expected = (side() for side in sides)
        worst = max([worst] + [(found[s] - expected[s]).abs().max().item() for s in sites])
        rows.append(compare(name, *sides, 2 if QUICK else pairs, 1))
    assert worst < 1e-4, worst
    report(
        "Packed weights against the same model.",
        rows,
        worst_difference=worst,
        packing_ms=packing_ms,
    )


if __name__ == "__main__":
    main()
