"""Time the first answer from a corpus of twelve passages: `python benchmarks/first_answer.py`.

It does what a newcomer does, with the commands that a newcomer types: `prag init`, `prag run`, `prag ask`. The passages
are the first twelve of the example corpus, without anybody's augmentations, so that the base model writes its own.
Each command is a process of its own and the times include its start. The last line is JSON, in seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from measure import machine

ATLAS = Path(__file__).parent.parent / "pipelines" / "examples" / "atlas" / "passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ATLAS, help="a file of passages (JSON Lines)")
    parser.add_argument("--passages", type=int, default=12, help="how many of them")
    parser.add_argument("--question", default="Who built the Cazambra Lighthouse?")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a setting, as `prag` takes it")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with options.corpus.open(encoding="utf-8") as lines:
            corpus.write_text("".join(islice(lines, options.passages)), encoding="utf-8")
        overrides = [part for override in options.overrides for part in ("--set", override)]
        init_s = timed(folder, "init", str(corpus))
        run_s = timed(folder, "run", "-c", "config.yaml", *overrides)
        ask_s = timed(folder, "ask", "-c", "config.yaml", *overrides, options.question)
    times = {"init_s": init_s, "run_s": run_s, "ask_s": ask_s}
    total = round(sum(times.values()), 1)
    print(json.dumps({**times, "total_s": total, "passages": options.passages, "machine": machine()}))


def timed(folder: str, *command: str) -> float:
    """Run a `prag` command in a folder, and return its seconds; what it prints is shown."""
    print(f"$ prag {' '.join(command)}", flush=True)
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipelines.cli", *command], cwd=folder, check=True)
    return round(time.perf_counter() - begun, 1)


if __name__ == "__main__":
    main()
