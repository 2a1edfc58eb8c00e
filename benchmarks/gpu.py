"""Check and measure a GPU in nine minutes, the most valuable first: `python benchmarks/gpu.py`.

It needs neither Ray nor a network nor a model. The models are random, of the shapes of Llama-3.2-1B and Llama-3-8B, and
the passages are random tokens, of the lengths that passages of 100 words have: speed does not depend on their content.
A machine with torch, peft and pyarrow needs the packages in `WHEELS` besides, in the versions of an environment that
`make setup` has made; all but pydantic-core are pure Python. The repository must be on PYTHONPATH.

Each part prints one line of JSON when it ends: its figures, or its `error`, or `skipped` when less time is left than it
needs. Times are medians after a warm-up. With `--smoke` all is tiny, and a CPU will do: that tests the script and
measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_parts import checks, speed
from gpu_parts.bench import FULL, SMOKE, Bench, Figures

WHEELS = (
    "transformers",
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "platformdirs"),
)
# What each part measures, and the seconds that must be left for it to begin.
PARTS: tuple[tuple[Callable[[Bench], Figures], float], ...] = (
    (speed.card, 10),
    (checks.trainer, 10),
    (checks.checkpointing, 10),
    (checks.short_memory, 10),
    (checks.decoder, 10),
    (checks.child, 30),
    (speed.training, 40),
    (speed.profile, 20),
    (speed.stacks, 20),
    (speed.variants, 20),
    (speed.decoding, 15),
    (speed.prefill, 10),
    (speed.training_8b, 60),
    (speed.decoding_8b, 30),
)


def main() -> None:
    names = [part.__name__ for part, _ in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins that would end after them")
    parser.add_argument("--parts", default=",".join(names), help="the parts to run, by default all: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also on a CPU; measures no speed")
    arguments = parser.parse_args()
    wanted = arguments.parts.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--parts: there is no {unknown[0]}; there are {', '.join(names)}")
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.smoke:
        parser.error("torch finds no GPU here; --smoke runs on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SMOKE if arguments.smoke else FULL, "cuda" if cuda else "cpu", arguments.minutes, Path(folder))
        wrong = 0
        for part, needs_s in PARTS:
            if part.__name__ in wanted:
                begun = time.perf_counter()
                found = bench.attempt(partial(part, bench), needs_s)
                wrong += is_wrong(found)
                line = {"part": part.__name__, "seconds": time.perf_counter() - begun, **found}
                print(json.dumps(rounded(line)), flush=True)
    sys.exit(1 if wrong else 0)


def is_wrong(found: Any) -> bool:
    """Return whether a part or one of its rows has an error, or a check is not ok."""
    if not isinstance(found, dict):
        return False
    return "error" in found or found.get("ok") is False or any(map(is_wrong, found.values()))


def rounded(value: Any) -> Any:
    """Return the figures with four digits each."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
