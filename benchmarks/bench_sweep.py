"""How much faster is the exact sweep than one hooked forward pass a patch?

Published size, random weights, pairs of 21 moves, one thread; the corrupted run's own pass is counted in, and
where it says so the clean run's keys and values are given, as in the exercise, and the weights are packed
(`othello_gpt.packing`; once a model, which `bench_packing.py` times). The loop is TransformerLens's where it is
installed, and this library's own otherwise; for 64 heads and for 16 384 neurons it is timed on a sample and scaled.
"""

import torch
from paired import QUICK, Comparison, compare, peak_mib, report
from random_pair import random_pair
from twin import model_and_twin

from interp.metrics import LastMetric
from interp.patching import patch_sweep, patching_metric
from othello_gpt.packing import packed

N_SAMPLE = 16 if QUICK else 64


class Loop:
    """One hooked pass a patch, by TransformerLens or by ourselves."""

    def __init__(self, model, clean, corrupted, metric) -> None:
        self.theirs, self.name, self.metric, self.corrupted = (
            model,
            "our own loop",
            metric,
            corrupted,
        )
        try:
            import peers

            theirs = peers.transformer_lens(model).forward
            self.theirs, self.name = theirs, "TransformerLens's loop"
        except ImportError:
            pass
        self.cache = self.theirs.run_with_cache(clean)[1]

    def patch(self, site: str, layer: int, part=slice(None)) -> torch.Tensor:
        """The metric of each game."""
        inside = {"z": "attn.hook_z", "post": "mlp.hook_post"}.get(site, f"hook_{site}")
        name = f"blocks.{layer}.{inside}"

        def fn(activation, hook):
            activation[:, -1, part] = self.cache[name][:, -1, part]
            return activation

        logits = self.theirs.run_with_hooks(self.corrupted, fwd_hooks=[(name, fn)])
        return self.metric.rows(logits[:, -1:])[:, 0]

    def patch_all(self) -> torch.Tensor:
        """The metric of each game, with each of 16 layer outputs patched."""
        outputs = [(site, layer) for site in ("attn_out", "mlp_out") for layer in range(8)]
        return torch.stack([self.patch(*output) for output in outputs], 1)


@torch.no_grad()
def main() -> None:
    model, _ = model_and_twin()
    clean, corrupted = random_pair()
    metric = patching_metric(model(clean), model(corrupted), 7)
    peak = neuron_memory(model, clean, corrupted, metric)  # first, before anything else took memory
    loop = Loop(model, clean, corrupted, metric)
    cache, fast = model.run_with_cache(clean)[1], packed(model)
    fast(clean)  # packs
    ways = [
        ("", model, {}),
        (", keys and values given", model, {"clean_cache": cache}),
        (", packed", fast, {}),
        (", packed, keys and values given", fast, {"clean_cache": cache}),
    ]
    indices = {
        "attn_out": [("attn_out", layer) for layer in range(8)],
        "mlp_out": [("mlp_out", layer) for layer in range(8)],
        "z": [("z", layer, head) for layer in range(8) for head in range(8)],
        "post": [("post", n // 2048, n % 2048) for n in torch.randperm(16384)[:N_SAMPLE].tolist()],
    }
    rows, worst = [], 0.0
    for name, sites, n_all, pairs in (
        ("16 layer outputs", ("attn_out", "mlp_out"), 16, 10),
        ("64 heads", ("z",), 64, 4),
        ("16 384 neurons", ("post",), 16384, 2),
    ):
        swept = patch_sweep(model, clean, corrupted, metric, sites)
        chosen = [index for site in sites for index in indices[site]]
        for site, layer, *part in chosen:
            effect = swept[site][layer, part[0]] if part else swept[site][layer]
            worst = max(worst, (loop.patch(site, layer, *part) - effect).abs().item())
        sample = chosen if len(sites) == 2 else chosen[:: max(1, len(chosen) // N_SAMPLE)]
        for label, of, given in ways[:: 2 if name.endswith("neurons") else 1]:

            def sweep(m=of, s=sites, g=given) -> dict[str, torch.Tensor]:
                return patch_sweep(m, clean, corrupted, metric, s, **g)

            for site, effects in sweep().items():
                worst = max(worst, (effects - swept[site]).abs().max().item())
            row = compare(
                name + label, sweep, lambda c=sample: [loop.patch(*index) for index in c], pairs, 1
            )
            rows.append(scaled(row, n_all / len(sample)))
    assert worst < 1e-4, worst
    rows += many_pairs(model)
    report(
        f"The sweep against {loop.name}.", rows, worst_difference=worst, peak_mib_of_neurons=peak
    )


def scaled(row: Comparison, factor: float) -> Comparison:
    """The loop's time for all patches from that for a sample."""
    name = row.name if factor == 1 else f"{row.name} (loop scaled x{factor:g})"
    times = (factor * value for value in row[2:6])
    return Comparison(name, row.ours_ms, *times, row.pairs)


def many_pairs(model) -> list[Comparison]:
    """200 pairs x 16 sites, against the loop over the first few pairs, scaled; and with all games in each pass."""
    n, few = (20, 1) if QUICK else (200, 2)
    clean, corrupted = random_pair(n)
    metric = LastMetric(lambda logits: logits.log_softmax(-1)[..., 7])
    swept = torch.cat([*patch_sweep(model, clean, corrupted, metric).values()], 1)

    def row(label: str, n_games: int, size: int) -> Comparison:
        batches = zip(clean[:n_games].split(size), corrupted[:n_games].split(size), strict=True)
        loops = [Loop(model, *games, metric) for games in batches]
        looped = torch.cat([loop.patch_all() for loop in loops])
        torch.testing.assert_close(swept[:n_games], looped, rtol=0, atol=1e-4)
        return compare(
            f"{n} pairs x 16{label}",
            lambda: patch_sweep(model, clean, corrupted, metric),
            lambda: [loop.patch_all() for loop in loops],
            2,
            1,
        )

    return [
        scaled(row(", a game a pass", few, 1), n / few),
        row(", all games in each pass", n, n),
    ]


def neuron_memory(model, clean, corrupted, metric) -> float:
    """By how many MiB the sweep of all neurons raises the most memory ever held, in a process of its own."""
    import os

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak_mib()
        patch_sweep(model, clean, corrupted, metric, ["post"])
        os.write(writer, str(round(peak_mib() - before, 1)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(reader, 64))


if __name__ == "__main__":
    main()
