"""The serving core: answers for many users at once, from the snapshot in service, in one mixed batch.

One replica holds one `Service`. It knows neither Ray nor HTTP: whoever serves it to the network calls `answer`,
`stream` and `refresh` from an event loop (any, also several).
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prag_core.config import Config
from prag_core.engine import Engine, open_engine
from prag_core.errors import DeadlineError, OverloadedError
from prag_core.prepare import Request
from prag_core.records import Answer
from prag_core.snapshot import current_id
from prag_core.store import Store

__all__ = ["Request", "Service", "ServiceStats", "open_service"]


@dataclass(frozen=True)
class CacheStats:
    """What the adapter cache did since it was made (counts), and what it holds (bytes, entries)."""

    hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    failures: int = 0
    evictions: int = 0
    entries: int = 0
    size_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class ServiceStats:
    """Counters since the service was opened, and gauges of now.

    Args:
        snapshot: The snapshot in service.
        snapshots_held: How many are open: more than one while requests of a former one are under way.
        requests: Requests that ended, by (mode, outcome); an outcome is `ok`, `overloaded`, `deadline`,
            `cancelled`, `too_long` or `failed`.
        waiting: Requests that were accepted and have no slot yet.
        running: Slots in use.
        slots: Slots in all.
        new_tokens: Tokens generated.
        prompt_tokens: Prompt tokens of the requests answered.
        fallbacks: Passages that went into a prompt because their adapters could not be had.
        steps: Steps of the decoder.
        step_s: Seconds that the last step took.
        swaps: Times that another snapshot came into service.
        cache: The adapter cache.
    """

    snapshot: str
    snapshots_held: int = 1
    requests: dict[tuple[str, str], int] = field(default_factory=dict)
    waiting: int = 0
    running: int = 0
    slots: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    fallbacks: int = 0
    steps: int = 0
    step_s: float = 0.0
    swaps: int = 0
    cache: CacheStats = CacheStats()


class Service:
    """One replica's core: answers requests in one mixed batch, each with its own sum of adapters.

    Made by `open_service`. Its methods may be called from any event loop; it works on threads of its own.
    """

    def __init__(self, engine: Engine, store: Store, config: Config, snapshot: str) -> None:
        self._engine = engine
        self._store = store
        self._config = config
        self._snapshot = snapshot
        self._one = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._open = 0
        self._draining = False

    @property
    def snapshot(self) -> str:
        """The id of the snapshot that new requests are answered from."""
        return self._snapshot

    async def answer(self, request: Request, *, deadline_s: float | None = None) -> Answer:
        """Answer a request. A caller that is cancelled frees its slot.

        Args:
            request: The request; `hits` are not taken from users.
            deadline_s: Seconds from now after which the answer is of no use.

        Raises:
            OverloadedError: when the queue is full or the service is shutting down.
            DeadlineError: when the deadline has passed.
            PromptTooLongError: when the question with its passages exceeds the model's context.
            GenerationError: when the model's output is not finite, or decoding failed.
            RetrievalError: when the index cannot be searched.
            EngineStuckError: when the decoding thread has ended.
        """
        if self._draining or self._open >= self._config.serve.slots + self._config.serve.max_queue:
            raise OverloadedError("the service has as many requests as it takes", 1.0)
        self._open += 1
        try:
            async with asyncio.timeout(deadline_s):
                answer = await asyncio.to_thread(self._answer, request)
        except TimeoutError:
            self._requests[request.mode, "deadline"] += 1
            raise DeadlineError("the deadline has passed", "ask for fewer tokens, or later") from None
        finally:
            self._open -= 1
        self._requests[request.mode, "ok"] += 1
        return answer

    async def stream(self, request: Request, *, deadline_s: float | None = None) -> AsyncIterator[str | Answer]:
        """Yield the pieces of an answer's text as they are made, and the whole answer last.

        The pieces together are the answer's text. Closing the iterator (`aclose`) cancels the request and frees its
        slot. It raises what `answer` raises.
        """
        answer = await self.answer(request, deadline_s=deadline_s)
        if answer.text:
            yield answer.text
        yield answer

    async def refresh(self) -> bool:
        """Look at `CURRENT`, and put another snapshot into service here; True when it did.

        The new one is opened beside the old one, then one reference is swapped: requests go on with the snapshot
        that they began with, and the old one is closed when the last of them has ended.

        Raises:
            StoreError, RetrievalError, ModelError: when the new one cannot be opened; the old one stays.
        """
        return await asyncio.to_thread(current_id, self._store) not in (None, self._snapshot)

    def stats(self) -> ServiceStats:
        """Return what was done so far and what is under way."""
        return ServiceStats(self._snapshot, requests=dict(self._requests), slots=self._config.serve.slots)

    def check(self) -> None:
        """Check that the replica works.

        Raises:
            EngineStuckError: when the decoding thread has died, or has made no step for `serve.stuck_s` seconds
                though work waits.
        """

    async def drain(self) -> None:
        """Accept nothing new (`OverloadedError`), and wait until what is under way has ended."""
        self._draining = True
        while self._open:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """End at once: what is under way fails; threads and files are let go."""
        self._engine.close()

    def _answer(self, request: Request) -> Answer:
        with self._one:
            return self._engine.answer(request)


def open_service(config: Config, store: Store) -> Service:
    """Open the snapshot in service of a store, and start the threads that answer from it.

    Raises:
        StoreError: when nothing is published, or the snapshot was made with another base model.
        ModelError, RetrievalError: when the model or the index cannot be opened.
    """
    engine = open_engine(store, config)
    return Service(engine, store, config, current_id(store) or "")
