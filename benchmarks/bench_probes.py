"""How much faster are probes of all residual sites in one pass than a straightforward trainer's run for each?

The packaged model, nine sites, mine and theirs, the same games. The straightforward trainer works in the manner
of the exercise (ARENA 1.5.3, section 4): one layer a run, activations of all layers made anew in each, AdamW on the
cross-entropy. It is given better settings than there (all positions, engine labels, first weights of zero, a
learning rate of 1e-2 that falls to zero), which serve this model's long residual stream. Probes are scored on the
same 300 other games. Then: how long does the intervention benchmark take with one linear edit of 1001 cases?

    python benchmarks/bench_probes.py [number of games]
"""

import sys
import time

import torch
from paired import Comparison, report

from interp.cases import natural_cases
from interp.intervene import presets, run_edited
from interp.intervention_benchmark import outcome
from interp.probes import MINE, LinearProbe, fit_probes, probe_accuracy
from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens

LAYERS = range(-1, 8)


def main() -> None:
    n_games = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    torch.set_num_threads(1)
    model = OthelloGPT.from_pretrained()
    games, held_out = (
        torch.from_numpy(board.random_games(n, s)) for n, s in ((n_games, 1), (300, 2))
    )
    ours, our_seconds = _timed(lambda: fit_probes(model, games))
    runs = [_timed(lambda layer=layer: _straightforward(model, games, layer)) for layer in LAYERS]
    their_seconds = sum(seconds for _, seconds in runs)
    accuracy = {
        name: [
            round(share, 4) for share in probe_accuracy(model, probes, held_out).by_layer.tolist()
        ]
        for name, probes in (("ours", ours), ("straightforward", [probe for probe, _ in runs]))
    }
    ratio = their_seconds / our_seconds
    row = Comparison(
        f"nine sites, {n_games} games",
        1e3 * our_seconds,
        1e3 * their_seconds,
        ratio,
        ratio,
        ratio,
        1,
    )
    for a, b in zip(*accuracy.values(), strict=True):
        assert a > b - 0.005, accuracy  # as accurate, layer by layer
    _, edit_seconds = _timed(lambda: _edits(model, ours))
    question = "Probes of nine sites: one pass against nine straightforward runs, processor time."
    report(question, [row], accuracy=accuracy, seconds_for_1001_edited_cases=round(edit_seconds, 1))


def _timed(call):
    """What a call gives, and the seconds of processor that it takes: one thread, whoever else is running."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def _straightforward(model: OthelloGPT, games: torch.Tensor, layer: int) -> LinearProbe:
    W = torch.zeros(model.cfg.d_model, 64, 3, requires_grad=True)
    b = torch.zeros(64, 3, requires_grad=True)
    batches = games.split(32)
    optimizer = torch.optim.AdamW([W, b], 1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for batch in batches:
        with torch.no_grad():
            _, cache = model.run_with_cache(games_to_tokens(batch), lambda name: "resid_p" in name)
        record = board.play(batch.numpy())
        live = torch.from_numpy(record.to_move[:, :59] != 0)
        resid = cache["resid_pre", 0] if layer == -1 else cache["resid_post", layer]
        logits = torch.tensordot(resid[live], W, 1) + b
        labels = MINE(record)[:, :59][live].flatten(1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) * 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return LinearProbe(W.detach().unflatten(1, (8, 8)), b.detach().view(8, 8, 3), layer)


def _edits(model: OthelloGPT, probes: list[LinearProbe]) -> None:
    cases = natural_cases(1001, seed=0)
    unedited = run_edited(model, cases, None, probes)
    outcome(cases, run_edited(model, cases, presets(model)["set"], probes), unedited, probes[-1])


if __name__ == "__main__":
    main()
