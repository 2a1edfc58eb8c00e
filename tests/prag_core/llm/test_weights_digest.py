"""The hash of a model's weights is computed once a node, and again whenever a file may have changed."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prag_core.llm import weights_digest as module
from prag_core.llm.weights_digest import weights_digest


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny model that the test may change, with an empty cache, on a file system whose ticks are short."""
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that grows with each time that weights are hashed."""
    hash_files, calls = module._hash, []

    def counted(files: list[Path]) -> str:
        calls.append(files)
        return hash_files(files)

    monkeypatch.setattr(module, "_hash", counted)
    return calls


def cached(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "weights").glob("*.json")
    return file


def change(folder: Path) -> None:
    """Change a bit of the weights in place, and set the time of the last write back."""
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_weights_are_hashed_once(folder: Path, hashed: list) -> None:
    first = weights_digest(folder)
    assert weights_digest(folder) == first
    assert len(hashed) == 1


def test_processes_that_start_together_hash_once(folder: Path, hashed: list) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(weights_digest, [folder] * 8))
    assert len(digests) == len(hashed) == 1


def test_a_changed_file_is_hashed_again_even_with_its_old_size_and_time(folder: Path) -> None:
    first = weights_digest(folder)
    change(folder)
    second = weights_digest(folder)
    assert second != first
    change(folder)
    assert weights_digest(folder) == first


def test_a_file_that_was_put_in_place_of_another_is_hashed(folder: Path, tmp_path: Path, hashed: list) -> None:
    first = weights_digest(folder)
    shutil.copy2(folder / "model.safetensors", tmp_path / "copy")
    (tmp_path / "copy").replace(folder / "model.safetensors")
    assert weights_digest(folder) == first
    assert len(hashed) == 2


def test_what_has_just_changed_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list
) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 3600 * 10**9)
    assert weights_digest(folder) == weights_digest(folder)
    assert len(hashed) == 2
    assert not list((tmp_path / "cache" / "weights").glob("*.json"))


def test_what_changes_while_it_is_hashed_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_files = module._hash

    def changed_meanwhile(files: list[Path]) -> str:
        found = hash_files(files)
        change(folder)
        return found

    monkeypatch.setattr(module, "_hash", changed_meanwhile)
    weights_digest(folder)
    assert not list((tmp_path / "cache" / "weights").glob("*.json"))


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 100_000, '{"files": [], "digest": "0"}', "altered"])
def test_a_damaged_cache_is_made_again(folder: Path, tmp_path: Path, damage: str, hashed: list) -> None:
    expected = weights_digest(folder)
    file = cached(tmp_path)
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "digest": "0" * 16}) if damage == "altered" else damage)
    assert weights_digest(folder) == expected
    assert json.loads(file.read_text()) == whole
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights_digest(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "file"))
    assert weights_digest(folder) == expected
    assert "cannot be written, so each process hashes the weights" in caplog.text
