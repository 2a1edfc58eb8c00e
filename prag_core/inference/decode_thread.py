"""One thread that decodes for everybody: requests come from any thread, tokens go back as they are made."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prag_core.errors import EngineStuckError, GenerationError, PragError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import Decoded, DecodeRequest
from prag_core.llm.decoder import Decoder
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Injector
from prag_core.llm.threads import compute_here
from prag_core.recipe import TrainRecipe

log = logging.getLogger(__name__)

# Steps that may fail one after the other before the thread counts as broken.
_MOST_FAILURES = 3


@dataclass(eq=False)
class Ticket:
    """A request under way. `on_token` and `on_end` are called in the decoding thread: they must be quick.

    After `on_end` comes nothing more. A cancelled request has no end.
    """

    request: DecodeRequest
    recipe: TrainRecipe
    layout: LoraLayout
    on_token: Callable[[int], None] | None
    on_end: Callable[[Decoded | PragError], None]
    cancelled: bool = False


@dataclass(eq=False)
class _Lane:
    """The decoder for adapters of one layout, its hooks, and the tickets of its requests by their ids."""

    decoder: Decoder
    injector: Injector
    tickets: dict[int, Ticket] = field(default_factory=dict)


class DecodeThread:
    """Drives a decoder for each layout of adapters in use; all requests of one layout share one batch.

    Hooks are put on the model and taken off by this thread alone, between steps.

    Args:
        base: The frozen model.
        slots: The most requests of a layout that decode together.
        prefill_chunk: The most prompt tokens that a step reads before the running requests go on.
        max_tokens: The most tokens that the slots hold together; a request beyond it runs alone.
        cores: The cores that it computes on; None stands for all that the process may use.
    """

    def __init__(
        self, base: BaseModel, *, slots: int, prefill_chunk: int, max_tokens: int | None, cores: int | None = None
    ) -> None:
        self._base = base
        self._slots = slots
        self._prefill_chunk = prefill_chunk
        self._max_tokens = max_tokens
        self._cores = cores
        self._claimed = threading.Event()
        self._wake = threading.Condition()
        self._inbox: deque[Ticket] = deque()
        self._dropped: deque[Ticket] = deque()
        self._retired: deque[LoraLayout] = deque()
        self._lanes: dict[LoraLayout, _Lane] = {}
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

    def submit(self, ticket: Ticket) -> None:
        """Queue a request; a failure of any kind comes to its `on_end`."""
        with self._wake:
            if self._closing or not self._thread.is_alive():
                ended = True
            else:
                ended = False
                if not self._busy():
                    self._progress = time.monotonic()  # it was idle, not stuck
                self._inbox.append(ticket)
                self._wake.notify()
        if ended:
            ticket.on_end(EngineStuckError("the decoding thread has ended", "ask another replica"))

    def cancel(self, ticket: Ticket) -> None:
        """Drop a request, whether it runs or waits: its slot is free before the next step."""
        with self._wake:
            ticket.cancelled = True
            self._dropped.append(ticket)
            self._wake.notify()

    def retire(self, layout: LoraLayout) -> None:
        """Let go of the decoder and the hooks of a layout, of which no request is under way or will come."""
        with self._wake:
            self._retired.append(layout)
            self._wake.notify()

    def check(self, stuck_s: float) -> None:
        """Check that the thread lives and makes progress.

        Raises:
            EngineStuckError: when it has died, keeps failing, or has made no step for `stuck_s` seconds with work
                waiting.
        """
        with self._wake:
            idle_s = time.monotonic() - self._progress
            if not self._thread.is_alive():
                raise EngineStuckError("the decoding thread has ended", "replace this replica")
            if self._failures >= _MOST_FAILURES:
                raise EngineStuckError(f"the last {self._failures} decoding steps failed", "see its log; replace it")
            if self._busy() and idle_s > stuck_s:
                raise EngineStuckError(
                    f"no decoding step has ended for {idle_s:.1f} s though work waits",
                    "replace this replica, or raise serve.stuck_s",
                )

    def close(self) -> None:
        """End the thread after its current step; what is under way fails."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=60.0)

    def _busy(self) -> bool:
        return bool(self._inbox) or any(lane.tickets for lane in self._lanes.values())

    def _run(self) -> None:
        compute_here(self._cores)
        self._claimed.set()
        try:
            while self._receive():
                for lane in list(self._lanes.values()):
                    if lane.decoder.busy:
                        self._step(lane)
        finally:
            with self._wake:
                self._closing = True
                left = [*self._inbox, *(ticket for lane in self._lanes.values() for ticket in lane.tickets.values())]
                self._inbox.clear()
            for lane in self._lanes.values():
                lane.injector.close()
            for ticket in left:
                if not ticket.cancelled:
                    ticket.on_end(EngineStuckError("the decoding thread has ended", "ask another replica"))

    def _receive(self) -> bool:
        """Take what came in, waiting for it when there is nothing to do; False when the thread is to end."""
        with self._wake:
            while not (self._closing or self._inbox or self._dropped or self._retired or self._busy()):
                self._wake.wait()
            if self._closing:
                return False
            new, dropped, retired = list(self._inbox), list(self._dropped), list(self._retired)
            self._inbox.clear()
            self._dropped.clear()
            self._retired.clear()
            for ticket in new:
                if not ticket.cancelled:
                    self._begin(ticket)
            for ticket in dropped:
                self._drop(ticket)
            for layout in retired:
                if (lane := self._lanes.get(layout)) is not None and not lane.tickets:
                    del self._lanes[layout]
                    lane.injector.close()
            self._count()
        return True

    def _begin(self, ticket: Ticket) -> None:
        try:
            lane = self._lanes.get(ticket.layout)
            if lane is None:
                injector = Injector(self._base.model, ticket.recipe)
                decoder = Decoder(
                    self._base,
                    injector,
                    slots=self._slots,
                    prefill_chunk=self._prefill_chunk,
                    max_tokens=self._max_tokens,
                )
                lane = self._lanes[ticket.layout] = _Lane(decoder, injector)
            lane.tickets[lane.decoder.submit(ticket.request)] = ticket
        except PragError as error:
            ticket.on_end(error)

    def _drop(self, ticket: Ticket) -> None:
        for lane in self._lanes.values():
            for id, other in lane.tickets.items():
                if other is ticket:
                    lane.decoder.cancel(id)
                    del lane.tickets[id]
                    return

    def _step(self, lane: _Lane) -> None:
        begun = time.monotonic()
        try:
            events = lane.decoder.step()
        except Exception as error:  # out of memory, a broken kernel: these requests fail, the next ones may not
            log.exception("a decoding step failed")
            tickets, lane.tickets = list(lane.tickets.values()), {}
            self._failures += 1
            self._progress = time.monotonic()
            reason = GenerationError(f"decoding failed: {type(error).__name__}: {error}", "ask again; see the log")
            for ticket in tickets:
                if not ticket.cancelled:
                    ticket.on_end(reason)
            # After they were told: on a device that is gone this fails too, and ends the thread.
            lane.decoder.reset()
            self._count()
            return
        self._failures = 0
        self._progress = time.monotonic()
        self.steps += 1
        self.step_s = self._progress - begun
        tickets = [lane.tickets.pop(e.id) if e.result is not None else lane.tickets[e.id] for e in events]
        self._count()  # before anyone is told: whoever has an answer finds its slot free
        for event, ticket in zip(events, tickets, strict=True):
            if ticket.cancelled:
                continue
            if event.token is not None and ticket.on_token is not None:
                ticket.on_token(event.token)
            if event.result is not None:
                ticket.on_end(event.result)

    def _count(self) -> None:
        self.running = sum(lane.decoder.running for lane in self._lanes.values())
        self.waiting = sum(len(lane.tickets) for lane in self._lanes.values()) - self.running
