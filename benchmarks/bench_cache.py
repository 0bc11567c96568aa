"""What does keeping activations cost: all sites, the residual streams, one site?

Against the forward pass of the tapless twin (`twin.py`), at the published size. A cache holds the activations
themselves, not copies, so what remains is the memory that is not given back: page faults, not arithmetic.
"""

import torch
from paired import QUICK, compare, peak_mib, report
from twin import model_and_twin

SHAPES = [(1, 20, 60)] if QUICK else [(1, 20, 200), (50, 59, 12), (256, 59, 4)]
FILTERS = {
    "all sites": None,
    "resid_post": lambda name: name.endswith("resid_post"),
    "one site": "blocks.6.hook_resid_post",
}


@torch.no_grad()
def main() -> None:
    model, twin = model_and_twin()
    rows, facts = [], {}
    for batch, pos, pairs in SHAPES:
        tokens = torch.randint(1, 61, (batch, pos))
        for kept, names in FILTERS.items():
            logits, cache = model.run_with_cache(tokens, names)
            assert torch.equal(logits, twin(tokens))
            label = f"{batch}x{pos}, {kept}"
            facts[f"{label}, MiB"] = round(cache.nbytes / 2**20, 1)
            del logits, cache
            rows.append(
                compare(
                    label,
                    lambda t=tokens, n=names: model.run_with_cache(t, n),
                    lambda t=tokens: twin(t),
                    pairs,
                )
            )
    report("run_with_cache, against a plain forward pass.", rows, **facts, peak_mib=peak_mib())


if __name__ == "__main__":
    main()
