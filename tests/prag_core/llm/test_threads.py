"""How many OpenMP threads a process has: one team, of the thread that computes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipelines.execution.child_process import Child, Limits
from prag_core.errors import ConfigError
from prag_core.llm.threads import available_cores, compute_elsewhere, compute_here
from tests.helpers.passages import make_passage
from tests.helpers.training import training_batch

ROOT = Path(__file__).parents[3]


def threads_of_the_system() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def large_product() -> None:
    torch.ones(1 << 20).add_(1.0)  # far beyond the size from which torch shares the work


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_computing_thread_has_the_cores_and_later_threads_have_one(restored: None) -> None:
    seen: dict[str, int] = {}

    def compute() -> None:
        compute_here(3)
        seen["computing"] = torch.get_num_threads()
        other = threading.Thread(target=lambda: seen.update(later=torch.get_num_threads()))
        other.start()
        other.join()

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert seen == {"computing": 3, "later": 1}


def test_cores_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAG_CORES", "3")
    assert available_cores() == 3
    for wrong in ("none", "0", "-1", "1.5"):
        monkeypatch.setenv("PRAG_CORES", wrong)
        with pytest.raises(ConfigError, match="PRAG_CORES"):
            available_cores()


def test_elsewhere_is_one_core_for_all(restored: None) -> None:
    compute_elsewhere()
    assert torch.get_num_threads() == 1


# A service with a model large enough for products that torch shares, in a process of its own. While it answers, its
# fetching threads convert tensors as large as those of a real adapter.
SERVING = """
import asyncio, os, sys
from pathlib import Path

import torch

from prag_core.config import ServeConfig
from prag_core.inference.adapter_cache import AdapterCache
from prag_core.inference.request import Request
from prag_core.inference.service import Service
from pipelines.execution.child_process import Child, Limits
from prag_core.llm.threads import compute_elsewhere
from prag_core.store.snapshot import current_id
from prag_core.testing import tiny_base_model
from tests.helpers.serving import World, named

folder, cores = Path(sys.argv[1]), int(sys.argv[2])
compute_elsewhere()
base = tiny_base_model(folder / "model", layers=1, hidden=1024, feed_forward=4096)
world = World(base, folder)
world.publish()


class Converting:
    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __contains__(self, key):
        return key in self._source

    def unpack(self, row, data):
        torch.ones(1 << 20).to(torch.bfloat16)
        return self._source.unpack(row, data)


def opener(id):
    opened = world.open(id)
    object.__setattr__(opened, "source", Converting(opened.source))
    return opened


config = ServeConfig()
cache = AdapterCache(config.cache_bytes, dtype=torch.float32, disk=None, threads=4, negative_ttl_s=1.0)
service = Service(base, opener, lambda: current_id(world.store), cache, config, cores)


async def ask():
    return await asyncio.gather(*(service.answer(Request(named([n, n + 20]), "prag", 2, "sum")) for n in range(8)))


for answer in asyncio.run(ask()):
    assert not answer.error, answer
print(len(os.listdir("/proc/self/task")))
service.close()
"""


def count_serving(folder: Path, cores: int) -> int:
    command = [sys.executable, "-c", SERVING, str(folder / str(cores)), str(cores)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_serving_process_has_one_team(tmp_path: Path) -> None:
    assert count_serving(tmp_path, 3) - count_serving(tmp_path, 1) == 2


class CountThreads:
    """An actor of the train stage's kind that computes, and reports how many threads that has added to its process."""

    def __init__(self, cores: int) -> None:
        compute_here(cores)

    def prepare(self, table: pa.Table) -> pa.Table:
        large_product()  # in a thread of its own
        return table

    def __call__(self, table: pa.Table, alive: object) -> Iterator[pa.Table]:
        before = threads_of_the_system()
        large_product()
        other = threading.Thread(target=large_product)  # as a library may
        other.start()
        other.join()
        time.sleep(1.0)  # the system counts a thread for a moment after it was joined
        yield pa.table({"added": [threads_of_the_system() - before]})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_training_process_has_one_team() -> None:
    for cores in (1, 3):
        child = Child(pickle.dumps((CountThreads, (cores,))), ["prag_core.training.trainer"])
        try:
            (outcome,) = child.call(training_batch([make_passage(0)]), Limits(silence_s=120.0, memory_bytes=8e9))
        finally:
            child.kill()
        assert outcome["added"][0].as_py() == cores - 1
