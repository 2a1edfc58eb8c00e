"""The one thread that decodes all requests; they may come from any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from prag_core.errors import EngineStuckError, GenerationError, PragError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import Decoded, DecodeRequest
from prag_core.llm.decoder import Decoder
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Injector
from prag_core.llm.memory import free_unused, is_out_of_memory
from prag_core.llm.threads import compute_here
from prag_core.recipe import TrainRecipe

log = logging.getLogger(__name__)

# After this many failed steps in a row the thread counts as broken.
_MAX_FAILURES = 3


@dataclass(eq=False)
class DecodeJob:
    """A request to decode, and the functions that receive its tokens and its result.

    `on_token` and `on_end` are called in the decoding thread, so they must be quick. `on_end` is called last, with the
    result or an error; for a cancelled job it is never called.
    """

    request: DecodeRequest
    recipe: TrainRecipe
    layout: LoraLayout
    on_token: Callable[[int], None] | None
    on_end: Callable[[Decoded | PragError], None]
    cancelled: bool = False


@dataclass(eq=False)
class _Batch:
    """The decoder for adapters of one layout, its hooks, and its jobs by the ids of their requests."""

    decoder: Decoder
    injector: Injector
    jobs: dict[int, DecodeJob] = field(default_factory=dict)


class DecodeThread:
    """Runs one decoder for each layout of adapters in use; all requests of a layout share a batch.

    Only this thread adds hooks to the model and removes them, between steps.

    Args:
        base: The frozen model.
        slots: The most requests of a layout that decode together.
        prefill_chunk: The most prompt tokens read between two decoding steps.
        max_tokens: The most tokens in all slots together; a longer request runs alone.
        cores: The cores that it computes on; None stands for all that the process may use.
    """

    def __init__(
        self, base: BaseModel, *, slots: int, prefill_chunk: int, max_tokens: int | None, cores: int | None = None
    ) -> None:
        self._model = base.model
        self._device = base.device
        self._make_decoder = partial(Decoder, base, slots=slots, prefill_chunk=prefill_chunk, max_tokens=max_tokens)
        self._cores = cores
        self._claimed = threading.Event()
        self._wake = threading.Condition()
        self._inbox: deque[DecodeJob] = deque()
        self._dropped: deque[DecodeJob] = deque()
        self._retired: deque[LoraLayout] = deque()
        self._batches: dict[LoraLayout, _Batch] = {}
        self._closing = False
        self._progress = time.monotonic()
        self._failures = 0
        self.steps = 0
        self.step_s = 0.0
        self.running = 0
        self.waiting = 0
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()
        self._claimed.wait()  # a thread that starts meanwhile would compute on as many cores

    def submit(self, job: DecodeJob) -> None:
        """Queue a job; its `on_end` receives any error."""
        with self._wake:
            ended = self._closing or not self._thread.is_alive()
            if not ended:
                if not self._busy():
                    self._progress = time.monotonic()  # the thread was idle, not stuck
                self._inbox.append(job)
                self._wake.notify()
        if ended:
            job.on_end(EngineStuckError("the decoding thread has ended", "ask another replica"))

    def cancel(self, job: DecodeJob) -> None:
        """Drop a job, whether it runs or waits; its slot is free before the next step."""
        with self._wake:
            job.cancelled = True
            self._dropped.append(job)
            self._wake.notify()

    def retire(self, layout: LoraLayout) -> None:
        """Remove the decoder and the hooks of a layout that has no jobs and will get no more."""
        with self._wake:
            self._retired.append(layout)
            self._wake.notify()

    def check(self, stuck_s: float) -> None:
        """Check that the thread is alive and makes progress.

        Raises:
            EngineStuckError: when it has died, keeps failing, or has jobs but ended no step for `stuck_s` seconds.
        """
        with self._wake:
            idle_s = time.monotonic() - self._progress
            if not self._thread.is_alive():
                raise EngineStuckError("the decoding thread has ended", "replace this replica")
            if self._failures >= _MAX_FAILURES:
                raise EngineStuckError(
                    f"the last {self._failures} decoding steps failed", "see the log, and replace this replica"
                )
            if self._busy() and idle_s > stuck_s:
                raise EngineStuckError(
                    f"no decoding step has ended for {idle_s:.1f} s although requests are waiting",
                    "replace this replica, or raise serve.stuck_s",
                )

    def close(self) -> None:
        """End the thread after its current step; its jobs fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=60.0)

    def _busy(self) -> bool:
        return bool(self._inbox) or any(batch.jobs for batch in self._batches.values())

    def _run(self) -> None:
        compute_here(self._cores)
        self._claimed.set()
        try:
            while self._receive():
                for batch in list(self._batches.values()):
                    if batch.decoder.busy:
                        self._step(batch)
        finally:
            with self._wake:
                self._closing = True
                left = [*self._inbox, *(job for batch in self._batches.values() for job in batch.jobs.values())]
                self._inbox.clear()
            for batch in self._batches.values():
                batch.injector.close()
            for job in left:
                if not job.cancelled:
                    job.on_end(EngineStuckError("the decoding thread has ended", "ask another replica"))

    def _receive(self) -> bool:
        """Accept new jobs and cancellations, and wait for them when idle; returns False when the thread should end."""
        with self._wake:
            while not (self._closing or self._inbox or self._dropped or self._retired or self._busy()):
                self._wake.wait()
            if self._closing:
                return False
            new, dropped, retired = list(self._inbox), list(self._dropped), list(self._retired)
            self._inbox.clear()
            self._dropped.clear()
            self._retired.clear()
            for job in new:
                if not job.cancelled:
                    self._begin(job)
            for job in dropped:
                self._drop(job)
            for layout in retired:
                if (batch := self._batches.get(layout)) is not None and not batch.jobs:
                    del self._batches[layout]
                    batch.injector.close()
            self._count()
        return True

    def _begin(self, job: DecodeJob) -> None:
        try:
            batch = self._batches.get(job.layout)
            if batch is None:
                injector = Injector(self._model, job.recipe)
                batch = self._batches[job.layout] = _Batch(self._make_decoder(injector), injector)
            batch.jobs[batch.decoder.submit(job.request)] = job
        except PragError as error:
            job.on_end(error)

    def _drop(self, job: DecodeJob) -> None:
        for batch in self._batches.values():
            for id, other in batch.jobs.items():
                if other is job:
                    batch.decoder.cancel(id)
                    del batch.jobs[id]
                    return

    def _step(self, batch: _Batch) -> None:
        begun = time.monotonic()
        failure: Exception | None = None
        try:
            events = batch.decoder.step()
        except Exception as error:  # such as out of memory: these jobs fail, later ones may work
            log.exception("a decoding step failed")
            # Its traceback would keep the failed step's tensors alive.
            failure = error.with_traceback(None)
        if failure is not None:
            self._fail(batch, failure)
            return
        self._failures = 0
        self._progress = time.monotonic()
        self.steps += 1
        self.step_s = self._progress - begun
        jobs = [batch.jobs.pop(e.id) if e.result is not None else batch.jobs[e.id] for e in events]
        self._count()  # before `on_end`, so that the counts no longer include a job whose caller has its result
        for event, job in zip(events, jobs, strict=True):
            if job.cancelled:
                continue
            if event.token is not None and job.on_token is not None:
                job.on_token(event.token)
            if event.result is not None:
                job.on_end(event.result)

    def _fail(self, batch: _Batch, failure: Exception) -> None:
        """End all jobs of a batch whose step has failed."""
        jobs, batch.jobs = list(batch.jobs.values()), {}
        self._failures += 1
        self._progress = time.monotonic()
        reason = GenerationError(f"decoding failed: {type(failure).__name__}: {failure}", "ask again; see the log")
        for job in jobs:
            if not job.cancelled:
                job.on_end(reason)
        # Last, since on a lost device this fails too and ends the thread.
        batch.decoder.reset()
        if is_out_of_memory(failure):
            free_unused(self._device)
        self._count()

    def _count(self) -> None:
        self.running = sum(batch.decoder.running for batch in self._batches.values())
        self.waiting = sum(len(batch.jobs) for batch in self._batches.values()) - self.running
