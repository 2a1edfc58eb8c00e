"""A folder with a corpus, a configuration and a store, and the command line run on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from prag_core.records import LedgerRow, Passage, from_table
from prag_core.store.objects import Store
from prag_core.testing import write_tiny_model
from tests.helpers.passages import make_augmentation


class Workspace:
    """A folder with a corpus, its augmentations and a configuration; runs `prag` in processes of their own."""

    def __init__(self, folder: Path, passages: list[Passage]) -> None:
        self.folder = folder
        write_tiny_model(folder / "tiny")
        self.write_corpus(passages)
        lines = []
        for passage in passages:
            pairs = make_augmentation(passage).pairs
            qa = [{"question": p.question, "answer": p.answer, "full_answer": p.full_answer} for p in pairs]
            lines.append(json.dumps({"id": passage.sources[0], "rewrites": [], "qa": qa}))
        (folder / "augmentations.jsonl").write_text("\n".join(lines))
        config = {
            "store": "store",
            "corpus": {"path": "corpus.jsonl"},
            "model": {"name": "tiny"},
            "augment": {"generator": "none", "import_file": "augmentations.jsonl"},
            "train": {"epochs": 1},
            "run": {"train_batch": 4, "augment_batch": 4},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def write_corpus(self, passages: list[Passage], extra: str = "") -> None:
        lines = [json.dumps({"id": p.sources[0], "title": p.title, "text": p.text}) for p in passages]
        (self.folder / "corpus.jsonl").write_text("\n".join(lines) + "\n" + extra)

    def start(self, *arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err[-3000:]
        return out if code == 0 else err

    def report(self) -> dict:
        return json.loads(self.run("run", "-c", "config.yaml", "--json"))

    def ledger(self) -> list[LedgerRow]:
        store = Store(str(self.folder / "store"))
        return from_table(LedgerRow, store.get_table(LedgerRow, store.list("adapters", ".parquet")))


def stage(report: dict, name: str) -> dict:
    return next(s for s in report["stages"] if s["stage"] == name)
