"""How often a passage has lost its worker: counted in the store, so that whoever goes on goes on counting.

From the first worker that it loses until it is done, a passage has an object in `runs/attempts/<stage>/<recipe>/`,
named by its key. A run without losses writes none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from prag_core.records import from_dict
from prag_core.store.objects import Store


@dataclass(frozen=True)
class Attempts:
    """The workers that a passage was in when they were lost; `reason` once `run` gave it up."""

    count: int
    run: str = ""
    reason: str = ""


class AttemptLog:
    """The attempts at the passages of a stage and a recipe, as a run of it sees them.

    A passage that an earlier run gave up, and that this one is asked to try, begins anew. Only the actor that works
    on a passage writes about it; of two at once, as after a lost node, the last one counts.
    """

    def __init__(self, store: Store, run: str, stage: str, recipe: str) -> None:
        self._store = store
        self._run = run
        self._folder = f"runs/attempts/{stage}/{recipe}"

    def read(self, keys: Iterable[str]) -> dict[str, Attempts]:
        """Return the attempts at those of the passages that have any; one listing where none has.

        Raises:
            StoreError: when the store cannot be read.
        """
        there = {*self._store.list(self._folder, ".json")}
        named = {key: name for key in keys if (name := self._name(key)) in there}
        found = {key: _decoded(self._store.get_if_exists(name)) for key, name in named.items()}
        return {key: attempts for key, attempts in found.items() if attempts and attempts.run in ("", self._run)}

    def lost(self, counts: dict[str, int]) -> None:
        """Note how many workers each of these passages has lost by now."""
        for key, count in counts.items():
            self._store.put_json(self._name(key), asdict(Attempts(count)))

    def given_up(self, key: str, count: int, reason: str) -> None:
        """Note that this run gave a passage up: whoever gets it again in this run has nothing to try."""
        self._store.put_json(self._name(key), asdict(Attempts(count, self._run, reason)))

    def done(self, keys: Iterable[str]) -> None:
        """Forget the attempts at passages that are done."""
        for key in keys:
            self._store.remove(self._name(key))

    def _name(self, key: str) -> str:
        return f"{self._folder}/{key}.json"


def _decoded(note: bytes | None) -> Attempts | None:
    """Return what a note says; one that is damaged says nothing, and costs no more than some attempts."""
    try:
        return from_dict(Attempts, json.loads(note)) if note else None
    except (ValueError, TypeError):
        return None
