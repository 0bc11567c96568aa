"""What does one hook that does nothing cost at its site, here and in TransformerLens where that is installed?

A tiny model, in which the mathematics takes no time, against its tapless twin; TransformerLens's against the same
without hooks. Where a model happens to lie in memory moves that by a few tenths of a microsecond a site, so all
figures are medians over several models.
"""

from importlib.util import find_spec

import peers
import torch
from bench_hooks import hooks_on
from paired import QUICK, Comparison, compare, report
from twin import TINY, model_and_twin

MODELS, PAIRS = (3, 100) if QUICK else (15, 300)


@torch.no_grad()
def main() -> None:
    models = [model_and_twin(TINY, seed) for seed in range(MODELS)]  # at once: each lies elsewhere
    tokens, sites = torch.randint(1, 61, (1, 20)), len(hooks_on(models[0][0], None))
    tables = [our_rows(model, twin, tokens) for model, twin in models]
    if find_spec("transformer_lens"):
        for table, (model, _) in zip(tables, models, strict=True):
            table.append(transformer_lens_row(model, tokens))
    rows = [Comparison.median(same) for same in zip(*tables, strict=True)]
    report(
        "A tiny model with hooks on all sites, against the same mathematics without.",
        rows,
        sites=sites,
        models=MODELS,
        microseconds_a_site={row.name: round(row.overhead_ms * 1e3 / sites, 3) for row in rows},
    )


def our_rows(model, twin, tokens) -> list[Comparison]:
    hooks = hooks_on(model, None)
    assert torch.equal(model(tokens), twin(tokens))
    rows = [compare("no hooks", lambda: model(tokens), lambda: twin(tokens), PAIRS)]
    with model.hooks(hooks):
        assert torch.equal(model(tokens), twin(tokens))
        rows.append(compare("no-op", lambda: model(tokens), lambda: twin(tokens), PAIRS))
    assert torch.equal(model.run_with_hooks(tokens, hooks), twin(tokens))
    attached = compare(
        "attached, no-op and detached",
        lambda: model.run_with_hooks(tokens, hooks),
        lambda: twin(tokens),
        PAIRS,
    )
    return [*rows, attached]


def transformer_lens_row(model, tokens) -> Comparison:
    hooked, plain = peers.hooked_transformer(model), peers.hooked_transformer(model)
    with hooked.hooks(fwd_hooks=hooks_on(model, None)):
        for theirs in (hooked, plain):
            torch.testing.assert_close(theirs(tokens), model(tokens), rtol=0, atol=2e-5)
        name = "TransformerLens's no-op, against itself without"
        return compare(name, lambda: hooked(tokens), lambda: plain(tokens), PAIRS)


if __name__ == "__main__":
    main()
