"""The command `othello-gpt`: `report`, `verify`, `probe`, `intervene`, `info`.

Heavy imports wait until a command needs them.
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 after an error or a failed check."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"othello-gpt: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="othello-gpt", description="Othello-GPT, looked at inside."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report", help="the circuit story of a pair of games, as text and a page"
    )
    report.add_argument(
        "--game", help="the clean game as labels: 'C3 C4 C5 ...' (row letter, column 0-7)"
    )
    report.add_argument(
        "--corrupted", help="the same game with another last move; found if left out"
    )
    report.add_argument("--answer", help="the reply to explain; the most affected one if left out")
    report.add_argument("--random", type=int, metavar="SEED", help="a random game, 21 moves long")
    report.add_argument("--out", type=Path, default=Path("othello-report.html"), help="the page")
    report.set_defaults(run=_report)

    verify = commands.add_parser(
        "verify", help="checks a checkpoint: layout, hash, folding, loss, legality"
    )
    _add_checkpoint(verify)
    verify.set_defaults(run=_verify)

    probe = commands.add_parser(
        "probe", help="what linear probes read, layer by layer, with baselines"
    )
    _add_checkpoint(probe)
    probe.add_argument(
        "--targets",
        nargs="+",
        default=["mine", "black"],
        metavar="TARGET",
        help="of mine, black, flipped, played, legal",
    )
    probe.add_argument("--games", type=int, default=1000, help="random games to fit on")
    probe.add_argument("--held-out", type=int, default=200, help="random games to score on")
    probe.add_argument("--hidden", type=int, help="size of a hidden layer, to add two-layer probes")
    probe.set_defaults(run=_probe)

    intervene = commands.add_parser("intervene", help="edits of the believed board, with controls")
    _add_checkpoint(intervene)
    intervene.add_argument("--cases", type=Path, help="published cases, intervention_benchmark.pkl")
    intervene.add_argument("--n", type=int, default=200, help="how many cases of our own otherwise")
    intervene.add_argument("--unnatural", action="store_true", help="boards that no game reaches")
    intervene.add_argument("--presets", nargs="+", metavar="PRESET", help="all if left out")
    intervene.add_argument(
        "--games", type=int, default=1000, help="random games to fit the probes on"
    )
    intervene.set_defaults(run=_intervene)

    info = commands.add_parser("info", help="versions and places, for bug reports")
    info.set_defaults(run=_info)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", help="file, folder or hub repository; the packaged one if left out"
    )
    parser.add_argument("--filename", help="the file in a folder or repository")


def _report(options: argparse.Namespace) -> int:
    from interp import report
    from othello_gpt import OthelloGPT

    model = OthelloGPT.from_pretrained()
    pair = _pair(options, model)
    story = report.tell(model, report.shipped_probes(), pair, progress=sys.stderr.isatty())
    print(report.summary(story))
    report.write_page(story, options.out)
    print(f"\nThe same with pictures: {options.out.resolve()}")
    return 0


def _pair(options: argparse.Namespace, model):
    from interp.report import Pair, find_pair
    from othello_gpt import board
    from othello_gpt.games import example_pair, parse_moves
    from othello_gpt.vocab import label_to_square

    if options.random is not None:
        return find_pair(model, board.random_games(1, options.random)[0, :21])
    if options.game is None:
        return Pair(*example_pair())
    clean = parse_moves(options.game)
    if options.corrupted is None:
        return find_pair(model, clean)
    if options.answer is None:
        raise ValueError("`--corrupted` needs `--answer`: the reply whose legality differs.")
    return Pair(clean, parse_moves(options.corrupted), label_to_square(options.answer))


def _verify(options: argparse.Namespace) -> int:
    from othello_gpt.verify import verify_checkpoint

    report = verify_checkpoint(options.file, filename=options.filename)
    print(report)
    return 0 if report.ok else 1


def _probe(options: argparse.Namespace) -> int:
    from interp.probes import probe_table
    from interp.targets import find_target
    from othello_gpt import OthelloGPT

    targets = [find_target(name) for name in options.targets]
    model = OthelloGPT.from_pretrained(options.file, filename=options.filename)
    games, held_out = _random_games(options.games, seed=1), _random_games(options.held_out, seed=2)
    progress = sys.stderr.isatty()
    print(probe_table(model, games, held_out, targets, hidden=options.hidden, progress=progress))
    return 0


def _intervene(options: argparse.Namespace) -> int:
    from interp.cases import natural_cases, published_cases, unnatural_cases
    from interp.intervene import presets
    from interp.intervention_benchmark import benchmark
    from interp.probes import fit_probes
    from othello_gpt import OthelloGPT

    model = OthelloGPT.from_pretrained(options.file, filename=options.filename)
    known, progress = presets(model), sys.stderr.isatty()
    if unknown := set(options.presets or ()) - set(known):
        raise ValueError(f"no preset is named {', '.join(unknown)}: there are {', '.join(known)}.")
    make = unnatural_cases if options.unnatural else natural_cases
    cases = published_cases(options.cases) if options.cases else make(options.n, seed=2)
    probes = fit_probes(model, _random_games(options.games, seed=1), progress=progress)
    edits = [known[name] for name in options.presets or known]
    print(benchmark(model, probes, cases, edits, progress=progress))
    return 0


def _random_games(n: int, seed: int):
    import torch

    from othello_gpt import board

    return torch.from_numpy(board.random_games(n, seed))


def _info(options: argparse.Namespace) -> int:
    import platform

    import torch

    import interp
    import othello_gpt

    print(f"othello-gpt {othello_gpt.__version__}, torch {torch.__version__}")
    print(
        f"Python {platform.python_version()} on {platform.platform()}, {torch.get_num_threads()} threads"
    )
    print(f"othello_gpt: {othello_gpt.__file__}\ninterp:      {interp.__file__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
