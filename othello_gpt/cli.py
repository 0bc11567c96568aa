"""The command `othello-gpt`, a function for each of its subcommands.

Heavy imports wait until a command needs them.
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 after an error, a failed check or a stopped training."""
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
    for add in (
        _add_report,
        _add_atlas,
        _add_probe,
        _add_intervene,
        _add_evaluate,
        _add_verify,
        _add_convert,
        _add_train,
        _add_bench,
        _add_info,
    ):
        add(commands)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", help="file, folder or hub repository; the packaged one if left out"
    )
    parser.add_argument("--filename", help="the file in a folder or repository")


def _add_n_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--n-heads", type=int, help="of a checkpoint in minGPT's layout, which does not tell; 8"
    )


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report", help="the circuit story of a pair of games, as text and a page"
    )
    which = report.add_mutually_exclusive_group()
    which.add_argument(
        "--game", help="the clean game as labels: 'C3 C4 C5 ...' (row letter, column 0-7)"
    )
    report.add_argument(
        "--corrupted", help="the same game with another last move; found if left out"
    )
    report.add_argument("--answer", help="the reply to explain; the most affected one if left out")
    which.add_argument("--random", type=int, metavar="SEED", help="a random game, 21 moves long")
    report.add_argument(
        "--pairs", type=int, default=300, help="pairs over which the sweep is averaged"
    )
    report.add_argument("--out", type=Path, default=Path("othello-report.html"), help="the page")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from interp import story
    from interp.report import write_page
    from othello_gpt import OthelloGPT

    model = OthelloGPT.from_pretrained()
    pair, game = _pair_and_game(options, model)
    told = story.tell(
        model,
        story.shipped_probes(),
        pair,
        game,
        n_pairs=options.pairs,
        progress=sys.stderr.isatty(),
    )
    print(story.summary(told))
    write_page(told, options.out)
    print(f"\nThe same with pictures: {options.out.resolve()}")
    return 0


def _pair_and_game(options: argparse.Namespace, model):
    """The pair, and the whole game that begins with its clean one."""
    from interp.pairs import find_pair
    from othello_gpt import board
    from othello_gpt.games import example_game, example_pair, parse_moves
    from othello_gpt.vocab import label_to_square

    if options.random is not None:
        game = board.random_games(1, options.random)[0]
    else:
        game = example_game() if options.game is None else parse_moves(options.game)
    clean = game if options.game is not None else game[:21]
    corrupted = None if options.corrupted is None else parse_moves(options.corrupted)
    answer = None if options.answer is None else label_to_square(options.answer)
    named = (options.random, options.game, options.corrupted, options.answer)
    if all(name is None for name in named):
        return example_pair(), game
    return find_pair(model, clean, corrupted, answer), game


def _add_atlas(commands) -> None:
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


def _atlas(options: argparse.Namespace) -> int:
    import torch

    from interp.atlas import AtlasGames, make_atlas
    from interp.atlas_page import write_page
    from interp.probes import probe_accuracy
    from interp.story import shipped_probes
    from othello_gpt import OthelloGPT

    model, games = OthelloGPT.from_pretrained(), AtlasGames.random(options.games)
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


def _add_probe(commands) -> None:
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
    _add_n_heads(probe)
    probe.set_defaults(run=_probe)


def _probe(options: argparse.Namespace) -> int:
    from interp.probes import probe_table
    from interp.targets import find_target
    from othello_gpt import OthelloGPT

    targets = [find_target(name) for name in options.targets]
    model = OthelloGPT.from_pretrained(
        options.file, filename=options.filename, n_heads=options.n_heads
    )
    games, held_out = _random_games(options.games, seed=1), _random_games(options.held_out, seed=2)
    progress = sys.stderr.isatty()
    print(probe_table(model, games, held_out, targets, hidden=options.hidden, progress=progress))
    return 0


def _add_intervene(commands) -> None:
    intervene = commands.add_parser("intervene", help="edits of the believed board, with controls")
    _add_checkpoint(intervene)
    intervene.add_argument("--cases", type=Path, help="published cases, intervention_benchmark.pkl")
    intervene.add_argument("--n", type=int, help="how many cases of our own otherwise; 200")
    intervene.add_argument(
        "--unnatural", action="store_true", help="of our own, boards that no game reaches"
    )
    intervene.add_argument("--presets", nargs="+", metavar="PRESET", help="all if left out")
    intervene.add_argument(
        "--games",
        type=int,
        default=1000,
        help="random games to fit the probes on; the packaged model has its own",
    )
    _add_n_heads(intervene)
    intervene.set_defaults(run=_intervene)


def _intervene(options: argparse.Namespace) -> int:
    from interp.cases import natural_cases, published_cases, unnatural_cases
    from interp.intervene import presets
    from interp.intervention_benchmark import benchmark
    from interp.probes import LinearProbe, train_probes
    from interp.story import shipped_probes
    from othello_gpt import OthelloGPT

    model = OthelloGPT.from_pretrained(
        options.file, filename=options.filename, n_heads=options.n_heads
    )
    known, progress = presets(model), sys.stderr.isatty()
    if unknown := set(options.presets or ()) - set(known):
        raise ValueError(f"no preset is named {', '.join(unknown)}: there are {', '.join(known)}.")
    if options.cases and (options.n is not None or options.unnatural):
        raise ValueError("`--cases` brings all its own: leave `--n` and `--unnatural` out.")
    make = unnatural_cases if options.unnatural else natural_cases
    n = 200 if options.n is None else options.n
    cases = published_cases(options.cases) if options.cases else make(n, seed=2)
    if options.file is None:
        probes = [LinearProbe.from_pretrained(-1), *shipped_probes()]
    else:
        probes = train_probes(model, _random_games(options.games, seed=1), progress=progress)
    edits = [known[name] for name in options.presets or known]
    print(benchmark(model, probes, cases, edits, progress=progress))
    return 0


def _random_games(n: int, seed: int):
    import torch

    from othello_gpt import board

    return torch.from_numpy(board.random_games(n, seed))


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser("evaluate", help="how well models know the rules, ply by ply")
    evaluate.add_argument(
        "models", nargs="*", help="files, folders or repositories; the packaged one if left out"
    )
    evaluate.add_argument("--filename", help="the file in folders or repositories")
    evaluate.add_argument(
        "--games", type=int, help="how many; 2000, or all of a file's, by default"
    )
    evaluate.add_argument("--seed", type=int, help="of the random games; 2024, kept for this")
    evaluate.add_argument("--file", type=Path, help="games of a file in place of random ones")
    evaluate.add_argument("--notation", choices=("label", "li", "standard"), help="of the file")
    evaluate.add_argument("--by-ply", action="store_true", help="a line for each ply, too")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="writes all figures")
    _add_n_heads(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from othello_gpt import OthelloGPT, evaluate

    games, rows, by_ply = _games(options), {}, {}
    for source in options.models or [None]:
        model = OthelloGPT.from_pretrained(
            source, filename=options.filename, n_heads=options.n_heads
        )
        scores = evaluate.evaluate(model, games, progress=sys.stderr.isatty())
        name = source or "small"
        rows[name], by_ply[name] = evaluate.summary(scores), evaluate.summary_by_ply(scores)
    print(f"{len(games)} games; 95 % intervals by resampling games\n")
    if options.by_ply:
        for name, plies in by_ply.items():
            print(
                evaluate.table({str(ply): row for ply, row in plies.items()}, f"{name}, ply"), "\n"
            )
    print(evaluate.table(rows | evaluate.PUBLISHED))
    if options.json:
        import json

        figures = {"models": rows, "by_ply": by_ply}
        text = json.dumps(figures, indent=1, default=lambda x: x.item() if x.isfinite() else None)
        options.json.write_text(text + "\n")
    return 0


def _games(options: argparse.Namespace):
    from othello_gpt import board, evaluate, games

    if options.games is not None and options.games < 1:
        raise ValueError(
            f"`--games` is {options.games}: there must be at least one to evaluate on."
        )
    if options.file:
        if options.seed is not None:
            raise ValueError("`--seed` is of random games: leave it out, or `--file`.")
        return games.load_games(options.file, notation=options.notation)[: options.games]
    if options.notation:
        raise ValueError("`--notation` is of a file's games: give `--file` too.")
    seed = evaluate.HELD_OUT_SEED if options.seed is None else options.seed
    return board.random_games(options.games or 2000, seed)


def _add_verify(commands) -> None:
    verify = commands.add_parser(
        "verify", help="checks a checkpoint: layout, hash, folding, loss, legality"
    )
    _add_checkpoint(verify)
    _add_n_heads(verify)
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from othello_gpt.verify import verify_checkpoint

    report = verify_checkpoint(options.file, filename=options.filename, n_heads=options.n_heads)
    print(report)
    return 0 if report.ok else 1


def _add_convert(commands) -> None:
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
    _add_n_heads(convert)
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    import torch

    from othello_gpt import OthelloGPT
    from othello_gpt.weights import to_transformer_lens

    if options.out.exists():
        raise ValueError(f"'{options.out}' is there already: name another place.")
    if options.out.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        raise ValueError(
            f"'{options.out}' is neither a folder's name nor a file.pth: name one of these."
        )
    model = OthelloGPT.from_pretrained(
        options.source, filename=options.filename, fold=options.fold, n_heads=options.n_heads
    )
    if options.out.suffix == ".pth":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_name(options.out.name + ".partial")
        torch.save(to_transformer_lens(model), partial)
        partial.replace(options.out)
    else:
        model.save_pretrained(options.out)
    print(f"{options.out.resolve()}: {model.cfg}")
    return 0


def _add_train(commands) -> None:
    train = commands.add_parser("train", help="trains a model on random games")
    train.description = "Several processes: torchrun --nproc-per-node N -m othello_gpt train ..."
    train.add_argument("--preset", choices=("tiny", "small", "full"), help="small by default")
    train.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="checkpoint, log, weights; runs/PRESET by default",
    )
    train.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="goes on with the run there, --games or --minutes in place of its budget",
    )
    recipe = train.add_argument_group("recipe", "in place of the preset's own")
    recipe.add_argument(
        "--games", type=int, help="the budget; the learning rate falls to 0 at its end"
    )
    recipe.add_argument("--minutes", type=float, help="the budget in time")
    recipe.add_argument("--batch", type=int, help="games a step, of all processes together")
    recipe.add_argument("--objective", choices=("legal-moves", "next-move"))
    recipe.add_argument("--optimizer", choices=("muon", "adamw"), help="of the block matrices")
    recipe.add_argument("--lr", type=float, help="Muon's learning rate")
    recipe.add_argument("--adam-lr", type=float, help="AdamW's learning rate")
    recipe.add_argument("--warm-up", type=float, help="part of the budget, 0 to 1")
    recipe.add_argument("--cool-down", type=float, help="part of the budget, 0 to 1")
    recipe.add_argument("--seed", type=int, help="of the first weights and of the games; 1")
    recipe.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="file, folder or repository to start from; needs a --seed whose games are new to them",
    )
    recipe.add_argument("--float32", action="store_true", help="no bfloat16")
    train.add_argument("--workers", type=int, default=1, help="processes that make games")
    train.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="a minute at the start, faster then; by default for all but tiny",
    )
    train.add_argument("--save-minutes", type=float, default=5.0, help="between checkpoints")
    train.add_argument("--held-out", type=int, default=2000, help="games for the final figures")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from othello_gpt import train
    from othello_gpt.recipe import given_fields, recipe_of

    changes = given_fields(vars(options))
    recipe, budget, preset = None, changes, options.preset or "small"
    if options.resume is None:
        recipe, budget = recipe_of(preset, float32=options.float32, **changes), {}
    else:
        named = {name for name in ("preset", "out", "float32") if getattr(options, name)}
        if extra := (named | set(changes)) - {"games", "minutes"}:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(extra))
            raise ValueError(f"a resumed run keeps its recipe and its folder: leave out {listed}.")
    folder = options.resume or options.out or Path("runs") / preset
    finished = train.train(
        folder,
        recipe,
        **budget,
        workers=options.workers,
        compile=options.compile,
        save_minutes=options.save_minutes,
        held_out=options.held_out,
    )
    if train.is_first_process():
        stopped = f"stopped, and saved. Go on with: othello-gpt train --resume {folder}"
        print((folder / "README.md").read_text() if finished else stopped)
    return 0 if finished else 1


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench", help="hooks, caches and sweeps timed against peers (needs a checkout)"
    )
    bench.add_argument("--out", type=Path, default=Path("othello-bench.html"), help="the picture")
    bench.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    import subprocess

    import othello_gpt

    script = Path(othello_gpt.__file__).parents[1] / "benchmarks" / "quick.py"
    if not script.exists():
        raise ValueError(
            f"no {script}: the benchmarks are not part of the installed package. Clone the repository, "
            "`pip install -e '.[bench]'` there, and run `othello-gpt bench` again."
        )
    return subprocess.run([sys.executable, str(script), str(options.out)], check=False).returncode


def _add_info(commands) -> None:
    info = commands.add_parser("info", help="versions and places, for bug reports")
    info.set_defaults(run=_info)


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
