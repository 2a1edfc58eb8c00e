"""Opens input files on any fsspec file system as the files that Python knows; errors say what to do.

fsspec promises little of the files that it opens: one on S3 reads no line of a limited length, one on HTTP cannot seek,
and each file system has errors of its own. So readers get a buffered file over it, whose errors are OSErrors.
"""

from __future__ import annotations

import bz2
import contextlib
import inspect
import io
import lzma
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.compression import compr
from fsspec.core import get_compression, split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from prag_core.config import StorageConfig, s3_client_config, s3_options
from prag_core.errors import InputError
from prag_core.packaged import local_path

_BUFFER_BYTES = 1 << 20
HTTP = ("http://", "https://")
# Control characters, the ends of lines and paragraphs, and the marks that turn the direction of writing.
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# What unpacking may take of memory. The strongest usual setting, `xz -9`, takes 65 MiB; a small file can ask for 4 GiB.
_UNPACKING_BYTES = 256 << 20
# Endings of compressed files that only a further package reads; without it, fsspec would not unpack them.
_PACKAGES = {"zst": "zstandard", "lz4": "lz4"}
# Formats whose files may be several packed streams in a row, and what unpacks one stream.
_STREAMS: Mapping[str, Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]] = {
    "bz2": bz2.BZ2Decompressor,
    "xz": partial(lzma.LZMADecompressor, memlimit=_UNPACKING_BYTES),
    "lzma": partial(lzma.LZMADecompressor, memlimit=_UNPACKING_BYTES),
}


def shown(name: str) -> str:
    """Return a path as text that can be printed and stored, in one line.

    Bytes that are not UTF-8 are spelled out (`\\xe9`), and so are line ends and what commands a terminal (`\\x1b`).
    """
    try:
        text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        text = name.encode(errors="backslashreplace").decode()
    return _NOT_SHOWN.sub(lambda sign: sign.group().encode("unicode_escape").decode(), text)


def without_query(name: str) -> str:
    """Return a path, and of an HTTP URL only what stands before the query, which may be a signature."""
    return urlsplit(name)._replace(query="", fragment="").geturl() if name.startswith(HTTP) else name


def open_filesystem(url: str, storage: StorageConfig | None = None) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it. `storage` says how to reach servers.

    A path without `://` is one on this machine, whatever other characters it has.

    Raises:
        ValueError: when no file system has the URL's scheme.
        ImportError: when the file system's package is not installed.
        FileNotFoundError: when this machine lacks the package of a `package://` URL.
    """
    path = local_path(url).removeprefix("file://")
    if not path:
        raise ValueError("it names no file")
    if "://" not in path:
        local = Path(path).expanduser() if path.startswith("~/") else Path(path)
        return LocalFileSystem(), str(local.absolute())
    options = _options(path, storage or StorageConfig())
    first = path.split("::", 1)[0]
    protocol = split_protocol(first)[0] or first
    classes = fsspec.get_filesystem_class(protocol).__mro__
    arguments = {name for c in classes for name in inspect.signature(c.__init__).parameters}
    if "::" not in path or {"fo", "target_protocol"} & arguments:
        fs, name = url_to_fs(path, **options)
        return fs, name
    # This file system reads from no other one, so `::` is a part of the name.
    fs = fsspec.filesystem(protocol, **options.get(protocol, {}))
    return fs, fs._strip_protocol(path)


def _options(url: str, storage: StorageConfig) -> dict[str, dict[str, Any]]:
    """Return the arguments of the file systems in a URL, by protocol."""
    options: dict[str, dict[str, Any]] = {}
    for protocol in ("s3", "s3a"):
        if f"{protocol}://" in url:
            config = s3_client_config(storage.retries, storage.timeout_s)
            options[protocol] = {**s3_options(storage), "use_listings_cache": False, "config_kwargs": config}
    for protocol in ("http", "https"):
        if f"{protocol}://" in url:
            from aiohttp import ClientTimeout  # takes time to import

            # A large file may take longer than aiohttp's five minutes, but each wait is limited.
            timeout = ClientTimeout(total=None, sock_connect=storage.timeout_s, sock_read=storage.timeout_s)
            options[protocol] = {"client_kwargs": {"timeout": timeout}}
    return options


@contextlib.contextmanager
def open_file(fs: Any, name: str, *, seekable: bool = False) -> Iterator[io.BufferedReader]:
    """Open a file of a file system for reading, unpacked as its ending says (`.gz`, `.bz2`, `.xz`, `.zip`).

    With `seekable` it can be read in any order; where it could not, it is copied to a temporary file first.

    Raises:
        FileNotFoundError: when there is no such file.
        OSError: for any other failure, here or while the file is read.
        InputError: when the file is packed in a way that cannot be read.
    """
    plain = without_query(name)
    ending = plain.rpartition(".")[2].lower()
    packed = get_compression(plain, "infer")
    if packed is None and ending in _PACKAGES:
        raise InputError(f"{shown(plain)}: cannot be unpacked", f"install {_PACKAGES[ending]}, or pack it as .gz")
    with contextlib.ExitStack() as stack:
        # Over HTTP, a block size of 0 reads the file by one request; not each server offers ranges.
        whole = {"block_size": 0} if name.startswith(HTTP) else {}
        if seekable or packed == "zip":
            file = _buffered(stack, partial(_open, fs, name))
            if not _can_seek(file):
                file = _copied(stack, _buffered(stack, partial(_open, fs, name, **whole)))
        else:
            file = _buffered(stack, partial(_open, fs, name, **whole))
        if packed == "gzip" and name.startswith(HTTP) and not file.peek(2).startswith(b"\x1f\x8b"):
            packed = None  # the server calls the packing an encoding of the transfer, so the client has undone it
        if packed == "zip":
            file = _buffered(stack, partial(_only_member, file, shown(plain)))
        elif packed in _STREAMS:
            file = _buffered(stack, partial(_Streams, file, _STREAMS[packed]))
        elif packed is not None:
            file = _buffered(stack, partial(compr[packed], file, mode="rb"))
        # A packed file would be unpacked from its start each time that a reader seeks.
        yield _copied(stack, file) if seekable and packed else file


def read_text(path: str, missing: str, storage: StorageConfig | None = None) -> str:
    """Return the text of a UTF-8 file (any fsspec URL, gzipped or not). `storage` says how to reach servers.

    Raises:
        InputError: when the file is missing (then `missing` is the remedy), unreadable or not UTF-8.
    """
    with _input_errors(path, missing):
        with open_file(*open_filesystem(path, storage)) as stream:
            data = stream.read()
        return data.decode("utf-8-sig")


def check_readable(path: str, missing: str, storage: StorageConfig | None = None) -> None:
    """Read the beginning of a file.

    Raises:
        InputError: as `read_text`.
    """
    with _input_errors(path, missing), open_file(*open_filesystem(path, storage)) as stream:
        stream.read(1)


@contextlib.contextmanager
def _input_errors(path: str, missing: str) -> Iterator[None]:
    name = shown(without_query(path))
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such file", missing) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}", "write the file again as UTF-8") from None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name}: cannot be read: {error}", "check the file and your access to it") from error


def http_failure(name: str, error: FileNotFoundError) -> str:
    """Return why an HTTP server gave no file, empty if it has none: fsspec calls each failure a missing file."""
    cause = error.__cause__
    if not name.startswith(HTTP) or cause is None or getattr(cause, "status", None) == 404:
        return ""
    return str(cause) or type(cause).__name__


def _open(fs: Any, name: str, **options: Any) -> Any:
    try:
        return fs.open(name, "rb", **options)
    except FileNotFoundError as error:
        if failure := http_failure(name, error):
            raise OSError(failure) from error
        raise


def _only_member(archive: io.BufferedReader, name: str) -> Any:
    content = zipfile.ZipFile(archive)
    names = [item.filename for item in content.infolist() if not item.is_dir()]
    if len(names) != 1:
        raise InputError(f"{name}: holds {len(names)} files, and one is read", "unpack it, and name the folder")
    return content.open(names[0])


def _buffered(stack: contextlib.ExitStack, opener: Callable[[], Any]) -> io.BufferedReader:
    with _os_errors():
        return stack.enter_context(io.BufferedReader(_InputFile(opener()), _BUFFER_BYTES))


def _copied(stack: contextlib.ExitStack, file: io.BufferedReader) -> io.BufferedReader:
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    shutil.copyfileobj(file, copy, _BUFFER_BYTES)
    copy.seek(0)
    return _buffered(stack, lambda: copy)


def _can_seek(file: io.BufferedReader) -> bool:
    """Whether the end of a file can be read, as a Parquet reader does first; the file is at its start afterwards."""
    try:
        file.seek(-1, io.SEEK_END)
        file.read(1)
        file.seek(0)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turn the errors of a file system or a decompressor into OSErrors: botocore's, aiohttp's and zlib's are none."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from error


class _Streams:
    """The content of a file of packed streams. The readers of Python take a damaged stream for the end of the file."""

    def __init__(self, file: io.BufferedReader, start: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]):
        self._file = file
        self._start = start
        self._stream = start()

    def read(self, size: int) -> bytes:
        while True:
            packed = b""
            if self._stream.eof:
                # Zero bytes may fill up a file of xz.
                packed = (self._stream.unused_data or self._file.read(_BUFFER_BYTES)).lstrip(b"\0")
                if not packed and not self._file.peek(1):
                    return b""
                self._stream = self._start()
            elif self._stream.needs_input and not (packed := self._file.read(_BUFFER_BYTES)):
                raise EOFError("it ends in the middle of a packed stream")
            if data := self._stream.decompress(packed, size):
                return data

    def close(self) -> None:
        pass


class _InputFile(io.RawIOBase):
    """A file that a file system or a decompressor has opened; nothing but its `read`, `seek` and `tell` is used."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _os_errors():
            data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _os_errors():
            self._source.seek(offset, whence)
        return self.tell()

    def tell(self) -> int:
        with _os_errors():
            return int(self._source.tell())

    def close(self) -> None:
        if not self.closed:
            super().close()
            with contextlib.suppress(Exception):  # everything that was asked for has been read
                self._source.close()
