"""What Prometheus sees of a run: Ray exports these from the driver's node, each with `ray_` before its name."""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.execution.outcomes import Outcome


# Ray exports what a gauge was last set to once, and then no more until it is set again.
_RENEWED_EVERY_S = 1.0


class PipelineMetrics:
    """Counters and gauges of a run's stages. Made once Ray runs."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self._passages = Counter("prag_passages_total", "Passages that a stage finished.", ("stage", "outcome"))
        self._rejects = Counter("prag_rejects_total", "Passages that a stage gave up on.", ("stage", "reason"))
        self._tokens = Counter("prag_tokens_total", "Tokens trained, over all epochs.", ("stage",))
        self._busy = Counter("prag_work_seconds_total", "Seconds that actors worked on passages.", ("stage",))
        self._recoveries = Counter("prag_recoveries_total", "Times that a stage went on after a loss.", ("stage",))
        self._todo = Gauge("prag_stage_passages", "Passages that a stage has to do in this run.", ("stage",))
        # Not how long it runs: of that nobody could say whether it still does.
        self._began = Gauge(
            "prag_stage_start_time_seconds", "When the stage under way began, in seconds since the epoch.", ("stage",)
        )
        self._renewing: dict[str, tuple[threading.Thread, threading.Event]] = {}

    def begin(self, stage: str, total: int) -> None:
        """Say that a stage begins, and what it has to do; both gauges are there until its end."""
        began, over = time.time(), threading.Event()

        def renew() -> None:
            while True:
                self._todo.set(total, {"stage": stage})
                self._began.set(began, {"stage": stage})
                if over.wait(_RENEWED_EVERY_S):
                    return

        thread = threading.Thread(target=renew, name=f"metrics of {stage}", daemon=True)
        thread.start()
        self._renewing[stage] = thread, over

    def end(self, stage: str) -> None:
        """Say that a stage has ended, well or not."""
        thread, over = self._renewing.pop(stage)
        over.set()
        thread.join()

    def count(self, stage: str, outcomes: Iterable[Outcome]) -> None:
        """Count a block of outcomes."""
        reasons: Tally[str] = Tally()
        tokens, busy = 0, 0.0
        for outcome in outcomes:
            reasons[outcome.rejected] += 1
            tokens += outcome.tokens
            busy += outcome.seconds
        for reason, n in reasons.items():
            self._passages.inc(n, {"stage": stage, "outcome": "rejected" if reason else "done"})
            if reason:
                self._rejects.inc(n, {"stage": stage, "reason": reason})
        # A counter takes no increment of zero.
        for counter, value in ((self._tokens, tokens), (self._busy, busy)):
            if value > 0:
                counter.inc(value, {"stage": stage})

    def recovered(self, stage: str) -> None:
        """Count that a stage went on after it lost a node or a process."""
        self._recoveries.inc(1, {"stage": stage})
