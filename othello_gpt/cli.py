"""The command `othello-gpt`: report, atlas, verify, convert, info. Heavy imports wait until a command needs them."""

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

    atlas = commands.add_parser("atlas", help="all neurons with their rules, as one page")
    atlas.add_argument(
        "--layer", type=int, action="append", help="this layer only; may be repeated"
    )
    atlas.add_argument("--games", type=int, default=200, help="random games to find rules on")
    atlas.add_argument("--out", type=Path, default=Path("othello-atlas.html"), help="the page")
    atlas.add_argument(
        "--table", type=Path, help="also keep weights and statistics, as safetensors"
    )
    atlas.set_defaults(run=_atlas)

    verify = commands.add_parser(
        "verify", help="checks a checkpoint: layout, hash, folding, loss, legality"
    )
    verify.add_argument(
        "file", nargs="?", help="file, folder or hub repository; the packaged one if left out"
    )
    verify.add_argument("--filename", help="the file in a folder or repository")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser(
        "convert",
        help="a checkpoint of any layout as a folder of ours, or as TransformerLens's .pth",
    )
    convert.add_argument("source", help="file, folder or hub repository")
    convert.add_argument(
        "out", type=Path, help="a folder; or a file.pth in TransformerLens's layout"
    )
    convert.add_argument("--filename", help="the file in a folder or repository")
    convert.add_argument(
        "--fold", action="store_true", help="fold LayerNorm and centre the weights"
    )
    convert.set_defaults(run=_convert)

    info = commands.add_parser("info", help="versions and places, for bug reports")
    info.set_defaults(run=_info)
    return parser


def _report(options: argparse.Namespace) -> int:
    from interp import report
    from othello_gpt import OthelloGPT

    model = OthelloGPT.from_pretrained()
    pair, game = _pair_and_game(options, model)
    story = report.tell(model, report.shipped_probes(), pair, game, progress=sys.stderr.isatty())
    print(report.summary(story))
    report.write_page(story, options.out)
    print(f"\nThe same with pictures: {options.out.resolve()}")
    return 0


def _pair_and_game(options: argparse.Namespace, model):
    """The pair, and the whole game that begins with its clean one."""
    from interp.report import EXAMPLE_GAME, Pair, find_pair
    from othello_gpt import board
    from othello_gpt.games import example_pair, parse_moves
    from othello_gpt.vocab import label_to_square

    if options.random is not None:
        game = board.random_games(1, options.random)[0]
        return find_pair(model, game[:21]), game
    if options.game is None:
        return Pair(*example_pair()), parse_moves(EXAMPLE_GAME)
    clean = parse_moves(options.game)
    if options.corrupted is None:
        return find_pair(model, clean), clean
    if options.answer is None:
        raise ValueError("`--corrupted` needs `--answer`: the reply whose legality differs.")
    return Pair(clean, parse_moves(options.corrupted), label_to_square(options.answer)), clean


def _atlas(options: argparse.Namespace) -> int:
    import torch

    from interp.atlas import AtlasGames, make_atlas
    from interp.atlas_page import write_page
    from interp.probes import probe_accuracy
    from interp.report import shipped_probes
    from othello_gpt import OthelloGPT

    model, games = OthelloGPT.from_pretrained(), AtlasGames.random(options.games)
    if bad := [layer for layer in options.layer or () if not 0 <= layer < model.cfg.n_layers]:
        raise ValueError(f"`--layer` is {bad[0]}: layers are 0 to {model.cfg.n_layers - 1}.")
    probes = shipped_probes()
    accuracy = probe_accuracy(model, probes, torch.from_numpy(games.held_out[:50]))
    best = probes[int(accuracy.by_layer.argmax())]
    atlas = make_atlas(model, best, games, options.layer, progress=sys.stderr.isatty())
    write_page(atlas, options.out)
    if options.table is not None:
        atlas.table.save(options.table)
    high = sum(described.score.f1 > 0.8 for described in atlas.described)
    print(
        f"{len(atlas.described)} neurons, {high} with a rule above F1 0.8: {options.out.resolve()}"
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from othello_gpt.verify import verify_checkpoint

    report = verify_checkpoint(options.file, filename=options.filename)
    print(report)
    return 0 if report.ok else 1


def _convert(options: argparse.Namespace) -> int:
    import torch

    from othello_gpt import OthelloGPT
    from othello_gpt.weights import to_transformer_lens

    if options.out.exists():
        raise ValueError(f"'{options.out}' is there already: name another place.")
    model = OthelloGPT.from_pretrained(options.source, filename=options.filename, fold=options.fold)
    if options.out.suffix == ".pth":
        partial = options.out.with_name(options.out.name + ".partial")
        torch.save(to_transformer_lens(model), partial)
        partial.replace(options.out)
    else:
        model.save_pretrained(options.out)
    print(f"{options.out.resolve()}: {model.cfg}")
    return 0


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
