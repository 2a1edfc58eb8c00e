"""Metrics for Prometheus: each replica counts its own, and `/metrics` shows those of all replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """The metrics of one replica, in a registry of its own.

    Args:
        stats: Returns the service's statistics; called at each scrape.
    """

    def __init__(self, stats: Callable[[], ServiceStats]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "prag_requests", "Questions by route, mode and code of the outcome.", ["route", "mode", "code"],
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
            "prag_passages", "Retrieved passages by use; `fallback`: in the prompt, meant for the weights.", ["use"],
            registry=self.registry,
        )  # fmt: skip
        self._chosen = Counter(
            "prag_auto_answers", "Answers of `auto` by the mode that it chose.", ["mode"], registry=self.registry
        )
        self._refresh_errors = Counter(
            "prag_refresh_errors", "Failed checks of the store for a new snapshot.", registry=self.registry
        )
        self._open = Gauge("prag_open_requests", "Questions under way, waiting ones included.", registry=self.registry)
        self.registry.register(_ServiceCollector(stats))
        ProcessCollector(registry=self.registry)

    @contextmanager
    def question(self, route: str, mode: str) -> Iterator[QuestionRecorder]:
        """Count a question as under way within this context; the `QuestionRecorder` takes its outcome."""
        recorder = QuestionRecorder(self, mode)
        self._open.inc()
        try:
            yield recorder
        finally:
            self._open.dec()
            self._requests.labels(route, mode, recorder.code).inc()
            if recorder.code == "ok":
                self._seconds.labels(route, mode).observe(time.perf_counter() - recorder.begun)

    def refresh_failed(self) -> None:
        """Count a refresh that failed."""
        self._refresh_errors.inc()

    def text(self) -> str:
        """Return this replica's metrics in Prometheus's text format."""
        return generate_latest(self.registry).decode()

    def first_text(self, mode: str, seconds: float) -> None:
        """Record how long the first text of a streamed answer took."""
        self._first.labels(mode).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Record the times of an answer and how its passages were used."""
        if answer.why:
            self._chosen.labels(answer.mode).inc()
        for step, milliseconds in answer.milliseconds.items():
            self._steps.labels(step).observe(milliseconds / 1e3)
        for passage in answer.passages:
            if passage.in_weights:
                self._passages.labels("weights").inc()
            if passage.in_prompt:
                self._passages.labels("fallback" if passage.note else "prompt").inc()


class QuestionRecorder:
    """Records the outcome of one question. `code` is `ok`, an error's code, or at first `cancelled`."""

    def __init__(self, metrics: Metrics, mode: str) -> None:
        self.begun = time.perf_counter()
        self.code = "cancelled"
        self._metrics = metrics
        self._mode = mode
        self._streams = False

    def text(self) -> None:
        """Record that a piece of text was made."""
        if not self._streams:
            self._streams = True
            self._metrics.first_text(self._mode, time.perf_counter() - self.begun)

    def answer(self, answer: Answer) -> None:
        """Record the answer."""
        self.code = "ok"
        self._metrics.answered(answer)


class _ServiceCollector(Collector):
    """The service's statistics, read at each scrape."""

    def __init__(self, stats: Callable[[], ServiceStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        cache = now.cache
        for name, text, value in (
            ("prag_slots", "Slots of the decoder's batch.", now.slots),
            ("prag_running_requests", "Slots in use.", now.running),
            ("prag_waiting_requests", "Accepted requests that wait for a slot.", now.waiting),
            ("prag_snapshots_held", "Open snapshots; more than one during a swap.", now.snapshots_held),
            ("prag_decoder_step_seconds", "Seconds of the decoder's last step.", now.step_s),
            ("prag_cache_bytes", "Bytes of adapters in memory.", cache.size_bytes),
            ("prag_cache_adapters", "Adapters in memory.", cache.entries),
            ("prag_cache_disk_bytes", "Bytes of adapters on the local disk.", cache.disk_bytes),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("prag_decoder_steps", "Steps of the decoder.", now.steps),
            ("prag_snapshot_swaps", "Changes of the snapshot in service.", now.swaps),
            (
                "prag_fallbacks",
                "Passages put into the prompt because the adapter was missing, late or damaged.",
                now.fallbacks,
            ),
            ("prag_cache_evictions", "Adapters removed from memory to make room.", cache.evictions),
        ):
            yield CounterMetricFamily(name, text, value)
        yield _labelled(
            "prag_tokens", "Tokens of prompts and of answers.", "kind",
            {"prompt": now.prompt_tokens, "new": now.new_tokens},
        )  # fmt: skip
        yield _labelled(
            "prag_cache_lookups", "Adapter lookups by where the adapter was found.", "found",
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


def merge_metrics(texts: Mapping[str, str]) -> str:
    """Return the metrics of several replicas, by name, as one text in which the label `replica` has the name."""
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):  # the time of the first count, which nobody needs
                continue
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry()
    registry.register(_MergedCollector(list(families.values())))
    return generate_latest(registry).decode()


class _MergedCollector(Collector):
    """Metrics that are there already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families
