"""What Prometheus is told: counted in each replica, and shown for all of them together at `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from prag_core.inference.stats import ServiceStats
from prag_core.records import Answer

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The numbers of one replica, in a registry of its own.

    Args:
        stats: Gives the service's own numbers when they are asked for.
    """

    def __init__(self, stats: Callable[[], ServiceStats]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "prag_requests", "Questions by route, mode and the code they ended with.", ["route", "mode", "code"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "prag_request_seconds", "Seconds from a question's arrival to its answer.", ["route", "mode"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "prag_first_text_seconds", "Seconds from a streamed question's arrival to its first text.", ["mode"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._steps = Histogram(
            "prag_step_seconds", "Seconds of an answer spent in each step.", ["step"],
            buckets=_STEP_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._passages = Counter(
            "prag_passages", "Retrieved passages by how they were used; `fallback` was meant for the weights.", ["use"],
            registry=self.registry,
        )  # fmt: skip
        self._refresh_errors = Counter(
            "prag_refresh_errors", "Times that the store could not be asked for a new snapshot.", registry=self.registry
        )
        self._open = Gauge("prag_open_requests", "Questions under way, waiting ones included.", registry=self.registry)
        self.registry.register(_Stats(stats))
        ProcessCollector(registry=self.registry)

    @contextmanager
    def question(self, route: str, mode: str) -> Iterator[Watch]:
        """Within this context a question is under way; the `Watch` is told what happens to it."""
        watch = Watch(self, mode)
        self._open.inc()
        try:
            yield watch
        finally:
            self._open.dec()
            self._requests.labels(route, mode, watch.code).inc()
            if watch.code == "ok":
                self._seconds.labels(route, mode).observe(time.perf_counter() - watch.begun)

    def refresh_failed(self) -> None:
        """Count a refresh that failed."""
        self._refresh_errors.inc()

    def text(self) -> str:
        """Return this replica's numbers in Prometheus's text format."""
        return generate_latest(self.registry).decode()

    def first_text(self, mode: str, seconds: float) -> None:
        """Note how long the first text of a streamed answer took."""
        self._first.labels(mode).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Note what an answer took and used."""
        for step, milliseconds in answer.milliseconds.items():
            self._steps.labels(step).observe(milliseconds / 1e3)
        for passage in answer.passages:
            if passage.in_weights:
                self._passages.labels("weights").inc()
            if passage.in_prompt:
                self._passages.labels("fallback" if passage.note else "prompt").inc()


class Watch:
    """What happens to one question. `code` is what it ends with: `ok`, an error's code, or `cancelled`."""

    def __init__(self, metrics: Metrics, mode: str) -> None:
        self.begun = time.perf_counter()
        self.code = "cancelled"
        self._metrics = metrics
        self._mode = mode
        self._streams = False

    def text(self) -> None:
        """A piece of text was made."""
        if not self._streams:
            self._streams = True
            self._metrics.first_text(self._mode, time.perf_counter() - self.begun)

    def answer(self, answer: Answer) -> None:
        """The answer is there."""
        self.code = "ok"
        self._metrics.answered(answer)


class _Stats(Collector):
    """The service's own numbers, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], ServiceStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        cache = now.cache
        for name, text, value in (
            ("prag_slots", "Places in the decoder's batch.", now.slots),
            ("prag_running_requests", "Places in use.", now.running),
            ("prag_waiting_requests", "Accepted requests without a place yet.", now.waiting),
            ("prag_snapshots_held", "Snapshots that are open; more than one during a swap.", now.snapshots_held),
            ("prag_decoder_step_seconds", "Seconds that the decoder's last step took.", now.step_s),
            ("prag_cache_bytes", "Bytes of adapters in memory.", cache.size_bytes),
            ("prag_cache_adapters", "Adapters in memory.", cache.entries),
            ("prag_cache_disk_bytes", "Bytes of adapters on the local disk.", cache.disk_bytes),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("prag_decoder_steps", "Steps of the decoder.", now.steps),
            ("prag_snapshot_swaps", "Times that another snapshot came into service.", now.swaps),
            ("prag_fallbacks", "Passages put into a prompt because their adapters could not be had.", now.fallbacks),
            ("prag_cache_evictions", "Adapters that made room for others.", cache.evictions),
        ):
            yield CounterMetricFamily(name, text, value)
        yield _labelled(
            "prag_tokens", "Tokens of prompts read and of answers made.", "kind",
            {"prompt": now.prompt_tokens, "new": now.new_tokens},
        )  # fmt: skip
        yield _labelled(
            "prag_cache_lookups", "Adapters asked for, by where they were found.", "found",
            {"memory": cache.hits, "disk": cache.disk_hits, "store": cache.misses, "nowhere": cache.failures},
        )  # fmt: skip
        snapshot = GaugeMetricFamily("prag_snapshot", "1 for the snapshot in service.", labels=["snapshot"])
        snapshot.add_metric([now.snapshot], 1)
        yield snapshot


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def merged(texts: dict[str, str]) -> str:
    """Return the numbers of several replicas as one text, each told apart by the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):  # when each of them was first counted: nothing to show
                continue
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families
