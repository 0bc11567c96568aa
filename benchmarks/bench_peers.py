"""What do a forward pass, a no-op hook, a patch and a full cache cost here and in the peers that are installed?

The same weights at the published size; TransformerLens, nnsight, pyvene and baukit where installed, and
torch's own module hooks on the tapless twin. "All" is what each library can see: 142 sites here and in
TransformerLens, modules in the others, which therefore keep less: neither scores nor normalised streams.
"""

import peers
import torch
from paired import QUICK, compare, report
from twin import model_and_twin

SHAPES = [(1, 20, 30)] if QUICK else [(1, 20, 100), (50, 59, 7), (256, 59, 2)]


@torch.no_grad()
def main() -> None:
    model, twin = model_and_twin()
    found, rows = peers.installed(model, twin), []
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
    for batch, pos, pairs in SHAPES:
        tokens = torch.randint(1, 61, (batch, pos))
        for name, peer in found.items():
            for what, run in ours.items():
                theirs = getattr(peer, what)
                if theirs is None or (what == "forward" and peer.forward is twin):
                    continue
                if batch > 100 and "cache" not in what and what != "forward":  # no more than that
                    continue
                torch.testing.assert_close(run(tokens), theirs(tokens), rtol=0, atol=2e-5)
                label = f"{batch}x{pos}, {what} | {name}"
                rows.append(
                    compare(
                        label,
                        lambda t=tokens, run=run: run(t),
                        lambda t=tokens, theirs=theirs: theirs(t),
                        pairs,
                        1 if batch > 1 else 3,
                    )
                )
    report("Ours against the peers.", rows, peers=sorted(found))


if __name__ == "__main__":
    main()
