"""Finds the files of a corpus, and reads small text files and JSON Lines; errors say what to do."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, Literal

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from prag_core.config import CorpusConfig
from prag_core.errors import InputError
from prag_core.packaged import local_path

Format = Literal["jsonl", "tsv", "parquet", "text"]
_ENDINGS: Mapping[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "text": (".txt", ".md"),
}
_KNOWN = ".jsonl, .ndjson, .json, .tsv, .parquet, .txt, .md (.gz may follow)"


def read_text(path: str, missing: str) -> str:
    """Return the text of a UTF-8 file (any fsspec URL, gzipped or not).

    Raises:
        InputError: when the file is missing (then `missing` is the remedy), unreadable or not UTF-8.
    """
    try:
        with fsspec.open(local_path(path), "rb", compression="infer") as stream:
            data: bytes = stream.read()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", missing) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}", "write the file again as UTF-8") from None
    except (OSError, EOFError, ValueError, ImportError, zlib.error) as error:
        what = str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read: {what}", "check the file and your access to it") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: for text that is not JSON, and for nesting or numbers beyond Python's limits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number, from 1, and the value of each line of JSON Lines; a bad line gives its ValueError.

    Blank lines are left out.
    """
    # Not splitlines, which also splits at line separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, error


def list_files(config: CorpusConfig) -> list[str]:
    """Return the corpus files, sorted: the configured file, or the files of the folder or glob.

    Folders and globs leave out hidden files (a part of the path starts with `.` or `_`) and files of unknown format.

    Raises:
        InputError: when there is no file, when no file has a known format, or when a file is empty.
    """
    try:
        fs, root = url_to_fs(local_path(config.path))
        single = fs.isfile(root)
        if single:
            found = {root: fs.info(root)}
        elif fs.isdir(root):
            found = fs.find(root, detail=True)
        else:
            found = fs.glob(root, detail=True) if has_magic(root) else {}
    except Exception as error:  # each file system has its own errors; botocore's are not OSErrors
        raise InputError(
            f"{config.path}: cannot be listed: {error}", "check corpus.path and your access to it"
        ) from error
    if not found:
        raise InputError(
            f"{config.path}: no such file or folder, or nothing in it",
            "set corpus.path to a file, a folder, a glob or an fsspec URL, and check your access to it",
        )
    sizes = {
        name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name): info.get("size")
        for name, info in found.items()
        if info["type"] == "file"
    }
    if single:
        detect_format(root, config)
    shown = (p for p in sizes if not any(part.startswith((".", "_")) for part in file_label(p, config).split("/")))
    files = list(sizes) if single else sorted(path for path in shown if _format_of(path, config))
    if not files:
        raise InputError(
            f"{config.path}: has no file of a known format",
            f"name the files {_KNOWN}, or set corpus.format",
        )
    for path in files:
        if sizes[path] == 0:
            raise InputError(f"{path}: is empty", "remove it, or write it again")
    return files


def detect_format(path: str, config: CorpusConfig) -> Format:
    """Return the format of a file: the configured one, or the one of its name's ending.

    Raises:
        InputError: when neither gives a format.
    """
    if found := _format_of(path, config):
        return found
    raise InputError(
        f"{path}: its name has no known ending: {_KNOWN}",
        "set corpus.format to jsonl, tsv, parquet or text",
    )


def file_label(path: str, config: CorpusConfig) -> str:
    """Return a file's path below `corpus.path`; ids made from it do not change when the corpus moves."""
    root = url_to_fs(local_path(config.path))[1]
    if has_magic(root):
        root = re.split(r"[*?\[]", root, maxsplit=1)[0].rpartition("/")[0]
    full, folder = url_to_fs(path)[1], root.rstrip("/") + "/"
    return full.removeprefix(folder) if full.startswith(folder) else PurePosixPath(full).name


def _format_of(path: str, config: CorpusConfig) -> Format | None:
    if config.format != "auto":
        return config.format
    name = path.lower().removesuffix(".gz")
    return next((form for form, endings in _ENDINGS.items() if name.endswith(endings)), None)
