"""API keys: a file that holds only their hashes, and the check of a key that a request brings.

A key is `prag_<id>_<secret>`; the secret has 256 random bits, so that one SHA-256 is enough to keep it. The file
is JSON, written whole by `prag keys` and read again by a running server when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from prag_core.errors import ConfigError
from prag_core.records import from_dict

_PREFIX = "prag"
_ID_BYTES = 6
_SECRET_BYTES = 32


@dataclass(frozen=True)
class ApiKey:
    """What the file says of one key.

    `access` are the access tags whose passages its bearer may see besides the public ones; `rate_per_minute` is
    its own limit (0: the server's). `created` and `revoked` are times; an empty `revoked` means that it is valid.
    """

    id: str
    name: str
    hash: str
    access: tuple[str, ...] = ()
    rate_per_minute: int = 0
    created: str = ""
    revoked: str = ""


class KeyFile:
    """The file that `prag keys` edits: whole or not at all, and one editor at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[ApiKey]:
        """Return all keys, revoked ones too; none when there is no such file.

        Raises:
            ConfigError: when the file cannot be read or is no list of keys.
        """
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            return [from_dict(ApiKey, row) for row in document["keys"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{self.path}: not a file of API keys: {error}", "`prag keys add` writes it; restore or remove it"
            ) from None

    def add(self, name: str, access: Sequence[str] = (), rate_per_minute: int = 0) -> str:
        """Add a key and return it; this is the only time that it is seen.

        Raises:
            ConfigError: when the file cannot be read or written, or a valid key has this name.
        """
        id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
        made = ApiKey(id, name, _hash(secret), tuple(sorted(set(access))), rate_per_minute, created=_now())
        with self._editing():
            keys = self.read()
            if any(key.name == name and not key.revoked for key in keys):
                raise ConfigError(
                    f"{self.path}: there is a key named {name!r}", "revoke it first, or take another name"
                )
            self._write([*keys, made])
        return f"{_PREFIX}_{id}_{secret}"

    def revoke(self, name: str) -> ApiKey:
        """Make the key of this name or id invalid, and return it.

        Raises:
            ConfigError: when the file cannot be read or written, or no valid key has this name or id.
        """
        with self._editing():
            keys = self.read()
            for place, key in enumerate(keys):
                if name in (key.name, key.id) and not key.revoked:
                    keys[place] = replace(key, revoked=_now())
                    self._write(keys)
                    return keys[place]
        raise ConfigError(f"{self.path}: no valid key is named {name!r}", "`prag keys list` shows them")

    def _editing(self) -> FileLock:
        self._make_folder()
        return FileLock(f"{self.path}.lock")

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error}", "check the folder and its rights") from error

    def _write(self, keys: Sequence[ApiKey]) -> None:
        document = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2)
        try:
            # mkstemp gives the file to its owner alone.
            handle, partial = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(document + "\n")
            Path(partial).replace(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error}", "check the folder and its rights") from error


class KeyRing:
    """Checks keys against a file, and follows the file: what is revoked there is refused from the next request on."""

    def __init__(self, path: Path) -> None:
        self._file = KeyFile(path)
        self._stamp: tuple[int, ...] = ()
        self._keys: dict[str, ApiKey] = {}

    def find(self, presented: str) -> ApiKey | None:
        """Return the valid key that was presented, or None.

        How long it takes does not depend on how much of a secret is right.

        Raises:
            ConfigError: when the file cannot be read: then nobody is let in.
        """
        self._follow()
        prefix, _, rest = presented.partition("_")
        id, _, secret = rest.partition("_")
        known = self._keys.get(id) if prefix == _PREFIX else None
        expected = known.hash if known else ""
        right = hmac.compare_digest(_hash(secret), expected or _hash(""))
        return known if known and right and not known.revoked else None

    def valid(self) -> list[ApiKey]:
        """Return the keys that are not revoked.

        Raises:
            ConfigError: when the file cannot be read.
        """
        self._follow()
        return [key for key in self._keys.values() if not key.revoked]

    def _follow(self) -> None:
        try:
            # A mounted secret changes by a link that turns to another file.
            found = self._file.path.stat()
            stamp: tuple[int, ...] = (found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            stamp = ()
        if not stamp or stamp != self._stamp:
            self._keys = {key.id: key for key in self._file.read()}
            self._stamp = stamp


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
