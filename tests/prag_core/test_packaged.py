"""A file inside an installed package is found by its package's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from prag_core.config import CorpusConfig
from prag_core.config_file import load_config
from prag_core.data.files import read_text
from prag_core.data.listing import list_files
from prag_core.errors import ConfigError, InputError
from prag_core.packaged import local_path

ATLAS = "package://pipelines/examples/atlas"


def test_other_paths_stay_as_they_are() -> None:
    for path in ("corpus.jsonl", "/a/b.jsonl", "s3://bucket/package", "package:x"):
        assert local_path(path) == path


def test_readers_find_packaged_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = CorpusConfig(path=f"{ATLAS}/passages.jsonl")
    (file,) = list_files(corpus).files
    assert Path(file.name).is_absolute()
    assert file.label == "passages.jsonl"
    assert read_text(f"{ATLAS}/questions.jsonl", "").count("\n") == 256


def test_a_missing_package_or_file_is_named() -> None:
    with pytest.raises(InputError, match="no such file"):
        read_text(f"{ATLAS}/none.jsonl", "")
    for path in ("package://no_such_package/a.jsonl", "package:///a.jsonl", "package://os/a.jsonl", "package://.a/b"):
        with pytest.raises(InputError, match=path):
            read_text(path, "")
        with pytest.raises(InputError, match=path):
            list_files(CorpusConfig(path=path))
        with pytest.raises(ConfigError, match=path):
            load_config(path)
