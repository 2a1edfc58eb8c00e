"""The serving core: answers many users at once from the snapshot in service, in one mixed batch.

Each replica has one `Service`. It does not depend on Ray or HTTP: a server calls `answer`, `stream` and `refresh` from
any event loop, or from several. One thread searches and writes prompts, some threads fetch adapters, and one thread
decodes.
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
from prag_core.inference.decode_thread import DecodeJob, DecodeThread
from prag_core.inference.detokenizer import StreamingDetokenizer
from prag_core.inference.disk_cache import DiskCache
from prag_core.inference.loaded_snapshot import LoadedSnapshot, open_snapshot
from prag_core.inference.processor import Found, PreparedRequest
from prag_core.inference.request import Request
from prag_core.inference.snapshot_pool import SnapshotPool, close_snapshot
from prag_core.inference.stats import ServiceStats
from prag_core.inference.threads import SearchThread, thread_safe_put, wait_until
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.checkpoint import cache_dir
from prag_core.llm.decode_request import Decoded
from prag_core.llm.threads import compute_elsewhere
from prag_core.records import Answer
from prag_core.store.objects import Store
from prag_core.store.snapshot import current_id, load_snapshot

log = logging.getLogger(__name__)

# The longest `Retry-After` of a refused request.
_MAX_RETRY_S = 30.0
# How long `close` waits for the search under way.
_CLOSE_S = 10.0


@dataclass(frozen=True)
class _Retrieved:
    """A request with its passages, and the lease of their adapters, which are being fetched."""

    found: Found
    lease: AdapterLease


class Service:
    """Answers requests in one mixed batch, each with its own sum of adapters.

    `open_service` makes one. Its methods may be called from any event loop and thread.

    Args:
        base: The frozen base model; nothing else may add hooks to it.
        opener: Opens a snapshot of the store by its id, or the one in service for None.
        current: Returns the id of the snapshot in service.
        cache: The cache of adapters.
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
        self._cache = cache
        self._config = config
        self._tokenizer = base.tokenizer
        self._snapshots = SnapshotPool(opener, current, lambda layout: self._decode_thread.retire(layout))
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._open = self._new_tokens = self._prompt_tokens = self._fallbacks = 0
        # Running mean of how long a request takes, in seconds.
        self._mean_s = 1.0
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._search_thread = SearchThread()
        self._refresh_pool = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._decode_thread = DecodeThread(
            base,
            slots=config.slots,
            prefill_chunk=config.prefill_chunk,
            max_tokens=config.batch_tokens,
            cores=cores,
        )

    @property
    def snapshot(self) -> str:
        """The id of the snapshot from which new requests are answered."""
        return self._snapshots.served_id

    async def answer(self, request: Request, *, deadline_s: float | None = None) -> Answer:
        """Answer a request. If the caller is cancelled, its slot is freed.

        Args:
            request: The request; never take its `hits` from users.
            deadline_s: Seconds from now after which the request is dropped.

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
        """Yield the pieces of an answer's text as they are generated, and the whole answer last.

        The pieces together are the answer's text. Closing the iterator (`aclose`) cancels the request and frees its
        slot. It raises the errors of `answer`.
        """
        async with contextlib.aclosing(self._run(request, deadline_s, stream=True)) as pieces:
            async for piece in pieces:
                yield piece

    async def refresh(self) -> bool:
        """Read `CURRENT`, and use another snapshot from now on if it names one; returns whether it did.

        The new snapshot is opened beside the old one, then one reference is swapped. Running requests keep their
        snapshot, and the old one is closed after the last of them.

        Raises:
            StoreError, RetrievalError, ModelError: when the new one cannot be opened; the old one stays.
        """
        # There is one thread, so of two calls at once the second finds the new snapshot in use.
        return await asyncio.wrap_future(self._refresh_pool.submit(self._snapshots.swap))

    def stats(self) -> ServiceStats:
        """Return counters since the service was opened, and its present state."""
        with self._lock:
            return ServiceStats(
                snapshot=self._snapshots.served_id,
                snapshots_held=len(self._snapshots),
                requests=dict(self._requests),
                open=self._open,
                waiting=self._decode_thread.waiting,
                running=self._decode_thread.running,
                slots=self._config.slots,
                new_tokens=self._new_tokens,
                prompt_tokens=self._prompt_tokens,
                fallbacks=self._fallbacks,
                steps=self._decode_thread.steps,
                step_s=self._decode_thread.step_s,
                swaps=self._snapshots.swaps,
                cache=self._cache.stats(),
            )

    def check(self) -> None:
        """Check that the replica works.

        Raises:
            EngineStuckError: when the decoding thread has died or keeps failing, or when a decoding step or a search
                takes longer than `serve.stuck_s`.
        """
        self._decode_thread.check(self._config.stuck_s)
        self._search_thread.check(self._config.stuck_s)

    async def drain(self) -> None:
        """Refuse new requests (`OverloadedError`), and wait until the running ones have ended."""
        with self._lock:
            self._draining = True
        await asyncio.to_thread(self._idle.wait)

    def close(self) -> None:
        """Stop at once: running requests fail, threads end and files are closed. A second call does nothing."""
        with self._lock:
            self._draining = True
        self._decode_thread.close()
        # A search that is stuck in Java holds the lock that opening and closing an index need.
        ended = self._search_thread.close(_CLOSE_S)
        self._refresh_pool.shutdown(wait=ended, cancel_futures=True)
        self._cache.close()
        snapshots = self._snapshots.clear()
        if not ended:
            log.error("a search has not ended: %d snapshots are left open", len(snapshots))
            return
        for snapshot in snapshots:
            close_snapshot(snapshot)

    async def _run(
        self, request: Request, deadline_s: float | None, stream: bool
    ) -> AsyncGenerator[str | Answer, None]:
        """Yield the answer, and before it, if `stream`, the pieces of its text as they are generated."""
        begun = time.monotonic()
        deadline = None if deadline_s is None else begun + deadline_s
        snapshot = self._admit(request)
        outcome = "cancelled"
        searching: Future[_Retrieved] | None = None
        try:
            # 1. Search. The cache starts to fetch the adapters as soon as the passages are known.
            searching = self._search_thread.submit(self._search, snapshot, request)
            retrieved = await wait_until(deadline, asyncio.wrap_future(searching))
            # 2. Wait for the adapters, up to a time limit. The passages of those that are late go into the prompt.
            fetching = time.monotonic()
            prepared = await self._prepare(snapshot, retrieved, deadline)
            fetch_ms = (time.monotonic() - fetching) * 1e3 - prepared.milliseconds["prompt"]
            prepared.milliseconds["fetch"] = fetch_ms
            # 3. Decode. If the sum of the adapters is too large for the model, decode again with all passages in the
            # prompt, unless a part of the text was already sent.
            text, sent = StreamingDetokenizer(self._tokenizer, prepared.decode, snapshot.processor.template), False
            while True:
                tokens: list[int] = []
                async with contextlib.aclosing(self._decode(snapshot, prepared, deadline, stream)) as events:
                    while not isinstance(event := await anext(events), Decoded):
                        tokens.append(event)
                        if piece := text.add(tokens):
                            sent = True
                            yield piece
                if sent or not prepared.overflowed(event):
                    break
                rebuilding = self._search_thread.submit(snapshot.processor.without_adapters, prepared)
                prepared = await wait_until(deadline, asyncio.wrap_future(rebuilding))
            answer = snapshot.processor.answer(prepared, event)
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
            self._end(snapshot, request, outcome, searching)

    def _admit(self, request: Request) -> LoadedSnapshot:
        """Accept a request and return the snapshot to answer it from, or refuse it."""
        with self._lock:
            most = self._config.slots + self._config.max_queue
            if self._draining or self._open >= most:
                self._requests[request.mode, "overloaded"] += 1
                if self._draining:
                    raise OverloadedError("the service is shutting down", 1.0)
                waits_s = self._mean_s * self._config.max_queue / self._config.slots
                raise OverloadedError(
                    f"{self._open} requests are under way, and the service takes no more",
                    min(max(1.0, waits_s), _MAX_RETRY_S),
                )
            self._open += 1
            self._idle.clear()
            return self._snapshots.acquire()

    def _search(self, snapshot: LoadedSnapshot, request: Request) -> _Retrieved:
        found = snapshot.processor.search(request)
        lease = self._cache.lease(snapshot.source, [hit.passage.key for hit in found.hits] if found.updates else [])
        return _Retrieved(found, lease)

    async def _prepare(
        self, snapshot: LoadedSnapshot, retrieved: _Retrieved, deadline: float | None
    ) -> PreparedRequest:
        pending = [asyncio.wrap_future(future) for future in retrieved.lease.futures if not future.done()]
        if pending:
            await wait_until(deadline, asyncio.wait(pending, timeout=self._config.fetch_timeout_s))
        adapters = retrieved.lease.adapters(self._config.fetch_timeout_s)
        building = self._search_thread.submit(snapshot.processor.build, retrieved.found, adapters, {"fetch": 0.0})
        return await wait_until(deadline, asyncio.wrap_future(building))

    async def _decode(
        self, snapshot: LoadedSnapshot, prepared: PreparedRequest, deadline: float | None, stream: bool
    ) -> AsyncGenerator[int | Decoded, None]:
        """Yield the result, and before it, if `stream`, each token; if closed before the result, cancel the job."""
        inbox: asyncio.Queue[int | Decoded | PragError] = asyncio.Queue()
        put = thread_safe_put(asyncio.get_running_loop(), inbox)
        job = DecodeJob(prepared.decode, snapshot.recipe, snapshot.layout, put if stream else None, put)
        self._decode_thread.submit(job)
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
                self._decode_thread.cancel(job)

    def _count(self, answer: Answer, fallbacks: int, seconds: float) -> None:
        with self._lock:
            self._new_tokens += answer.new_tokens
            self._prompt_tokens += answer.prompt_tokens
            self._fallbacks += fallbacks
            self._mean_s += (seconds - self._mean_s) / 16

    def _end(
        self, snapshot: LoadedSnapshot, request: Request, outcome: str, searching: Future[_Retrieved] | None
    ) -> None:
        """Count the end of a request, and release its lease and snapshot, if necessary after its running search."""
        with self._lock:
            self._requests[request.mode, outcome] += 1
            self._open -= 1
            if not self._open:
                self._idle.set()

        def release(search: Future[_Retrieved]) -> None:
            if not search.cancelled() and search.exception() is None:
                search.result().lease.release()
            self._snapshots.release(snapshot)

        if searching is None or searching.cancel():
            self._snapshots.release(snapshot)
        else:
            searching.add_done_callback(release)


def open_service(config: Config, store: Store, cores: int | None = None, *, gpus: float | None = None) -> Service:
    """Open the snapshot in service of a store, and start the threads that answer from it.

    Adapters are kept in memory and in the local cache folder (`PRAG_CACHE`). The decoding thread computes on `cores`
    cores (None: all); the calling thread, and all that start later, on one each. `gpus` are the GPUs that this process
    holds; see `choose_device`.

    Raises:
        ConfigError: when a default for questions is beyond the server's limits.
        StoreError: when nothing is published, or the snapshot was made with another base model.
        ModelError, RetrievalError: when the model or the index cannot be opened.
    """
    compute_elsewhere()
    check_defaults(config)
    settings = config.serve
    base = load_base_model(config.model, gpus=gpus)
    disk = DiskCache(cache_dir() / "adapters", settings.disk_cache_bytes) if settings.disk_cache_bytes else None
    cache = AdapterCache(
        settings.cache_bytes,
        dtype=base.model.dtype,
        page_locked=base.device.type == "cuda",
        disk=disk,
        threads=settings.fetch_threads,
        negative_ttl_s=settings.negative_ttl_s,
    )

    def opener(id: str | None) -> LoadedSnapshot:
        snapshot = open_snapshot(base, config, store, load_snapshot(store, id))
        try:
            check_defaults(config, snapshot.processor.max_new_tokens)
        except ConfigError:
            close_snapshot(snapshot)
            raise
        return snapshot

    return Service(base, opener, lambda: current_id(store), cache, settings, cores)
