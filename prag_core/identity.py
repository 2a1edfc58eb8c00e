"""Identity: keys of passages, canonical JSON, fingerprints and checksums.

What decides identity is content, never position. A passage keeps its key when its file is shuffled, and a recipe
keeps its fingerprint when a machine, a batch size or a path changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

KEY_BYTES = 16
FINGERPRINT_BYTES = 8


def normalize(text: str) -> str:
    """Return `text` in Unicode's normal form C, with each run of white space replaced by one space.

    Passage keys depend on it. `prag_core.data.questions.normalize_answer` names the other rules for comparing texts.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def passage_key(title: str, text: str) -> str:
    """Return the key of a passage: a hash of its normalized title and text, as 32 hexadecimal digits."""
    # Normalized text holds no line feed, so it separates title and text without ambiguity.
    joined = f"{normalize(title)}\n{normalize(text)}"
    return hashlib.blake2b(joined.encode(), digest_size=KEY_BYTES).hexdigest()


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of `value`: with sorted keys and without spaces.

    Raises:
        TypeError: if `value` holds anything whose text could differ between runs (a set, an object, a key that is no
            string).
        ValueError: if `value` holds a float that JSON cannot express (NaN, an infinity).
    """
    return json.dumps(_stable(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _stable(value: Any, path: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which has no canonical JSON")
        # 4.0 and 4 mean the same setting; YAML users write either.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _stable(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}; canonical JSON takes string keys only")
        return {key: _stable(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_stable(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{path} is a {type(value).__name__}, which has no canonical JSON")


def fingerprint(value: Any) -> str:
    """Return the hash of the canonical JSON of `value`, as 16 hexadecimal digits."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=FINGERPRINT_BYTES).hexdigest()


def checksum(data: bytes | memoryview) -> str:
    """Return the checksum of stored bytes: their BLAKE2b hash, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).hexdigest()


def is_checksum(text: str) -> bool:
    """Return whether a text has the form of a checksum or a key: 32 hexadecimal digits."""
    return re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", text) is not None


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with its own fingerprint in `seal`; `is_intact` then finds any later change."""
    return {**document, "seal": fingerprint(document)}


def is_intact(document: Mapping[str, Any]) -> bool:
    """Return whether a document is unchanged since `seal`. One without a seal is from an older version: intact."""
    content = {name: value for name, value in document.items() if name != "seal"}
    return document.get("seal", None) in (None, fingerprint(content))
