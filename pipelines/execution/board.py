"""The board on which workers write how far they are within a batch, for whoever shows the progress of a stage.

A batch may train for an hour, and its outcomes come when it ends. What the board holds is for people alone: nothing is
decided by it, and a lost board costs nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 1.0
_READ_TIMEOUT_S = 2.0


class Board:
    """The Ray actor that holds how many passages of its batches each worker has worked on, in fractions."""

    def __init__(self) -> None:
        self._passages: dict[str, float] = {}

    def write(self, worker: str, passages: float) -> None:
        """Replace what a worker has written; 0 when its batch has ended."""
        if passages:
            self._passages[worker] = passages
        else:
            self._passages.pop(worker, None)

    def total(self) -> float:
        """Return the passages that were worked on in batches that have not ended."""
        return sum(self._passages.values())

    def clear(self) -> None:
        """Forget all workers, as when another stage begins."""
        self._passages.clear()


class BoardReader:
    """Opens the board of a run and reads it; `handle` is for the workers. Ray must be running."""

    def __init__(self) -> None:
        self.handle: Any = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()

    def read(self) -> float:
        """Return the passages that were worked on in batches that have not ended; 0 if the board does not answer."""
        try:
            return float(ray.get(self.handle.total.remote(), timeout=_READ_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            log.debug("the board of progress does not answer: %s", error)
            return 0.0

    def clear(self) -> None:
        """Forget what the workers of an earlier stage wrote."""
        self.handle.clear.remote()


class BoardWriter:
    """Writes a worker's progress on a board, at most once a second.

    A worker's threads have one batch each, so each thread writes under a name of its own. A worker that was restarted
    has the name of the one before.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._worker = ray.get_runtime_context().get_actor_id() if handle is not None else ""
        self._written: dict[str, float] = {}

    def write(self, passages: float) -> None:
        """Write how many passages of this thread's batch were worked on."""
        if self._handle is None:
            return
        name, now = self._name(), time.monotonic()
        if now - self._written.get(name, 0.0) >= _SECONDS_BETWEEN_REPORTS:
            self._written[name] = now
            self._handle.write.remote(name, passages)

    def end(self) -> None:
        """Write that this thread's batch has ended."""
        if self._handle is not None and self._written.pop(self._name(), None) is not None:
            self._handle.write.remote(self._name(), 0.0)

    def _name(self) -> str:
        return f"{self._worker}/{threading.get_ident()}"
