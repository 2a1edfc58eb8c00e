"""The attempt log counts in the store how often each passage has lost its worker, so that a later run goes on counting.

A passage has an object in `runs/attempts/<stage>/<recipe>/`, named by its key, from the first worker that it loses
until it is done. A run without losses writes none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from prag_core.records import from_dict
from prag_core.store.objects import Store


@dataclass(frozen=True)
class Attempts:
    """The number of workers that were lost with a passage; `run` and `reason` are set once that run gave it up."""

    count: int
    run: str = ""
    reason: str = ""


class AttemptLog:
    """The attempts at the passages of a stage and a recipe, for one run.

    A passage that an earlier run gave up starts again at zero. Only the actor that works on a passage writes about
    it; if two do, as after a lost node, the last write counts.
    """

    def __init__(self, store: Store, run: str, stage: str, recipe: str) -> None:
        self._store = store
        self._run = run
        self._folder = f"runs/attempts/{stage}/{recipe}"

    def read(self, keys: Iterable[str]) -> dict[str, Attempts]:
        """Return the attempts at those of the passages that have any; this costs one listing if none has.

        Raises:
            StoreError: when the store cannot be read.
        """
        stored = {*self._store.list(self._folder, ".json")}
        named = {key: name for key in keys if (name := self._name(key)) in stored}
        found = {key: _decode(self._store.get_if_exists(name)) for key, name in named.items()}
        return {key: attempts for key, attempts in found.items() if attempts and attempts.run in ("", self._run)}

    def record_losses(self, counts: dict[str, int]) -> None:
        """Store for each passage how many workers it has lost so far."""
        for key, count in counts.items():
            self._store.put_json(self._name(key), asdict(Attempts(count)))

    def record_reject(self, key: str, count: int, reason: str) -> None:
        """Store that this run gave a passage up, so that no actor of this run tries it again."""
        self._store.put_json(self._name(key), asdict(Attempts(count, self._run, reason)))

    def clear(self, keys: Iterable[str]) -> None:
        """Remove the attempts at passages that are done."""
        for key in keys:
            self._store.remove(self._name(key))

    def _name(self, key: str) -> str:
        return f"{self._folder}/{key}.json"


def _decode(data: bytes | None) -> Attempts | None:
    """Return stored attempts; damaged ones count as none, which costs no more than some repeated attempts."""
    try:
        return from_dict(Attempts, json.loads(data)) if data else None
    except (ValueError, TypeError):
        return None
