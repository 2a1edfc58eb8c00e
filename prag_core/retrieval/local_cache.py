"""Unpacked indexes on this machine: marks those in use, and removes old ones that no process uses."""

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

# How many of the newest are kept besides those in use: the one in service, and those that a rollback would need.
KEPT = 3


def hold(folder: Path) -> int:
    """Mark a folder as in use until the returned file descriptor is closed or this process ends.

    Raises:
        OSError: when the folder cannot be opened.
    """
    held = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks; nothing is removed there
        fcntl.flock(held, fcntl.LOCK_SH)
    return held


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the code inside into a `StoreError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: {error}", "check the permissions and the free space there, then run the same command again"
        ) from error


def remove_old(cache_dir: Path) -> None:
    """Remove all folders but the `KEPT` opened last and those in use; a failure is logged, not raised."""
    try:
        folders = [folder for folder in cache_dir.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)[KEPT:]:
            with suppress(Timeout), FileLock(lock_of(folder), timeout=0):
                _remove_unless_held(folder)
    except OSError as error:
        log.warning("%s: old indexes cannot be removed: %s", cache_dir, error)


def lock_of(folder: Path) -> Path:
    """Return the lock file that a process holds while it makes or removes a folder."""
    return folder.with_name(f"{folder.name}.lock")


def partial_of(folder: Path) -> Path:
    """Return the scratch folder in which a folder is made, and to which it is moved before it is removed."""
    return folder.with_name(f".{folder.name}.partial")


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A rename removes it at once and whole: the next process to open it fetches it again.
        folder.rename(partial_of(folder))
    except OSError:  # in use, or the file system has no locks
        return
    finally:
        os.close(descriptor)
    shutil.rmtree(partial_of(folder), ignore_errors=True)
