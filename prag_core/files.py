"""Reading a whole text file from anywhere, with errors that say what to do."""

from __future__ import annotations

import zlib

import fsspec

from prag_core.errors import InputError


def read_text(path: str, missing: str) -> str:
    """Return the text of a UTF-8 file (any fsspec URL, gzipped or not); `missing` is the remedy when there is none.

    Raises:
        InputError: when it is missing, unreadable or not UTF-8.
    """
    try:
        with fsspec.open(path, "rb", compression="infer") as stream:
            data: bytes = stream.read()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", missing) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}", "write the file again as UTF-8") from None
    except (OSError, EOFError, ValueError, ImportError, zlib.error) as error:
        what = str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read: {what}", "check the file and your access to it") from error
