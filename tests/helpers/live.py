"""A published store of tiny adapters, and `prag serve` on it: what the tests of the server share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from pipelines.settings import describe
from prag_core.config import Config
from prag_core.identity import fingerprint
from prag_core.llm.lora import TrainedAdapter
from prag_core.records import LedgerRow, Passage
from prag_core.retrieval.archive import archive_index, find_index
from prag_core.retrieval.kinds import index_id
from prag_core.retrieval.lucene import build_index
from prag_core.store.adapters import AdapterStore
from prag_core.store.objects import open_store
from prag_core.store.snapshot import Snapshot, created_now, publish
from tests.helpers.adapters import random_adapter


def write_config(folder: Path, model: Path, store: str, **sections: dict[str, Any]) -> Path:
    """Write a configuration for the tiny model; the corpus is never read."""
    document = {
        "store": store,
        "corpus": {"path": "none.jsonl"},
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "augment": {"generator": "none"},
        "answer": {"max_new_tokens": 12},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def publish_adapters(config: Config, passages: Sequence[Passage], seed: int) -> tuple[Snapshot, list[LedgerRow]]:
    """Publish a snapshot of these passages, each with a random adapter of its own; other seeds, other adapters.

    Each adapter has a shard of its own.
    """
    store = open_store(config)
    recipe, layout = describe(config)
    adapters = AdapterStore(store, recipe, layout, "float32")
    adapters.describe()
    before = set(adapters.ledger_parts())
    rows = []
    for place, passage in enumerate(passages):
        trained = TrainedAdapter(passage.key, random_adapter(layout, seed + place), 1, 1, 1.0, 1.0, 1.0)
        rows += adapters.commit([(trained, str(seed))])
    # As of a real corpus: with other tags it is another version. A machine keeps the index of each in its cache.
    version = fingerprint([[passage.key, *passage.access] for passage in passages])
    id = index_id(version, config.index)
    if find_index(store, id) is None:
        with tempfile.TemporaryDirectory() as scratch:
            count = build_index(passages, Path(scratch, "lucene"), config.index)
            archive_index(Path(scratch, "lucene"), store, version, count, config.index)
    snapshot = created_now(
        Snapshot(
            corpus_version=version,
            index=id,
            recipe=recipe.fingerprint,
            base_model=recipe.base_model,
            ledger_parts=tuple(sorted(set(adapters.ledger_parts()) - before)),
            passages=len(passages),
            adapters=len(passages),
        )
    )
    publish(store, snapshot)
    return snapshot, rows


@dataclass
class Server:
    """`prag serve` in a process of its own."""

    config: Path
    settings: Sequence[str] = ()

    def __enter__(self) -> Server:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "pipelines.cli", "serve", "-c", str(self.config), "--port", str(self.port)]
        for setting in self.settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.welcome = self.process.stdout.readline() + self.process.stdout.readline()
        if "Serving at" not in self.welcome:
            self.process.wait(timeout=60)
            raise AssertionError(f"the server ended: {self.log()[-4000:]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def log(self) -> str:
        """What it said on standard error."""
        self._log.seek(0)
        return self._log.read()

    def replicas(self) -> list[psutil.Process]:
        """The processes of its replicas."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ServeReplica" in " ".join(child.cmdline()):
                    found.append(child)
        return found


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
