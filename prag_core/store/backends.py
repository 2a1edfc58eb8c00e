"""Which backend keeps the objects of a store's URL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from prag_core.data.files import open_filesystem
from prag_core.store.backend import Backend
from prag_core.store.filesystem import FilesystemBackend
from prag_core.store.folder import FolderBackend
from prag_core.store.memory import MemoryBackend


def is_s3(url: str) -> bool:
    """Return whether a URL names an S3 store."""
    return url.startswith(("s3://", "s3a://"))


def open_backend(url: str, options: Mapping[str, Any], retries: int, timeout_s: float) -> Backend:
    """Return the backend that keeps the objects of a URL; see `prag_core.store.objects.Store` for the arguments.

    Raises:
        ImportError: if the file system's package is not installed.
        ValueError: if no file system has this URL's scheme.
    """
    scheme, colon, rest = url.partition(":")
    if colon and scheme in fsspec.available_protocols() and re.fullmatch(r"/*|/[^/].*", rest, re.DOTALL):
        raise ValueError("it is no whole URL: behind the colon come two slashes and a name")
    if is_s3(url):
        from prag_core.store.s3 import open_s3  # botocore takes half a second to import

        return open_s3(url, options, retries, timeout_s)
    # A path without `://` is a folder: fsspec would take the part behind `::` for another URL.
    fs, root = fsspec.core.url_to_fs(url, **options) if "://" in url else open_filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return FolderBackend(fs, root)
    if isinstance(fs, MemoryFileSystem):
        return MemoryBackend(fs, root)
    return FilesystemBackend(fs, root)
