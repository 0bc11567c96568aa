"""What does one hook that does nothing cost at its site, here and in TransformerLens where that is installed?

A tiny model, in which the mathematics takes no time, against its tapless twin; TransformerLens's against the same
without hooks. Several such models take turns, and are timed in two ways: in a loop, as when somebody runs one model
again and again, from the ninth pass of a turn to the twentieth; and on its own, the first pass after those of other
models, when the processor's caches hold nothing of this one. All figures are medians over processes, one after
another, of medians over the models in each.
"""

import multiprocessing
from contextlib import ExitStack
from importlib.util import find_spec

import peers
import torch
from bench_hooks import hooks_on
from paired import QUICK, Comparison, report, rotate
from twin import TINY, model_and_twin

from othello_gpt import OthelloGPT

PROCESSES, MODELS = (3 if QUICK else 12), 2
WAYS = {  # rounds of turns, and how many passes of a turn are not timed, and how many are
    " in a loop": (5 if QUICK else 20, 8, 12),
    " on its own": (60 if QUICK else 100, 0, 1),
}
AGAINST = {
    "no hooks": "twin",
    "no-op": "twin",
    "attached, no-op and detached": "twin",
    "no sites on either side": "twin",
    "TransformerLens's no-op": "TransformerLens",
}


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
    tokens = torch.randint(1, 61, (1, 20))
    with ExitStack() as attached:
        sides = {}
        for i in range(MODELS):
            calls = sides_of_a_model(MODELS * process + i, tokens, attached)
            sides |= {(label, i): call for label, call in calls.items()}
        rows = []
        for way, turns in WAYS.items():
            seconds = rotate(sides, *turns)
            for label, other in AGAINST.items():
                if (label, 0) not in sides:
                    continue
                of_each_model = [
                    Comparison.of(label + way, seconds[label, i], seconds[other, i])
                    for i in range(MODELS)
                ]
                rows.append(Comparison.median(of_each_model))
    return rows


def sides_of_a_model(seed: int, tokens, attached: ExitStack) -> dict:
    """Passes that all give the same; the hooks stay until `attached` ends."""
    model, twin = model_and_twin(TINY, seed)
    hooks = hooks_on(model, None)
    hooked, tapless = model_and_twin(TINY, seed)
    attached.enter_context(hooked.hooks(hooks))
    sides = {
        "twin": lambda: twin(tokens),
        "no hooks": lambda: model(tokens),
        "no-op": lambda: hooked(tokens),
        "attached, no-op and detached": lambda: model.run_with_hooks(tokens, hooks),
        "no sites on either side": lambda: tapless(tokens),  # the error of the other rows
    }
    for call in sides.values():
        assert torch.equal(call(), twin(tokens))
    if find_spec("transformer_lens"):
        plain, theirs = peers.hooked_transformer(model), peers.hooked_transformer(model)
        attached.enter_context(theirs.hooks(fwd_hooks=hooks))
        for name, peer in ("TransformerLens", plain), ("TransformerLens's no-op", theirs):
            torch.testing.assert_close(peer(tokens), twin(tokens), rtol=0, atol=2e-5)
            sides[name] = lambda peer=peer: peer(tokens)
    return sides


if __name__ == "__main__":
    main()
