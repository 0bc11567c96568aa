"""What do hooks cost: none, 1, 8, 64 and all sites, no-op and patching, forward and backward?

Against the same mathematics with every `tap` taken out of the source (`twin.py`), at the published size, which says
what users feel. What one hook costs is a question for `bench_hook_cost.py`.
"""

import torch
from paired import QUICK, Comparison, compare, report
from twin import model_and_twin

SHAPES = [(1, 20, 60)] if QUICK else [(1, 20, 200), (50, 59, 8), (256, 59, 2)]


def no_op(activation, hook) -> None:
    """Looks and leaves."""


def patch(activation, hook) -> None:
    activation[0, -1] = activation[0, 0]


def hooks_on(model, n: int | None) -> list:
    names = [name for name in model.hook_names if not name.endswith("hook_result")]
    return [(name, no_op) for name in (names if n is None else names[:: len(names) // n][:n])]


def main() -> None:
    model, twin = model_and_twin()
    rows = []
    for batch, pos, pairs in SHAPES:
        tokens = torch.randint(1, 61, (batch, pos))
        rows += forward_rows(f"{batch}x{pos}", model, twin, tokens, pairs)
    tokens, everywhere = torch.randint(1, 61, (1, 20)), hooks_on(model, None)
    rows += [
        backward_row("1x20, with backward, no hooks", model, twin, tokens),
        backward_row(
            "1x20, with backward, no-op on all sites", model, twin, tokens, fwd_hooks=everywhere
        ),
        backward_row(
            "1x20, with backward, no-op on all gradients", model, twin, tokens, bwd_hooks=everywhere
        ),
    ]
    report(
        "A model with hook sites, against the same mathematics without (ours / other is the overhead).",
        rows,
    )


@torch.no_grad()
def forward_rows(name: str, model, twin, tokens, pairs: int) -> list[Comparison]:
    assert torch.equal(model(tokens), twin(tokens))
    warm_up = 5 if len(tokens) == 1 else 1

    def row(label: str, ours, pairs: int = pairs) -> Comparison:
        return compare(f"{name}, {label}", ours, lambda: twin(tokens), pairs, warm_up)

    # the smallest difference of all takes the most pairs
    rows = [row("no hooks", lambda: model(tokens), 3 * pairs)]
    for n in (1, 8, 64, None):
        with model.hooks(hooks_on(model, n)):
            assert torch.equal(model(tokens), twin(tokens))
            label = f"no-op on {'all sites' if n is None else n}"
            rows.append(row(label, lambda: model(tokens)))
    for label, hooks in (
        ("attached, no-op and detached on all sites", hooks_on(model, None)),
        ("attached, patch and detached on one site", [("blocks.3.hook_attn_out", patch)]),
    ):
        rows.append(row(label, lambda h=hooks: model.run_with_hooks(tokens, h)))
    return rows


def backward_row(name: str, model, twin, tokens, **hooks) -> Comparison:
    def ours() -> None:
        model.run_with_hooks(tokens, **hooks).logsumexp(-1).sum().backward()

    def other() -> None:
        twin(tokens).logsumexp(-1).sum().backward()

    gradients = []
    for side in (ours, other):
        model.zero_grad()
        side()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    return compare(name, ours, other, 20 if QUICK else 80)


if __name__ == "__main__":
    main()
