"""What does keeping activations cost: all sites, the residual streams, one site?

Against the forward pass of the tapless twin (`twin.py`), at the published size. A cache holds the activations
themselves, not copies, so what remains is fresh memory: page faults, not arithmetic. For tensors of up to 32 MiB,
so at 50x59 but not at 256x59, `run_with_cache` spares most of those by itself. Once more, therefore, after
`keep_freed_memory()`.
"""

import torch
from paired import QUICK, Comparison, compare, peak_mib, report
from twin import model_and_twin

from othello_gpt.memory import keep_freed_memory

SHAPES = [(1, 20, 60)] if QUICK else [(1, 20, 200), (50, 59, 24), (256, 59, 4)]
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
            assert torch.equal(cache["resid_post", 6], twin(tokens, stop_at_layer=7))
            label = f"{batch}x{pos}, {kept}"
            facts[f"{label}, MiB"] = round(cache.nbytes / 2**20, 1)
            del logits, cache
            rows.append(row(label, model, twin, tokens, names, pairs))
    if keep_freed_memory():
        for batch, pos, pairs in SHAPES:
            tokens = torch.randint(1, 61, (batch, pos))
            label = f"{batch}x{pos}, all sites, freed memory kept"
            rows.append(row(label, model, twin, tokens, None, pairs))
    report("run_with_cache, against a plain forward pass.", rows, **facts, peak_mib=peak_mib())


def row(label: str, model, twin, tokens, names, pairs: int) -> Comparison:
    return compare(label, lambda: model.run_with_cache(tokens, names), lambda: twin(tokens), pairs)


if __name__ == "__main__":
    main()
