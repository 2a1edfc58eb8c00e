"""Train what prepare.py retrieved, and ask its questions in every mode: the second step of docs/reproduce.md.

For each set of questions it runs `prag run` on a store of its own, then `prag evaluate` for each type of question. Both
continue where they were killed. Reports are written to `WORK/NAME/reports`, which table.py reads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# The paper's published settings: the template and the most new tokens of an answer.
SETS = {
    "2wikimultihopqa": ("chain_of_thought", 128),
    "hotpotqa": ("chain_of_thought", 128),
    "popqa": ("direct", 20),
    "cwq": ("direct", 20),
}
# Epochs by set where they are not 1; by configuration and set where models differ.
EPOCHS = {"popqa": 2, "qwen2.5-1.5b/hotpotqa": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="one of the configurations beside this file")
    parser.add_argument("--data", type=Path, default=Path("paper-data"), help="the folder that prepare.py wrote")
    parser.add_argument("--work", type=Path, default=Path("paper-work"), help="the folder of stores and reports")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--name", help="the experiment's name; by default the configuration's")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a setting, as `prag` takes it")
    arguments = parser.parse_args()
    model = arguments.config.stem
    work = arguments.work / (arguments.name or model)
    for name in arguments.sets:
        template, max_new_tokens = SETS[name]
        settings = {
            "store": work / name,
            "corpus.path": arguments.data / name / "corpus.jsonl",
            "train.template": template,
            "train.epochs": EPOCHS.get(f"{model}/{name}", EPOCHS.get(name, 1)),
            "answer.max_new_tokens": max_new_tokens,
        }
        chosen = [f"{key}={value}" for key, value in settings.items()] + arguments.overrides
        common = ["-c", str(arguments.config), *(part for setting in chosen for part in ("--set", setting))]
        prag("run", *common)
        for questions in sorted((arguments.data / name / "questions").glob("*.jsonl")):
            report = work / "reports" / f"{name}.{questions.stem}"
            # The questions name the passages that prepare.py retrieved from the whole corpus as their gold passages.
            asked = ["--dataset", f"jsonl:{questions}", "--retrieval", "oracle", "--controls", "da"]
            prag("evaluate", *common, *asked, "--report", str(report))


def prag(*arguments: str) -> None:
    print("prag", *arguments, flush=True)
    with subprocess.Popen([sys.executable, "-m", "pipelines.cli", *arguments]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the command gets Ctrl+C too; it stops Ray, and says how to continue
            code = process.wait() or 130
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
