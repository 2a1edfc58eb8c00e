"""Going on after a node or a process was lost: look again at what the store lacks, and do that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray.exceptions

from pipelines.execution.outcomes import Tally
from pipelines.execution.progress import RunProgress
from pipelines.execution.survey import Survey

T = TypeVar("T")

# In a row, without anything finished between: a cluster that is that unwell needs a person.
MOST_LOSSES = 5

_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.RaySystemError,
)


def is_loss(error: BaseException | None) -> bool:
    """Whether an error says that a part of the cluster went away, and not that the code or its input is wrong."""
    while isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    # An actor whose constructor raised has died as well, but would again anywhere.
    return isinstance(error, _LOSSES) and not getattr(error, "actor_init_failed", False)


def retry_on_loss(stage: str, attempt: Callable[[], T], progress: RunProgress) -> T:
    """Return what `attempt` returns, begun anew after each loss, at most `MOST_LOSSES` times."""
    for _ in range(MOST_LOSSES):
        try:
            return attempt()
        except ray.exceptions.RayError as error:
            if not is_loss(error):
                raise
            progress.recovered(stage, error)
    return attempt()


def resume_until_done(
    stage: str,
    state: str,
    before: Survey,
    look: Callable[[], Survey],
    work: Callable[[Survey], Tally],
    progress: RunProgress,
) -> tuple[Survey, Tally]:
    """Do `work` on the passages in a state; after a loss, look again at what is missing and go on with that.

    Ray moves what a lost node was doing to another one wherever it can; what comes here are the losses that end a
    whole pipeline, such as that of a shuffle's intermediate results. `MOST_LOSSES` of them in a row, with nothing
    finished between, end the stage, as any other error does at once.

    Returns:
        The survey that the last work began from, and the tally of that work.
    """
    latest, losses, stale = before, 0, False
    while True:
        try:
            if stale:
                seen = look()
                losses = 0 if seen.counts[state] < latest.counts[state] else losses
                latest, stale = seen, False
            return latest, work(latest)
        except ray.exceptions.RayError as error:
            losses += 1
            if not is_loss(error) or losses > MOST_LOSSES:
                raise
            stale = True
            progress.recovered(stage, error)
