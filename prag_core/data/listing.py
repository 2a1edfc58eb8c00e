"""Finds the files of a corpus, and says which files beside them are left out and why."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from glob import has_magic
from os import scandir
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from prag_core.config import CorpusConfig, StorageConfig
from prag_core.data.files import HTTP, http_failure, open_filesystem, shown, without_query
from prag_core.data.parsing import repeated
from prag_core.errors import InputError

Format = Literal["jsonl", "tsv", "parquet", "text"]
_ENDINGS: Mapping[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "text": (".txt", ".md"),
}
_KNOWN = ".jsonl, .ndjson, .json, .tsv, .parquet, .txt, .md (.gz may follow)"

# Why a file is left out, in a word for reports and in a phrase for people.
REASONS: Mapping[str, str] = {
    "hidden": "hidden (a part of the path begins with . or _)",
    "unknown_ending": f"no known format (known are {_KNOWN})",
    "broken_link": "links that lead nowhere",
    "circle": "links to a folder that they are in",
    "folder": "folders where the pattern asks for files",
    "folder_marker": "markers of a folder",
    "not_a_file": "neither files nor folders",
}


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus.

    `name` is its name in the file system of `corpus.path`. `label` is its path below `corpus.path`: ids that are made
    from it do not change when the corpus moves. `url` is what messages call it.
    """

    name: str
    label: str
    url: str
    format: Format


@dataclass(frozen=True, slots=True)
class LeftOut:
    """How many files of a corpus folder are not read for one of the `REASONS`, and the first of them."""

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{REASONS[self.reason]}: {self.count}, such as {self.first}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a corpus in the order in which they are read, and what is left out."""

    files: tuple[CorpusFile, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, slots=True)
class _Found:
    """Something in a folder: its name, its path below the folder, its size, and why it is no file to read."""

    name: str
    label: str
    size: int | None = None
    reason: str = ""


def list_files(config: CorpusConfig, storage: StorageConfig | None = None) -> Listing:
    """Find the corpus files: the configured file, or the files of the folder or glob, sorted by name.

    Folders and globs leave out hidden files (a part of the path starts with `.` or `_`) and files of unknown format.
    Links are followed, but not in a circle. What is left out is counted.

    Raises:
        InputError: when there is no file to read, a file of records is empty, or two files have the same name.
    """
    path = shown(without_query(config.path))
    try:
        fs, root = open_filesystem(config.path, storage)
        single, found = _find(fs, root)
    except Exception as error:  # each file system has its own errors; botocore's are not OSErrors
        raise InputError(
            f"{path}: cannot be listed: {error or type(error).__name__}", "check corpus.path and your access to it"
        ) from error
    if not found:
        raise InputError(
            f"{path}: no such file or folder, or nothing in it",
            "set corpus.path to a file, a folder, a glob or an fsspec URL, and check your access to it",
        )
    files: list[CorpusFile] = []
    left_out: dict[str, list[str]] = {}
    for item in sorted(found, key=lambda item: item.name):
        reason = item.reason
        if not single and not reason and any(part.startswith((".", "_")) for part in item.label.split("/")):
            reason = "hidden"
        form = _format_of(item.label, config)
        if reason or form is None:
            left_out.setdefault(reason or "unknown_ending", []).append(shown(item.label))
            continue
        url = item.name if isinstance(fs, LocalFileSystem) else without_query(fs.unstrip_protocol(item.name))
        # An empty text file is one record without a text, which is a reject; any other was meant to hold records.
        if item.size == 0 and form != "text":
            raise InputError(f"{shown(url)}: is empty", "remove it, or write it again")
        files.append(CorpusFile(item.name, shown(item.label), shown(url), form))
    if twice := repeated([file.label for file in files]):
        raise InputError(f"{path}: two files are both called {twice[0]} in reports and ids", "rename one of them")
    counted = tuple(LeftOut(reason, len(labels), labels[0]) for reason, labels in sorted(left_out.items()))
    if not files:
        why = f"{path}: its name has no known ending" if single else f"{path}: has no file to read"
        raise InputError(
            "".join([why, *(f"\n  left out: {item}" for item in counted)]),
            f"name the files {_KNOWN}, or set corpus.format to jsonl, tsv, parquet or text",
        )
    return Listing(tuple(files), counted)


def _find(fs: Any, root: str) -> tuple[bool, list[_Found]]:
    """Return whether `root` is a single file, and what there is: that file, or all that a folder or a glob has."""
    local = isinstance(fs, LocalFileSystem)
    info = _local_info(Path(root)) if local else _remote_info(fs, root)
    if info and info["type"] == "file":
        plain = PurePosixPath(without_query(root)).name
        if root.startswith(HTTP) and without_query(str(info.get("url") or root)).endswith("/"):
            raise OSError("it is a folder on an HTTP server; name a file, or its files by a glob")
        return True, [_Found(root, unquote(plain) if root.startswith(HTTP) else plain, info["size"])]
    if info:
        # A file system that is walked folder by folder leaves out, unless told otherwise, what it cannot list.
        strict = {"on_error": "raise"} if type(fs).find is AbstractFileSystem.find else {}
        found = list(_walk(root)) if local else _remote(fs.find(root, detail=True, **strict), root)
        return False, [item for item in found if item.reason != "folder"]
    if not has_magic(root):
        return False, []
    folder = re.split(r"[*?\[]", root, maxsplit=1)[0].rpartition("/")[0]
    if local:
        wanted = re.compile(glob_translate(root))
        depth = None if "**" in root else root.count("/") - folder.count("/")
        found = [item for item in _walk(folder or "/", depth) if wanted.match(item.name)]
    else:
        found = _remote(fs.glob(root, detail=True), folder)
        if root.startswith(HTTP):
            found = [replace(item, label=unquote(item.label)) for item in found]
    entered = {str(parent) for item in found for parent in PurePosixPath(item.name).parents}
    return False, [item for item in found if item.reason != "folder" or item.name not in entered]


def _local_info(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_file() and not path.is_dir():
        raise OSError("it is neither a file nor a folder")
    return {"type": "file" if path.is_file() else "directory", "size": path.stat().st_size}


def _remote_info(fs: Any, name: str) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = fs.info(name)
    except FileNotFoundError as error:
        if failure := http_failure(name, error):
            raise OSError(failure) from error
        return None
    return info


def _walk(root: str, depth: int | None = None) -> Iterator[_Found]:
    """Yield everything below a local folder, at most `depth` levels deep. Links are followed, but not in a circle."""
    top = Path(root).resolve()
    # Each folder with its path below the root, and the real folders on the way to it.
    folders: list[tuple[Path, str, tuple[Path, ...]]] = [(Path(root), "", (top,))]
    while folders:
        folder, label, way = folders.pop()
        with scandir(folder) as entries:
            for entry in entries:
                path, below = folder / entry.name, f"{label}{entry.name}"
                try:
                    status = entry.stat()
                except OSError:
                    if not entry.is_symlink() and path.exists():
                        raise
                    yield _Found(str(path), below, reason="broken_link")
                    continue
                if stat.S_ISDIR(status.st_mode):
                    real = path.resolve() if entry.is_symlink() else way[-1] / entry.name
                    is_circle = real in way or real in top.parents
                    yield _Found(str(path), below, reason="circle" if is_circle else "folder")
                    if not is_circle and (depth is None or len(way) < depth):
                        folders.append((path, f"{below}/", (*way, real)))
                elif stat.S_ISREG(status.st_mode):
                    yield _Found(str(path), below, status.st_size)
                else:
                    yield _Found(str(path), below, reason="not_a_file")


def _remote(listed: Mapping[str, Any], folder: str) -> list[_Found]:
    """Return what a remote file system has listed. Some keep an empty object for a folder."""
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    found = []
    for name, info in listed.items():
        size = info.get("size")
        label = name.removeprefix(f"{folder.rstrip('/')}/") or name
        if size == 0 and (name.endswith(("/", "_$folder$")) or name in parents):
            found.append(_Found(name, label, reason="folder_marker"))
        elif info["type"] == "directory":
            found.append(_Found(name, label, reason="folder"))
        else:
            found.append(_Found(name, label, size, "" if info["type"] == "file" else "not_a_file"))
    return found


def _format_of(label: str, config: CorpusConfig) -> Format | None:
    if config.format != "auto":
        return config.format
    name = label.lower().removesuffix(".gz")
    return next((form for form, endings in _ENDINGS.items() if name.endswith(endings)), None)
