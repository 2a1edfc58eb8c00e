"""A folder with a corpus, a configuration and a store, and the command line run on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from prag_core.records import LedgerRow, Passage, from_table
from prag_core.store.objects import Store
from prag_core.testing import write_tiny_model
from tests.helpers.command_line import prag
from tests.helpers.passages import make_augmentation


class Workspace:
    """A folder with a corpus, its augmentations, a configuration of absolute paths and a store."""

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
        self.configure(
            store=str(folder / "store"),
            corpus={"path": str(folder / "corpus.jsonl")},
            model={"name": str(folder / "tiny")},
            # The file's pairs and no others, so that a test knows what is trained.
            augment={"generator": "none", "import_file": str(folder / "augmentations.jsonl"), "cloze": False},
            train={"epochs": 1},
            run={"train_batch": 4, "augment_batch": 4},
        )

    def configure(self, **sections: Any) -> None:
        """Write these sections of the configuration in place of its own."""
        path = self.folder / "config.yaml"
        before = yaml.safe_load(path.read_text()) if path.exists() else {}
        path.write_text(yaml.safe_dump({**before, **sections}))

    def write_corpus(self, passages: list[Passage], extra: str = "") -> None:
        lines = [json.dumps({"id": p.sources[0], "title": p.title, "text": p.text}) for p in passages]
        (self.folder / "corpus.jsonl").write_text("\n".join(lines) + "\n" + extra)

    def copy_to(self, folder: Path) -> None:
        """Copy everything to a folder that does not exist; the copy's configuration names the copy's paths."""
        shutil.copytree(self.folder, folder)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace(str(self.folder), str(folder)))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `prag` in a process of its own, as the leader of a new group."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run `prag` in this process; return what it prints, or its message where it is to fail with a code."""
        ended = prag(self.folder, *arguments)
        assert ended.code == code, ended.err[-3000:]
        return ended.out if code == 0 else ended.err

    def run_alone(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run `prag` as `run` does, in a process of its own."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err[-3000:]
        return out if code == 0 else err

    def report(self) -> dict[str, Any]:
        return json.loads(self.run("run", "-c", "config.yaml", "--json"))

    def ledger(self) -> list[LedgerRow]:
        store = Store(str(self.folder / "store"))
        return from_table(LedgerRow, store.get_table(LedgerRow, store.list("adapters", ".parquet")))


def stage(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in report["stages"] if s["stage"] == name)
