"""What does `import othello_gpt` cost on top of `import torch`, and the packaged model on top of that?

Whole processes, in turns: start-up cannot be measured twice in one.
"""

import subprocess
import sys
import time

from paired import compare, report


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    from functools import partial

    torch_only = partial(run, "import torch")
    with_us = partial(run, "import torch, othello_gpt")
    loaded = partial(run, "from othello_gpt import OthelloGPT; OthelloGPT.from_pretrained()")
    rows = [
        compare("import torch, othello_gpt", with_us, torch_only, 15, 2, time.perf_counter),
        compare("... and load the packaged model", loaded, torch_only, 9, 1, time.perf_counter),
    ]
    extra = round((rows[0].ours_ms - rows[0].other_ms) / 1e3, 3)
    report("Start-up.", rows, import_costs_seconds=extra)


if __name__ == "__main__":
    main()
