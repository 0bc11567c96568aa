"""What does one hook that does nothing cost at its site, here and in TransformerLens where that is installed?

A tiny model, in which the mathematics takes no time, against its tapless twin; TransformerLens's against the same
without hooks. Where a model and a process's code happen to lie in memory moves that by a few tenths of a microsecond
a site, so all figures are medians over processes, one after another, of medians over several models in each.
"""

import multiprocessing
from importlib.util import find_spec

import peers
import torch
from bench_hooks import hooks_on
from paired import QUICK, Comparison, compare, report
from twin import TINY, model_and_twin, take_taps_out

from othello_gpt import OthelloGPT

PROCESSES, MODELS, PAIRS = (3, 2, 60) if QUICK else (10, 3, 150)


def main() -> None:
    # a new interpreter for each task, so that code lies elsewhere too
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        tables = pool.map(rows_of_a_process, range(PROCESSES), chunksize=1)
    by_row = list(zip(*tables, strict=True))
    rows = [Comparison.median(same) for same in by_row]
    sites = len(hooks_on(OthelloGPT(TINY), None))

    def microseconds(row: Comparison) -> float:
        return round(row.overhead_ms * 1e3 / sites, 3)

    report(
        "A tiny model with hooks on all sites, against the same mathematics without.",
        rows,
        sites=sites,
        models_in_each_process=MODELS,
        microseconds_a_site={row.name: microseconds(row) for row in rows},
        of_each_process={same[0].name: [microseconds(row) for row in same] for same in by_row},
    )


@torch.no_grad()
def rows_of_a_process(process: int) -> list[Comparison]:
    """Medians over some models that lie in memory at once."""
    models = [model_and_twin(TINY, MODELS * process + i) for i in range(MODELS)]
    tokens = torch.randint(1, 61, (1, 20))
    tables = [our_rows(model, twin, tokens) for model, twin in models]
    if find_spec("transformer_lens"):
        for table, (model, _) in zip(tables, models, strict=True):
            table.append(transformer_lens_row(model, tokens))
    return [Comparison.median(same) for same in zip(*tables, strict=True)]


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
    take_taps_out(model)  # how much two models without sites differ is the error of the other rows
    assert torch.equal(model(tokens), twin(tokens))
    control = compare("no sites on either side", lambda: model(tokens), lambda: twin(tokens), PAIRS)
    return [*rows, attached, control]


def transformer_lens_row(model, tokens) -> Comparison:
    hooked, plain = peers.hooked_transformer(model), peers.hooked_transformer(model)
    with hooked.hooks(fwd_hooks=hooks_on(model, None)):
        for theirs in (hooked, plain):
            torch.testing.assert_close(theirs(tokens), model(tokens), rtol=0, atol=2e-5)
        name = "TransformerLens's no-op, against itself without"
        return compare(name, lambda: hooked(tokens), lambda: plain(tokens), PAIRS)


if __name__ == "__main__":
    main()
