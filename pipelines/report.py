"""What a run did, as data: one report a stage, one for the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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
