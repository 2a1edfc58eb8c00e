"""The hash of a model's weights. A node computes it once, and knows the files again by what the system says of them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from prag_core.data.parsing import parse_json
from prag_core.errors import ModelError
from prag_core.identity import FINGERPRINT_BYTES, canonical_json, fingerprint, is_intact, seal
from prag_core.llm.checkpoint import cache_dir, weight_files
from prag_core.llm.safetensors_header import SafetensorsHeader, read_header

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24
# A file that was changed less than this before may change again without another time: file systems count in ticks.
_SETTLED_NS = 2_000_000_000


def weights_digest(folder: Path) -> str:
    """Return a hash of the name, dtype, shape and bytes of each tensor of a model folder, in the order of their names.

    The cache folder keeps it with the path, size, times and inode of each file. While one process hashes, others wait
    for its result. Files that change meanwhile, or have just changed, are hashed again the next time.

    Raises:
        ModelError: when the folder holds no readable safetensors weights.
    """
    files = weight_files(folder)
    states = [_state(path) for path in files]
    cached = cache_dir() / "weights" / f"{fingerprint([state[0] for state in states])}.json"
    if (known := _read(cached, states)) is not None:
        return known
    with _alone(cached):
        if (known := _read(cached, states)) is not None:
            return known
        settled = all(time.time_ns() - changed > _SETTLED_NS for _, _, _, changed, _, _ in states)
        log.info("hashing the weights in %s", folder)
        digest = _hash(files)
        if settled and states == [_state(path) for path in files]:
            _write(cached, states, digest)
    return digest


def tensor_headers(path: Path) -> SafetensorsHeader:
    """Return the header of a safetensors file.

    Raises:
        ModelError: when it is damaged.
    """
    with path.open("rb") as stream:
        try:
            return read_header(lambda begin, end: os.pread(stream.fileno(), end - begin, begin))
        except ValueError as error:
            raise ModelError(f"{path}: {error}", "the file is damaged; get it again") from None


def _hash(files: Sequence[Path]) -> str:
    tensors = sorted((name, path, tensor) for path in files for name, tensor in tensor_headers(path).tensors.items())
    for (name, path, _), (next_name, next_path, _) in itertools.pairwise(tensors):
        if name == next_name:
            raise ModelError(f"{next_path}: holds {name}, and so does {path.name}", "get the model again")
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for name, path, tensor in tensors:
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with path.open("rb") as stream:
            stream.seek(tensor.begin)
            remaining = tensor.end - tensor.begin
            while remaining:
                block = stream.read(min(remaining, _BLOCK_BYTES))
                if not block:
                    raise ModelError(f"{path}: ends before tensor {name}", "the file is truncated; get it again")
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def _state(path: Path) -> list[Any]:
    """Return what tells a file from another one and from itself after a change.

    The time of the last change (ctime) is the system's own: unlike the time of the last write, no program can set it.
    """
    found = path.stat()
    times = [found.st_mtime_ns, found.st_ctime_ns]
    return [ascii(path.resolve()), found.st_size, *times, found.st_ino, found.st_dev]


def _read(cached: Path, states: Sequence[list[Any]]) -> str | None:
    """Return the cached hash of files in these states; None when there is none, or when it is damaged."""
    try:
        document = parse_json(cached.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or "seal" not in document or not is_intact(document):
        return None
    return str(document["digest"]) if document["files"] == states else None


def _write(cached: Path, states: Sequence[list[Any]], digest: str) -> None:
    try:
        # The rename makes the file appear whole, even if several processes write it.
        scratch = cached.with_suffix(f".{uuid.uuid4().hex}")
        scratch.write_text(canonical_json(seal({"files": states, "digest": digest})), encoding="utf-8")
        scratch.replace(cached)
    except OSError as error:
        log.warning("%s cannot be written, so each process hashes the weights: %s", cached, error)


@contextlib.contextmanager
def _alone(cached: Path) -> Iterator[None]:
    """Keep other processes of this node out; where the cache folder cannot hold a lock, they are not kept out."""
    lock = FileLock(f"{cached}.lock")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()
