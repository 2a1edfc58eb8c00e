"""Outcomes: the rows that the actors of a stage return, one for each passage, and what is counted from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray.data

from pipelines.execution.tables import iter_blocks
from prag_core.errors import BudgetError
from prag_core.records import count_refused, from_table, to_table

# A column that an actor gets: the name of the batch that Ray handed out. A part of a batch keeps its name.
TASK = "task"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one passage in one stage; `rejected` is the reason, or empty when the passage is done.

    Augmenting sets `pairs` (the number kept), `refused` (those refused, as `reason=count`) and `coverage`; training
    sets `bytes` and `tokens`. `seconds` is the time that the actor spent on the passage.
    """

    key: str
    rejected: str = ""
    pairs: int = 0
    refused: tuple[str, ...] = ()
    coverage: float = 0.0
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """The counts of a stage's outcomes so far."""

    done: int = 0
    bytes: int = 0
    tokens: int = 0
    coverage: float = 0.0
    rejected: Counter[str] = field(default_factory=Counter)
    pairs: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self.begun

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count outcomes."""
        for outcome in outcomes:
            if outcome.rejected:
                self.rejected[outcome.rejected] += 1
                continue
            self.done += 1
            self.bytes += outcome.bytes
            self.tokens += outcome.tokens
            self.coverage += outcome.coverage
            self.pairs[outcome.pairs] += 1
            self.refused += count_refused(outcome.refused)


def outcome_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """Return outcomes as the block that an actor returns."""
    return to_table(Outcome, outcomes)


@dataclass(frozen=True)
class Budget:
    """How many rejects a run may have: `share` of `passages`, including the records that gave no passage.

    `earlier` are rejects that count already, by `stage/reason`.
    """

    passages: int
    share: float
    earlier: Mapping[str, int] = field(default_factory=dict)

    def after(self, rejected: Mapping[str, int]) -> Budget:
        """Return this budget with more rejects counted, by `stage/reason`."""
        return replace(self, earlier=Counter(self.earlier) + Counter(rejected))

    def check(self, rejected: Mapping[str, int]) -> None:
        """Raise if the budget is exceeded by these rejects (by `stage/reason`) and the earlier ones.

        Raises:
            BudgetError: naming the most frequent reasons.
        """
        counts = Counter(self.earlier) + Counter(rejected)
        if counts.total() > self.share * self.passages:
            reasons = ", ".join(f"{reason} {n}" for reason, n in counts.most_common(5))
            raise BudgetError(
                f"{counts.total()} of {self.passages} passages were rejected, more than run.max_reject_share = "
                f"{self.share}: {reasons}; nothing was published",
                "see `prag rejects`; fix the cause or raise run.max_reject_share",
            )


def outcome_blocks(outcomes: ray.data.Dataset) -> Iterator[list[Outcome]]:
    """Run a pipeline to its end and yield the outcomes of each block when it is done."""
    for block in iter_blocks(outcomes):
        yield from_table(Outcome, block)


@dataclass(frozen=True)
class StageReport:
    """The counts of one stage: `taken` = `done` + Σ`rejected`; `earlier` of the done were done before this run."""

    stage: str
    taken: int
    done: int
    earlier: int
    rejected: Mapping[str, int]
    seconds: float
    bytes: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        """Whether every passage that was taken is done or rejected."""
        return self.taken == self.done + sum(self.rejected.values())

    @property
    def per_second(self) -> float:
        """The passages that this run finished a second."""
        new = self.done - self.earlier
        return new / self.seconds if new and self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "passages_per_s": round(self.per_second, 3), "balanced": self.balanced}
