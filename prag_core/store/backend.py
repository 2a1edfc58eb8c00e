"""What a store needs from the place that keeps its bytes: the protocol `Backend` and its records.

`prag_core.store.backends` chooses the backend for a URL: a folder, S3, memory, or another fsspec file system.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a store. `modified` is the time of the last write, in seconds since the epoch."""

    name: str
    size_bytes: int
    modified: float


class TooShortError(OSError):
    """An object ends before the end of the range that was asked for."""


class Backend(Protocol):
    """Named objects under one root. Names are relative to the root, with slashes between their parts.

    Every backend promises: a read or a listing that begins after a write has returned shows that write; a range is
    returned whole or not at all. Whether a write is atomic, durable or conditional is in each backend's docstring.

    When a method cannot do its work, it raises one of `failures`. A missing object is not a failure.
    """

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """The exceptions that the methods raise."""

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or replace it."""

    def put_file(self, name: str, source: Path) -> None:
        """Write an object from a local file, without holding it in memory if the backend can avoid it."""

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return the bytes `start` to `end` of an object, or None if there is no such object.

        Raises:
            TooShortError: if the object has fewer than `end` bytes.
        """

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes, or None if there is no such object."""

    def exists(self, name: str) -> bool:
        """Return whether there is an object or a folder of this name."""

    def find(self, folder: str) -> list[StoredObject]:
        """Return all objects at any depth below a folder; the folder "" is the root."""

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        """Replace an object if its bytes are `expected` (None: if it does not exist); return whether it was replaced.

        Raises:
            StoreError: if the backend has no conditional write.
        """

    def honours_conditions(self, name: str) -> bool:
        """Return whether `swap` refuses a write whose condition does not hold; `name` exists.

        Raises:
            StoreError: if the backend has no conditional write.
        """

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return what a failure means in a few words, and what to do about it. Neither holds a secret."""
