"""What the actors of a stage send back: one row a passage, and never the passage's bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray.data

from prag_core.errors import BudgetError
from prag_core.records import schema, to_table

# A column of what an actor gets: the name of the batch that Ray gave out, also when this is a part of it.
TASK = "task"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one passage in one stage; `rejected` is the reason, or empty when it is done.

    `pairs` and `refused` are of augmenting: the pairs kept, and those refused as `reason=count`; `bytes` and
    `tokens` are of training. `seconds` is what the passage took its actor.
    """

    key: str
    rejected: str = ""
    pairs: int = 0
    refused: tuple[str, ...] = ()
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """The outcomes of a stage, counted as they stream in."""

    done: int = 0
    bytes: int = 0
    tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    pairs: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self.begun

    def add(self, outcome: Outcome) -> None:
        """Count one passage."""
        if outcome.rejected:
            self.rejected[outcome.rejected] += 1
            return
        self.done += 1
        self.bytes += outcome.bytes
        self.tokens += outcome.tokens
        self.pairs[outcome.pairs] += 1
        for entry in outcome.refused:
            reason, _, count = entry.partition("=")
            self.refused[reason] += int(count)


def outcome_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """Return outcomes as the block that an actor gives back."""
    return to_table(Outcome, outcomes)


@dataclass(frozen=True)
class Budget:
    """How much a run may reject: a share of its passages, to which records that became none count as well.

    `earlier` are rejects that count, by `stage/reason`.
    """

    passages: int
    share: float
    earlier: Mapping[str, int] = field(default_factory=dict)

    def less(self, rejected: Mapping[str, int]) -> Budget:
        """Return what is left of it after further rejects, by `stage/reason`."""
        return replace(self, earlier=Counter(self.earlier) + Counter(rejected))

    def check(self, rejected: Mapping[str, int]) -> None:
        """Do nothing while it suffices for what is rejected besides the earlier ones, by `stage/reason`.

        Raises:
            BudgetError: when it is spent, with the most frequent reasons.
        """
        counts = Counter(self.earlier) + Counter(rejected)
        if counts.total() > self.share * self.passages:
            reasons = ", ".join(f"{reason} {n}" for reason, n in counts.most_common(5))
            raise BudgetError(
                f"{counts.total()} of {self.passages} passages were rejected, more than run.max_reject_share = "
                f"{self.share}: {reasons}; nothing was published",
                "see `prag rejects`; mend the cause or raise run.max_reject_share",
            )


def outcome_blocks(outcomes: ray.data.Dataset) -> Iterator[list[Outcome]]:
    """Run a pipeline to its end, yielding the outcomes of each block as it is done."""
    for block in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield [Outcome(**row) for row in block.select(schema(Outcome).names).to_pylist()]


@dataclass(frozen=True)
class StageReport:
    """The counts of one stage: `taken` = `done` + Σ`rejected`. `earlier` of the done were so before this run."""

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
        """Whether nothing vanished."""
        return self.taken == self.done + sum(self.rejected.values())

    @property
    def per_second(self) -> float:
        """What this run itself finished a second."""
        new = self.done - self.earlier
        return new / self.seconds if new and self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "passages_per_s": round(self.per_second, 3), "balanced": self.balanced}
