"""The serving core: answers for many users at once, from the snapshot in service, in one mixed batch.

One replica holds one `Service`. It knows neither Ray nor HTTP: whoever serves it to the network calls `answer`,
`stream` and `refresh` from an event loop (any, also several). Three kinds of threads work for it: one searches and
writes prompts (the Java machine takes one caller at a time anyway), some fetch adapters, one decodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from prag_core.config import Config, ServeConfig, check_defaults
from prag_core.errors import ConfigError, DeadlineError, OverloadedError, PragError, PromptTooLongError
from prag_core.inference.adapter_cache import AdapterCache, AdapterLease
from prag_core.inference.decode_thread import DecodeThread, Ticket
from prag_core.inference.detokenizer import StreamingDetokenizer
from prag_core.inference.disk_cache import DiskCache
from prag_core.inference.loaded_snapshot import LoadedSnapshot, open_snapshot
from prag_core.inference.processor import PreparedRequest
from prag_core.inference.request import Request
from prag_core.inference.stats import ServiceStats
from prag_core.inference.threads import SearchThread, thread_safe_put, wait_until
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.checkpoint import cache_dir
from prag_core.llm.decode_request import Decoded
from prag_core.llm.threads import compute_elsewhere
from prag_core.records import Answer, Hit
from prag_core.store.objects import Store
from prag_core.store.snapshot import current_id, load_snapshot

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 30.0
# How long closing waits for a search under way.
_CLOSE_S = 10.0


@dataclass(frozen=True)
class _Retrieved:
    """What the search gave, and the adapters that have begun to come."""

    hits: tuple[Hit, ...]
    lease: AdapterLease
    retrieve_ms: float


class Service:
    """One replica's core: answers requests in one mixed batch, each with its own sum of adapters.

    Made by `open_service`. Its methods may be called from any event loop and thread.

    Args:
        base: The frozen base model; nothing else may put hooks on it.
        opener: Opens a snapshot of the store by its id, or the one in service.
        current: Gives the id of the snapshot in service.
        cache: The adapters at hand.
        config: How the replica runs.
        cores: The cores that the decoding thread computes on; None stands for all that the process may use.
    """

    def __init__(
        self,
        base: BaseModel,
        opener: Callable[[str | None], LoadedSnapshot],
        current: Callable[[], str | None],
        cache: AdapterCache,
        config: ServeConfig,
        cores: int | None = None,
    ) -> None:
        self._opener = opener
        self._current = current
        self._cache = cache
        self._config = config
        self._tokenizer = base.tokenizer
        self._lock = threading.Lock()
        self._served = opener(None)
        self._held: dict[LoadedSnapshot, int] = {self._served: 0}
        self._requests: Counter[tuple[str, str]] = Counter()
        self._open = self._new_tokens = self._prompt_tokens = self._fallbacks = self._swaps = 0
        self._mean_s = 1.0
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._searching = SearchThread()
        self._refresh_pool = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._decoding = DecodeThread(
            base,
            slots=config.slots,
            prefill_chunk=config.prefill_chunk,
            max_tokens=config.batch_tokens,
            cores=cores,
        )

    @property
    def snapshot(self) -> str:
        """The id of the snapshot that new requests are answered from."""
        return self._served.id

    async def answer(self, request: Request, *, deadline_s: float | None = None) -> Answer:
        """Answer a request. A caller that is cancelled frees its slot.

        Args:
            request: The request; `hits` are not to be taken from users.
            deadline_s: Seconds from now after which the answer is of no use.

        Raises:
            OverloadedError: when the queue is full or the service is shutting down.
            DeadlineError: when the deadline has passed.
            PromptTooLongError: when the question with its passages exceeds the model's context.
            NotFiniteError: when the model's output is not finite.
            GenerationError: when decoding failed, or the model's chat template refuses the turns.
            RetrievalError: when the index cannot be searched.
            EngineStuckError: when the decoding thread has ended.
        """
        async with contextlib.aclosing(self._run(request, deadline_s, stream=False)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    return piece
        raise AssertionError("a run ends with an answer or an error")

    async def stream(self, request: Request, *, deadline_s: float | None = None) -> AsyncGenerator[str | Answer]:
        """Yield the pieces of an answer's text as they are made, and the whole answer last.

        The pieces together are the answer's text. Closing the iterator (`aclose`) cancels the request and frees its
        slot. It raises what `answer` raises.
        """
        async with contextlib.aclosing(self._run(request, deadline_s, stream=True)) as pieces:
            async for piece in pieces:
                yield piece

    async def refresh(self) -> bool:
        """Look at `CURRENT`, and put another snapshot into service here; True when it did.

        The new one is opened beside the old one, then one reference is swapped: requests go on with the snapshot
        that they began with, and the old one is closed when the last of them has ended.

        Raises:
            StoreError, RetrievalError, ModelError: when the new one cannot be opened; the old one stays.
        """
        # One thread: of two calls at once the second one finds the work done.
        return await asyncio.wrap_future(self._refresh_pool.submit(self._swap))

    def stats(self) -> ServiceStats:
        """Return what was done so far and what is under way."""
        with self._lock:
            return ServiceStats(
                snapshot=self._served.id,
                snapshots_held=len(self._held),
                requests=dict(self._requests),
                open=self._open,
                waiting=self._decoding.waiting,
                running=self._decoding.running,
                slots=self._config.slots,
                new_tokens=self._new_tokens,
                prompt_tokens=self._prompt_tokens,
                fallbacks=self._fallbacks,
                steps=self._decoding.steps,
                step_s=self._decoding.step_s,
                swaps=self._swaps,
                cache=self._cache.stats(),
            )

    def check(self) -> None:
        """Check that the replica works.

        Raises:
            EngineStuckError: when the decoding thread has died, keeps failing, or has made no step for
                `serve.stuck_s` seconds though work waits, or when a search has not ended for so long.
        """
        self._decoding.check(self._config.stuck_s)
        self._searching.check(self._config.stuck_s)

    async def drain(self) -> None:
        """Accept nothing new (`OverloadedError`), and wait until what is under way has ended."""
        with self._lock:
            self._draining = True
        await asyncio.to_thread(self._idle.wait)

    def close(self) -> None:
        """End at once: what is under way fails; threads and files are let go. Doing it again changes nothing."""
        with self._lock:
            self._draining = True
        self._decoding.close()
        # A search that is stuck in Java holds the lock that closing an index, and opening one, would wait for.
        ended = self._searching.close(_CLOSE_S)
        self._refresh_pool.shutdown(wait=ended, cancel_futures=True)
        self._cache.close()
        with self._lock:
            held, self._held = list(self._held), {}
        if not ended:
            log.error("a search has not ended: %d snapshots are left open", len(held))
            return
        for opened in held:
            _close(opened)

    # ---- a request

    async def _run(
        self, request: Request, deadline_s: float | None, stream: bool
    ) -> AsyncGenerator[str | Answer, None]:
        """Yield the pieces of the text as they are made, where `stream` asks for it, and the answer last."""
        begun = time.monotonic()
        deadline = None if deadline_s is None else begun + deadline_s
        opened = self._admit(request)
        outcome = "cancelled"
        searching: Future[_Retrieved] | None = None
        try:
            # 1. Search; the adapters begin to come as soon as it is known which.
            searching = self._searching.submit(self._search, opened, request)
            found = await wait_until(deadline, asyncio.wrap_future(searching))
            # 2. Wait for them, but not long: what has not come goes into the prompt.
            fetching = time.monotonic()
            prepared = await self._ready(opened, request, found, deadline)
            fetch_ms = (time.monotonic() - fetching) * 1e3 - prepared.milliseconds["prompt"]
            prepared.milliseconds["fetch"] = fetch_ms
            # 3. Decode. When the sum of the adapters is too large for the model, their passages go into the prompt
            # too, unless text of it was sent already: that is not taken back.
            text, sent = StreamingDetokenizer(self._tokenizer, request.stop, opened.preparation.template), False
            while True:
                tokens: list[int] = []
                async with contextlib.aclosing(self._decode(opened, prepared, deadline, stream)) as events:
                    while not isinstance(event := await anext(events), Decoded):
                        tokens.append(event)
                        if piece := text.add(tokens):
                            sent = True
                            yield piece
                if sent or not prepared.overflowed(event):
                    break
                rebuilding = self._searching.submit(opened.preparation.without_adapters, prepared)
                prepared = await wait_until(deadline, asyncio.wrap_future(rebuilding))
            answer = opened.preparation.answer(prepared, event)
            self._count(answer, prepared.fallbacks, time.monotonic() - begun)
            outcome = "ok"
            if stream and (piece := text.end(answer.text)):
                yield piece
            yield answer
        except DeadlineError:
            outcome = "deadline"
            raise
        except PromptTooLongError:
            outcome = "too_long"
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._end(opened, request, outcome, searching)

    def _admit(self, request: Request) -> LoadedSnapshot:
        """Count a request in and hold the snapshot in service for it, or turn it away."""
        with self._lock:
            most = self._config.slots + self._config.max_queue
            if self._draining or self._open >= most:
                self._requests[request.mode, "overloaded"] += 1
                if self._draining:
                    raise OverloadedError("the service is shutting down", 1.0)
                waits_s = self._mean_s * self._config.max_queue / self._config.slots
                raise OverloadedError(
                    f"{self._open} requests are under way, and the service takes no more",
                    min(max(1.0, waits_s), _LONGEST_RETRY_S),
                )
            self._open += 1
            self._idle.clear()
            self._held[self._served] += 1
            return self._served

    def _search(self, opened: LoadedSnapshot, request: Request) -> _Retrieved:
        begun = time.perf_counter()
        hits = opened.preparation.search(request)
        lease = self._cache.lease(opened.source, [hit.passage.key for hit in hits] if request.updates else [])
        return _Retrieved(hits, lease, (time.perf_counter() - begun) * 1e3)

    async def _ready(
        self, opened: LoadedSnapshot, request: Request, found: _Retrieved, deadline: float | None
    ) -> PreparedRequest:
        pending = [asyncio.wrap_future(future) for future in found.lease.futures if not future.done()]
        if pending:
            await wait_until(deadline, asyncio.wait(pending, timeout=self._config.fetch_timeout_s))
        factors = found.lease.factors(self._config.fetch_timeout_s)
        spent = {"retrieve": found.retrieve_ms, "fetch": 0.0}
        building = self._searching.submit(opened.preparation.build, request, found.hits, factors, spent)
        return await wait_until(deadline, asyncio.wrap_future(building))

    async def _decode(
        self, opened: LoadedSnapshot, prepared: PreparedRequest, deadline: float | None, stream: bool
    ) -> AsyncGenerator[int | Decoded, None]:
        """Yield the tokens as they are made, where `stream` asks for it, and the result last; closed before, cancel."""
        inbox: asyncio.Queue[int | Decoded | PragError] = asyncio.Queue()
        put = thread_safe_put(asyncio.get_running_loop(), inbox)
        ticket = Ticket(prepared.decode, opened.recipe, opened.layout, put if stream else None, put)
        self._decoding.submit(ticket)
        ended = False
        try:
            while not ended:
                event = await wait_until(deadline, inbox.get())
                ended = not isinstance(event, int)
                if isinstance(event, PragError):
                    raise event
                yield event
        finally:
            if not ended:
                self._decoding.cancel(ticket)

    def _count(self, answer: Answer, fallbacks: int, seconds: float) -> None:
        with self._lock:
            self._new_tokens += answer.new_tokens
            self._prompt_tokens += answer.prompt_tokens
            self._fallbacks += fallbacks
            self._mean_s += (seconds - self._mean_s) / 16

    def _end(
        self, opened: LoadedSnapshot, request: Request, outcome: str, searching: Future[_Retrieved] | None
    ) -> None:
        """Count a request out; what it holds is let go when its search, which nothing interrupts, has ended."""
        with self._lock:
            self._requests[request.mode, outcome] += 1
            self._open -= 1
            if not self._open:
                self._idle.set()

        def let_go(search: Future[_Retrieved]) -> None:
            if not search.cancelled() and search.exception() is None:
                search.result().lease.release()
            self._release(opened)

        if searching is None or searching.cancel():
            self._release(opened)
        else:
            searching.add_done_callback(let_go)

    # ---- snapshots

    def _swap(self) -> bool:
        id = self._current()
        if id is None or id == self._served.id:
            return False
        opened = self._opener(id)
        with self._lock:
            former, self._served = self._served, opened
            self._held[opened] = 0
            self._swaps += 1
            self._held[former] += 1
        log.info("snapshot %s came into service after %s", opened.id, former.id)
        self._release(former)
        return True

    def _release(self, opened: LoadedSnapshot) -> None:
        """Let go of a snapshot once; one that is not in service is closed with its last user."""
        with self._lock:
            if opened not in self._held:  # the service was closed meanwhile
                return
            self._held[opened] -= 1
            if self._held[opened] or opened is self._served:
                return
            del self._held[opened]
            retired = all(other.layout != opened.layout for other in self._held)
        _close(opened)
        if retired:
            self._decoding.retire(opened.layout)


def _close(opened: LoadedSnapshot) -> None:
    """Close a snapshot that nobody uses any more; what goes wrong then is nobody's failure."""
    try:
        opened.close()
    except Exception:
        log.exception("snapshot %s: cannot be closed", opened.id)


def open_service(config: Config, store: Store, cores: int | None = None) -> Service:
    """Open the snapshot in service of a store, and start the threads that answer from it.

    Adapters are kept in memory and in the local cache folder (`PRAG_CACHE`). The decoding thread computes on `cores`
    cores (None: all); the calling thread, and all that start later, on one each.

    Raises:
        ConfigError: when what a question gets by default is beyond the server's limits.
        StoreError: when nothing is published, or the snapshot was made with another base model.
        ModelError, RetrievalError: when the model or the index cannot be opened.
    """
    compute_elsewhere()
    check_defaults(config)
    settings = config.serve
    base = load_base_model(config.model)
    disk = DiskCache(cache_dir() / "adapters", settings.disk_cache_bytes) if settings.disk_cache_bytes else None
    cache = AdapterCache(
        settings.cache_bytes, disk=disk, threads=settings.fetch_threads, negative_ttl_s=settings.negative_ttl_s
    )

    def opener(id: str | None) -> LoadedSnapshot:
        opened = open_snapshot(base, config, store, load_snapshot(store, id))
        try:
            check_defaults(config, opened.preparation.max_new_tokens)
        except ConfigError:
            _close(opened)
            raise
        return opened

    return Service(base, opener, lambda: current_id(store), cache, settings, cores)
