"""Where Ray and its workers put their sockets, whose paths have a limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray.data

from cluster.session import MAX_SOCKET_FOLDER_BYTES, StartError, socket_folder
from prag_core.errors import StoreError

ROOT = Path(__file__).parents[2]
START = """
import pickle
import pyarrow as pa
import ray
from cluster.resources import PROFILES
from cluster.session import ray_session
from pipelines.execution.child_process import Child, Limits
from tests.cluster.test_session import Same

def work():
    child = Child(pickle.dumps((Same, ())), ())
    rows = [table.num_rows for table in child.call(pa.table({"key": ["a"]}), Limits(60.0, 4e9))]
    child.kill()
    return rows

with ray_session(PROFILES["laptop"]):
    print(ray.get(ray.remote(work).remote()))
"""


class Same:
    def prepare(self, table):
        return table

    def __call__(self, table, heartbeat):
        yield table


@pytest.fixture(autouse=True)
def no_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


def test_a_short_folder_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert socket_folder() == "/tmp"
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert socket_folder() == "/dev/shm"
    monkeypatch.setenv("RAY_TMPDIR", "/var/tmp")
    assert socket_folder() == "/var/tmp"


@pytest.mark.parametrize("name", ["x" * MAX_SOCKET_FOLDER_BYTES, "\u00fc", "\udcff", "file/x"], ids=ascii)
def test_another_folder_is_used_if_the_named_one_cannot_hold_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    assert socket_folder() == "/tmp"
    monkeypatch.setattr("cluster.session._SHORT_FOLDERS", ())
    with pytest.raises(StartError, match="no folder can hold Ray's sockets"):
        socket_folder()


def test_a_relative_folder_counts_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ("y" * 40)).mkdir()
    monkeypatch.chdir(tmp_path / ("y" * 40))
    monkeypatch.setenv("TMPDIR", ".")
    assert socket_folder() == "/tmp"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x" * 120, "\u00fcn\u00ef"], ids=ascii)
def test_ray_and_its_workers_start_whatever_the_folder_for_temporary_files(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1]\n", done.stderr[-2000:]


def put_where_no_room_is(table: pa.Table) -> pa.Table:
    raise StoreError("cannot be written: No space left on device", "free room")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_an_error_of_a_worker_reaches_the_driver_as_what_it_is() -> None:
    rows = ray.data.range(1).map_batches(put_where_no_room_is, batch_format="pyarrow")
    with pytest.raises(StoreError, match="No space left") as caught:
        rows.materialize()
    assert caught.value.remedy == "free room"
