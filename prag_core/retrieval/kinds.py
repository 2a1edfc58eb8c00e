"""The kinds of index: what each provides, and how the configured one is found.

A kind is one module that provides what `IndexKind` names, and one line of `INDEX_KINDS` in `prag_core.config`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from prag_core.config import INDEX_KINDS, IndexConfig
from prag_core.identity import fingerprint
from prag_core.records import Hit, Passage


class Retriever(Protocol):
    """Finds the passages of an index that best match a question. Several threads may call it."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        """Return at most `top_k` hits that score `min_score` or more, best first; equal scores in the order of keys."""

    def close(self) -> None:
        """Release the index's files. A later search is an error; closing twice is not."""


@runtime_checkable
class IndexKind(Protocol):
    """What the module of a kind provides. Its functions raise `RetrievalError`."""

    INDEX_RULE: int  # the version of what it writes: raising it gives each index another id, so all are rebuilt
    SEARCH_SETTINGS: AbstractSet[str]  # fields of `IndexConfig` that only act when searching; ids leave them out
    PROCESS_ENV: dict[str, str]  # environment variables that a process needs from its start to build or search
    REQUIREMENT: str  # what a machine must have, as the preflight check names it

    def find_requirement(self) -> Path:
        """Return where this machine has what `REQUIREMENT` names."""

    def writer_version(self) -> str:
        """Return the version of the software that writes the index; an index of another version is not updated."""

    def build_index(self, passages: Iterable[Passage], directory: Path, config: IndexConfig) -> int:
        """Write an index of `passages` into `directory`; return how many it holds."""

    def update_index(
        self, directory: Path, gone: Iterable[str], passages: Iterable[Passage], config: IndexConfig
    ) -> int:
        """Remove the passages with the keys `gone` from an index, add others; return how many it then holds."""

    def open_retriever(self, directory: Path, config: IndexConfig) -> Retriever:
        """Open the index in `directory`, which `local_cache.hold` marks as in use until the retriever is closed."""


def index_kind(config: IndexConfig) -> IndexKind:
    """Return the module of the configured kind."""
    return cast(IndexKind, importlib.import_module(INDEX_KINDS[config.kind]))


def index_id(corpus_version: str, config: IndexConfig) -> str:
    """Return the id of an index: the fingerprint of the corpus version and the settings that decide its content.

    Settings at their default are left out, so that a new setting does not change the ids of stored indexes.
    """
    kind = index_kind(config)
    settings = config.model_dump(exclude=set(kind.SEARCH_SETTINGS), exclude_defaults=True)
    return fingerprint({"rule": kind.INDEX_RULE, "corpus": corpus_version, "settings": settings})
