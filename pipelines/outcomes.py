"""What the actors of a stage send back: one row a passage, and never the passage's bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray.data
from rich.console import Console

from cluster.resources import Profile
from pipelines.progress import stage_progress
from prag_core.records import schema, to_table


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one passage in one stage; `rejected` is the reason, or empty when it is done.

    `pairs` and `refused` are of augmenting: the pairs kept, and those refused as `reason=count`.
    """

    key: str
    rejected: str = ""
    pairs: int = 0
    refused: tuple[str, ...] = ()
    bytes: int = 0


@dataclass
class Tally:
    """The outcomes of a stage, counted as they stream in."""

    done: int = 0
    bytes: int = 0
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
        self.pairs[outcome.pairs] += 1
        for entry in outcome.refused:
            reason, _, count = entry.partition("=")
            self.refused[reason] += int(count)


def outcome_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """Return outcomes as the block that an actor gives back."""
    return to_table(Outcome, outcomes)


def run_actors(
    actor: type, arguments: tuple[Any, ...], missing: ray.data.Dataset, batch: int, profile: Profile
) -> ray.data.Dataset:
    """Return the outcomes of `missing`, to be made by a pool of `actor(*arguments)`.

    One block is one batch of `batch` passages: what a block gives is seen when the block is done.
    """
    return missing.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        actor, batch_size=batch, batch_format="pyarrow", fn_constructor_args=arguments, **profile.pool()
    )


def follow(outcomes: ray.data.Dataset, total: int, stage: str, console: Console, tally: Tally) -> None:
    """Run a stage's pipeline to its end, counting and showing its outcomes as they come."""
    with stage_progress(console, stage, total) as advance:
        for block in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in block.select(schema(Outcome).names).to_pylist():
                tally.add(Outcome(**row))
            advance(tally.done, sum(tally.rejected.values()))
