"""What do a forward pass, a no-op hook, a patch and a full cache cost here and in the peers that are installed?

The same weights at the published size; TransformerLens, nnsight, pyvene and baukit where installed, and
torch's own module hooks on the tapless twin. "All" is what each library can see: 142 sites here and in
TransformerLens, modules in the others, which therefore keep less: neither scores nor normalised streams.

Where weights happen to lie in memory moves the ratio of two short runs by some hundredths, so for a single game
every figure is the median over several models.
"""

from functools import partial

import peers
import torch
from paired import QUICK, Comparison, compare, report
from twin import model_and_twin

# batch, positions, models, pairs for each
SHAPES = [(1, 20, 3, 10)] if QUICK else [(1, 20, 5, 40), (50, 59, 1, 7), (256, 59, 1, 2)]


@torch.no_grad()
def main() -> None:
    most = max(n_models for _, _, n_models, _ in SHAPES)
    models = [model_and_twin(seed=seed) for seed in range(most)]  # at once: each lies elsewhere
    found = [peers.installed(model, twin) for model, twin in models]
    rows, facts = [], {}
    for batch, pos, n_models, pairs in SHAPES:
        tokens = torch.randint(1, 61, (batch, pos))
        tables = [rows_of(*models[i], found[i], tokens, pairs) for i in range(n_models)]
        rows += [Comparison.median(same) for same in zip(*tables, strict=True)]
        facts[f"{batch}x{pos}, models"] = n_models
    report("Ours against the peers.", rows, peers=sorted(found[0]), **facts)


def rows_of(model, twin, found: dict[str, peers.Peer], tokens, pairs: int) -> list[Comparison]:
    """One model against each peer that has its weights."""
    batch, pos = tokens.shape
    site = "blocks.3.hook_attn_out"
    no_op = [(site, lambda activation, hook: None)]
    everywhere = [(lambda name: not name.endswith("hook_result"), lambda activation, hook: None)]
    patch = [(site, lambda activation, hook: peers.blank(activation))]
    ours = {
        "forward": model,
        "no_op": lambda tokens: model.run_with_hooks(tokens, no_op),
        "no_op_all": lambda tokens: model.run_with_hooks(tokens, everywhere),
        "patch": lambda tokens: model.run_with_hooks(tokens, patch),
        "cache_all": lambda tokens: model.run_with_cache(tokens)[0],
    }
    rows = []
    for name, peer in found.items():
        for what, run in ours.items():
            theirs = getattr(peer, what)
            if theirs is None or (what == "forward" and peer.forward is twin):
                continue
            if batch > 100 and what not in ("forward", "cache_all"):  # no more than that
                continue
            torch.testing.assert_close(run(tokens), theirs(tokens), rtol=0, atol=2e-5)
            label = f"{batch}x{pos}, {what} | {name}"
            warm_up = 1 if batch > 1 else 3
            rows.append(
                compare(label, partial(run, tokens), partial(theirs, tokens), pairs, warm_up)
            )
    return rows


if __name__ == "__main__":
    main()
