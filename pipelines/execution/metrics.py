"""Prometheus metrics of a run. Ray exports them from the driver's node, each with the prefix `ray_`."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.execution.outcomes import Outcome


# Ray exports the value of a gauge once, and not again until it is set again.
_RENEW_INTERVAL_S = 1.0


class PipelineMetrics:
    """Counters and gauges of a run's stages. Ray must be running when it is made."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._passages = metrics.Counter("prag_passages_total", "Passages that a stage finished.", ("stage", "outcome"))
        self._rejects = metrics.Counter("prag_rejects_total", "Passages that a stage gave up on.", ("stage", "reason"))
        self._tokens = metrics.Counter("prag_tokens_total", "Tokens trained, over all epochs.", ("stage",))
        self._busy = metrics.Counter("prag_work_seconds_total", "Seconds that actors worked on passages.", ("stage",))
        self._recoveries = metrics.Counter(
            "prag_recoveries_total", "Times that a stage went on after a loss.", ("stage",)
        )
        self._todo = metrics.Gauge("prag_stage_passages", "Passages that a stage has to do in this run.", ("stage",))
        # The start and not the seconds so far: those would not say whether the stage still runs.
        self._began = metrics.Gauge(
            "prag_stage_start_time_seconds", "When the current stage began, in seconds since the epoch.", ("stage",)
        )
        self._renewing: dict[str, tuple[threading.Thread, threading.Event]] = {}

    def begin(self, stage: str, total: int) -> None:
        """Set both gauges of a stage, and keep them set until its end."""
        began, ended = time.time(), threading.Event()

        def renew() -> None:
            while True:
                self._todo.set(total, {"stage": stage})
                self._began.set(began, {"stage": stage})
                if ended.wait(_RENEW_INTERVAL_S):
                    return

        thread = threading.Thread(target=renew, name=f"metrics of {stage}", daemon=True)
        thread.start()
        self._renewing[stage] = thread, ended

    def end(self, stage: str) -> None:
        """Stop setting the gauges of a stage."""
        thread, ended = self._renewing.pop(stage)
        ended.set()
        thread.join()

    def count(self, stage: str, outcomes: Iterable[Outcome]) -> None:
        """Count a block of outcomes."""
        reasons: Counter[str] = Counter()
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
