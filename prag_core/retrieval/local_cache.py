"""Unpacked indexes on this machine: which are in use, by whatever process, and which nobody needs any more."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prag_core.errors import StoreError

log = logging.getLogger(__name__)

# So many of the newest stay besides those in use: the one in service, and those of a rollback.
KEPT = 3


def hold(folder: Path) -> int:
    """Mark a folder as in use until the descriptor that is returned is closed, or this process ends.

    Raises:
        OSError: when the folder cannot be opened.
    """
    held = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks, where nothing is removed either
        fcntl.flock(held, fcntl.LOCK_SH)
    return held


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turn a failure of the system at a folder of this machine into a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what}: {error}", "check the rights and the room there, then run the same command again"
        ) from error


def tidy(cache_dir: Path) -> None:
    """Remove the folders that were opened longest ago, but for the newest and those in use. No failure is an error."""
    try:
        folders = [folder for folder in cache_dir.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)[KEPT:]:
            with suppress(Timeout), FileLock(lock_of(folder), timeout=0):
                _remove_unless_held(folder)
    except OSError as error:
        log.warning("%s: old indexes cannot be removed: %s", cache_dir, error)


def lock_of(folder: Path) -> Path:
    """Return the lock file that whoever makes or removes a folder holds."""
    return folder.with_name(f"{folder.name}.lock")


def partial_of(folder: Path) -> Path:
    """Return where a folder is made, and to where it is moved before it is removed: what lies there is nobody's."""
    return folder.with_name(f".{folder.name}.partial")


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # At once and whole: whoever opens it from now on finds none, and fetches it again.
        folder.rename(partial_of(folder))
    except OSError:  # somebody holds it, or the file system cannot say
        return
    finally:
        os.close(descriptor)
    shutil.rmtree(partial_of(folder), ignore_errors=True)
