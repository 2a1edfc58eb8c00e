"""API keys: the file that holds their hashes, and the check of a key that a request presents.

A key is `prag_<id>_<secret>`. The secret has 256 random bits, so one SHA-256 of it is safe to store. The file is JSON.
`prag keys` writes it as a whole, and a running server reads it again when it changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from prag_core.data.parsing import parse_json
from prag_core.errors import ConfigError
from prag_core.records import from_document

_PREFIX = "prag"
_ID_BYTES = 6
_SECRET_BYTES = 32
# An edit takes milliseconds. Where no lock can be made, waiting for it would have no end.
_LOCK_S = 10.0


@dataclass(frozen=True)
class ApiKey:
    """One key, as the file describes it.

    `access` are the access tags whose passages the key may see, besides the public ones. `rate_per_minute` is the
    key's own limit (0: the server's). `created` and `revoked` are ISO 8601 times; `revoked` is empty in a valid key.
    """

    id: str
    name: str
    hash: str
    access: tuple[str, ...] = ()
    rate_per_minute: int = 0
    created: str = ""
    revoked: str = ""


class KeyFile:
    """The file that `prag keys` edits. An edit is complete or absent, and only one process edits at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[ApiKey]:
        """Return all keys, also revoked ones; none when there is no file.

        Raises:
            ConfigError: when the file cannot be read or is not a list of keys.
        """
        try:
            document = parse_json(self.path.read_text(encoding="utf-8"))
            return [from_document(ApiKey, row) for row in document["keys"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{self.path}: not a file of API keys: {error}", "`prag keys add` writes it; restore or remove it"
            ) from None

    def add(self, name: str, access: Sequence[str] = (), rate_per_minute: int = 0) -> str:
        """Add a key and return it. It cannot be read again later.

        Raises:
            ConfigError: when the name cannot be shown in one line, no passage can have a tag, the file cannot be read
                or written, or a valid key already has this name.
        """
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{name!r} is no name for a key", "use letters, digits and signs, in one line")
        for tag in access:
            if not tag or tag != tag.strip():
                raise ConfigError(f"{tag!r} is no access tag of any passage", "give --access once for each tag")
        id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
        made = ApiKey(id, name, _hash(secret), tuple(sorted(set(access))), rate_per_minute, created=_now())
        with self._lock():
            keys = self.read()
            if any(key.name == name and not key.revoked for key in keys):
                raise ConfigError(f"{self.path}: there is a key named {name!r}", "revoke it first, or use another name")
            self._write([*keys, made])
        return f"{_PREFIX}_{id}_{secret}"

    def revoke(self, name: str) -> ApiKey:
        """Make the key with this name or id invalid, and return it.

        Raises:
            ConfigError: when the file cannot be read or written, or no valid key has this name or id.
        """
        with self._lock():
            keys = self.read()
            for index, key in enumerate(keys):
                if name in (key.name, key.id) and not key.revoked:
                    keys[index] = replace(key, revoked=_now())
                    self._write(keys)
                    return keys[index]
        raise ConfigError(f"{self.path}: no valid key is named {name!r}", "`prag keys list` shows them")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(f"{self.path}.lock", timeout=_LOCK_S)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:  # also when the time is over
            raise self._not_writable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _write(self, keys: Sequence[ApiKey]) -> None:
        document = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2)
        try:
            # mkstemp makes a file that only its owner may read.
            handle, partial = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(document + "\n")
            Path(partial).replace(self.path)
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path}: cannot be written: {error}", "check the folder and its permissions")


class KeyRing:
    """Checks keys against a file. It reads the file again when it changes, so a revoked key is refused at once."""

    def __init__(self, path: Path) -> None:
        self._file = KeyFile(path)
        self._stamp: tuple[int, ...] = ()
        self._keys: dict[str, ApiKey] = {}

    def find(self, presented: str) -> ApiKey | None:
        """Return the valid key that was presented, or None.

        The time this takes does not depend on how much of a secret is right.

        Raises:
            ConfigError: when the file cannot be read; no request may pass then.
        """
        self._reload()
        prefix, _, rest = presented.partition("_")
        id, _, secret = rest.partition("_")
        known = self._keys.get(id) if prefix == _PREFIX else None
        expected = known.hash if known else _hash("")
        right = hmac.compare_digest(_hash(secret).encode(), expected.encode())
        return known if known and right and not known.revoked else None

    def valid(self) -> list[ApiKey]:
        """Return the keys that are not revoked.

        Raises:
            ConfigError: when the file cannot be read.
        """
        self._reload()
        return [key for key in self._keys.values() if not key.revoked]

    def _reload(self) -> None:
        try:
            # The inode counts too: Kubernetes changes a mounted secret by pointing a link at another file.
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
