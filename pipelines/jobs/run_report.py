"""The report of a run as one HTML page: passages, rejects, pairs and coverage, losses, seconds and cost by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from rich.filesize import decimal

from pipelines.jobs.status import RunStatus, read_run
from pipelines.report_page import COLOURS, Plot, escape, glossary, page, plotting, section, table
from pipelines.settings import profile_of
from pipelines.words import counted, duration
from prag_core.config_file import read_config
from prag_core.errors import ConfigError, InputError
from prag_core.records import LedgerRow, Reject, from_table
from prag_core.store.ledger import visible_parts
from prag_core.store.objects import Store
from prag_core.store.runs import read_lease

_SHOWN_REJECTS = 50
# With a lower loss, the model gives most of the answers that its adapter was trained on.
_LEARNED = 0.5
_TERMS = {
    "reused": "done by an earlier run, and kept",
    "rejected": "given up with a reason; in = done + rejected, at each stage",
    "pair": "a question about the passage and its answer; the adapter is trained on them",
    "coverage": "share of a passage's names, numbers, dates and content sentences that some pair asks about",
    "loss": "cross entropy of the answers, in nats a token; an adapter that knows its passage's answers is near 0",
}


@dataclass(frozen=True)
class RunFacts:
    """What the store knows of a run. `adapters` are those that it trained; `dollars` is None without a price."""

    status: RunStatus
    snapshot: str
    store: str
    rejects: tuple[Reject, ...]
    adapters: tuple[LedgerRow, ...]
    gpu_hours: float
    dollars: float | None

    @property
    def seconds(self) -> float:
        """Seconds of all stages that have ended."""
        return sum(float(stage["seconds"]) for stage in self.status.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values; of the adapters only what sums them up."""
        losses = [row.last_loss for row in self.adapters]
        return {
            "run": self.status.run,
            "state": self.status.state,
            "snapshot": self.snapshot,
            "stages": self.status.stages,
            "rejects": len(self.rejects),
            "adapters": len(self.adapters),
            "last_loss_median": round(float(np.median(losses)), 4) if losses else None,
            "seconds": round(self.seconds, 2),
            "gpu_hours": round(self.gpu_hours, 4),
            "dollars": self.dollars,
        }


def read_run_facts(store: Store, run: str | None, price_gpu_hour: float | None = None) -> RunFacts:
    """Return what the store knows of a run, by default of the newest one.

    Raises:
        InputError: when there is no such run.
        StoreError: when the store cannot be read.
    """
    runs = sorted({name.split("/")[1] for name in store.list("runs", "/config.yaml")})
    if not runs or (run is not None and run not in runs):
        newest = f"the newest runs are {', '.join(runs[-3:])}" if runs else "run `prag run` first"
        raise InputError(f"{store.url}: no run {run}" if run else f"{store.url}: no run yet", newest)
    name = run or runs[-1]
    status = read_run(store, name, read_lease(store))
    report = store.get_json(f"runs/{name}/report.json") if store.exists(f"runs/{name}/report.json") else {}
    inputs = store.get_json(f"runs/{name}/inputs.json") if store.exists(f"runs/{name}/inputs.json") else {}
    recipe, begun = report.get("recipe") or inputs.get("recipe"), _epoch(status.started)
    rows: list[LedgerRow] = []
    if recipe:
        parts = visible_parts(store, recipe)
        rows = [row for row in from_table(LedgerRow, store.get_table(LedgerRow, parts)) if row.created >= begun]
    # The document has whole seconds.
    ended = _epoch(status.updated) + 1 if status.state != "running" else float("inf")
    parts = [part for part in store.list("rejects", ".parquet") if f"/{name}" in part]
    rejects = from_table(Reject, store.get_table(Reject, parts))
    gpus = _gpus(store, name)
    seconds = {stage["stage"]: float(stage["seconds"]) for stage in status.stages}
    gpu_hours = sum(gpus.get(stage, 0.0) * spent for stage, spent in seconds.items()) / 3600
    return RunFacts(
        status,
        report.get("snapshot", ""),
        store.url,
        tuple(sorted(rejects, key=lambda r: (r.stage, r.reason, r.source))),
        tuple(row for row in rows if row.created <= ended),
        gpu_hours,
        None if price_gpu_hour is None else round(gpu_hours * price_gpu_hour, 2),
    )


def _gpus(store: Store, run: str) -> dict[str, float]:
    """Return the GPUs that each stage of a run held at most, by its stored configuration."""
    name = f"runs/{run}/config.yaml"
    try:
        profile = profile_of(read_config(store.get(name).decode(), name))
    except ConfigError:  # another version's: the rest of the report is as good without it
        return {}
    return {
        "augment": profile.augment.gpus * profile.augment.max_size,
        "train": profile.train.gpus * profile.train.max_size,
    }


def _epoch(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def run_page(facts: RunFacts) -> str:
    """Return the report of a run as an HTML page."""
    status = facts.status
    said = [_verdict(facts)]
    extra: dict[str, Any] = next((s["extra"] for s in status.stages if s["stage"] == "augment"), {})
    if extra.get("coverage") is not None:
        kept = sum(int(pairs) * n for pairs, n in extra["pairs"].items())
        passages = sum(extra["pairs"].values())
        said.append(
            ("open", f"{kept / passages:.1f} pairs a passage cover {extra['coverage']:.0%} of what the passages say.")
        )
    if facts.adapters:
        known = sum(row.last_loss < _LEARNED for row in facts.adapters) / len(facts.adapters)
        text = f"{known:.0%} of the adapters ended with a loss below {_LEARNED}: {_spread(facts)}."
        said.append(("good" if known > 0.9 else "open", text))
    parts = [
        f'<p class="quiet">{escape(facts.store)}, begun {escape(status.started.replace("T", " "))}</p>',
        '<ul class="verdict">' + "".join(f'<li class="{c}">{escape(text)}</li>' for c, text in said) + "</ul>",
        *(section(title, svg) for title, svg in _plots(facts, extra)),
        section("Stages", table("Stages", *_stages(facts))),
    ]
    if extra.get("refused"):
        rows = [[reason, f"{n:,}"] for reason, n in sorted(extra["refused"].items(), key=lambda item: -item[1])]
        parts.append(section("Pairs that were refused", table("Pairs that were refused", ["reason", "pairs"], rows)))
    if facts.rejects:
        rows = [[f"{r.stage}/{r.reason}", r.source, r.detail] for r in facts.rejects[:_SHOWN_REJECTS]]
        left = len(facts.rejects) - len(rows)
        more = f"<p>… and {left} more; see <code>prag rejects --json</code>.</p>" if left else ""
        parts.append(section("Rejects", table("Rejects", ["reason", "source", "detail"], rows, "text") + more))
    parts.append(section("Terms", glossary(_TERMS)))
    return page(f"Run {status.run}", parts)


def _verdict(facts: RunFacts) -> tuple[str, str]:
    status = facts.status
    time = duration(facts.seconds)
    if status.state == "finished":
        kept = next((stage["done"] for stage in status.stages if stage["stage"] == "train"), 0)
        rejected = counted(sum(sum(stage["rejected"].values()) for stage in status.stages), "reject")
        text = f"Finished in {time}: {counted(kept, 'adapter')}, {rejected}, snapshot {facts.snapshot}."
        return "good", text + (f" {facts.dollars:,.2f} dollars of GPUs at most." if facts.dollars is not None else "")
    if status.state == "running":
        return "open", f"Still running: {status.line()}."
    reason = f" {status.error.splitlines()[0]}" if status.error else ""
    return "bad", f"{status.state.capitalize()} after {time}.{reason} Run `prag run` again to continue."


def _spread(facts: RunFacts) -> str:
    losses = [row.last_loss for row in facts.adapters]
    low, middle, high = np.quantile(losses, [0.1, 0.5, 0.9])
    return f"median {middle:.2f}, 10 % below {low:.2f}, 10 % above {high:.2f}"


def _stages(facts: RunFacts) -> tuple[list[str], Sequence[Sequence[str]]]:
    head = ["stage", "in", "done", "reused", "rejected", "time", "passages/s", "bytes"]
    rows = [
        [
            stage["stage"],
            f"{stage['taken']:,}",
            f"{stage['done']:,}",
            f"{stage['earlier']:,}",
            f"{sum(stage['rejected'].values()):,}",
            duration(stage["seconds"]),
            f"{stage['passages_per_s']:.2f}",
            decimal(stage["bytes"]) if stage["bytes"] else "",
        ]
        for stage in facts.status.stages
    ]
    return head, rows


def _plots(facts: RunFacts, extra: Mapping[str, Any]) -> list[tuple[str, str]]:
    plots: list[Plot] = []
    with plotting():
        if facts.status.stages:
            plot = Plot("Seconds by stage", 0.4 * len(facts.status.stages) + 0.9)
            stages = facts.status.stages[::-1]
            plot.axes.barh([s["stage"] for s in stages], [s["seconds"] for s in stages], color=COLOURS["prag"])
            plot.axes.set_xlabel("seconds")
            plots.append(plot)
        if extra.get("pairs"):
            plot = Plot("Pairs a passage", 3.0)
            pairs = {int(number): n for number, n in extra["pairs"].items()}
            plot.axes.bar(list(pairs), list(pairs.values()), color=COLOURS["prag"])
            plot.axes.set_xlabel("pairs")
            plot.axes.set_ylabel("passages")
            plots.append(plot)
        if facts.adapters:
            plot = Plot("Loss at the first and the last step", 3.0)
            first = [row.first_loss for row in facts.adapters]
            last = [row.last_loss for row in facts.adapters]
            bins = np.linspace(0, max(*first, *last, 1e-6), 31).tolist()
            plot.axes.hist(first, bins, color=COLOURS["rag"], alpha=0.8, label="first step")
            plot.axes.hist(last, bins, color=COLOURS["prag"], alpha=0.8, label="last step")
            plot.axes.set_xlabel("loss, nats a token")
            plot.axes.set_ylabel("adapters")
            plot.axes.legend(frameon=False)
            plots.append(plot)
        return [(plot.title, plot.svg()) for plot in plots]
