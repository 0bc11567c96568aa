"""All benchmarks, a few pairs each, and a picture of how the sides compare: `othello-gpt bench`."""

import json
import subprocess
import sys
from pathlib import Path

from interp import plots

NAMES = (
    "bench_hooks",
    "bench_hook_cost",
    "bench_cache",
    "bench_compile",
    "bench_peers",
    "bench_sweep",
    "bench_packing",
    "bench_board",
)


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "othello-bench.html")
    figures, failed = [], []
    for name in NAMES:
        script = Path(__file__).parent / f"{name}.py"
        run = subprocess.run(
            [sys.executable, str(script), "--quick"], stdout=subprocess.PIPE, text=True, check=False
        )
        print(run.stdout, flush=True)
        if run.returncode:
            failed.append(name)
            continue
        result = json.loads(run.stdout.strip().splitlines()[-1])
        figures.append(picture(result))
    out.write_text(
        "<!doctype html><meta charset=utf-8><title>Benchmarks</title>" + "".join(figures)
    )
    print(f"The picture: {out.resolve()}")
    if failed:
        print(f"These failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def picture(result: dict) -> str:
    """One benchmark as bars: how many times as long the other side takes."""
    import torch

    rows = result["rows"]
    bars = plots.plot_bars([row["name"] for row in rows], torch.tensor([r["ratio"] for r in rows]))
    where = f"{result['date']}, {result['processor']}, torch {result['torch']}, one thread"
    return f"<h2>{result['question']}</h2><p>other / ours; {where}</p><figure>{bars}</figure>"


if __name__ == "__main__":
    sys.exit(main())
