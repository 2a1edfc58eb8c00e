"""Recovery: after a node or a process was lost, go on with the passages that the store still lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray.exceptions

from pipelines.execution.outcomes import Tally
from pipelines.execution.progress import RunProgress
from pipelines.execution.survey import Survey

T = TypeVar("T")

# The most losses in a row with nothing finished in between; more need a person to repair the cluster.
MAX_LOSSES = 5

_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.RaySystemError,
)


def is_loss(error: BaseException | None) -> bool:
    """Whether an error means that a part of the cluster was lost, and not that the code or its input is wrong."""
    while isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    # An actor whose constructor raised has died too, but it would die on any node.
    return isinstance(error, _LOSSES) and not getattr(error, "actor_init_failed", False)


def retry_on_loss(stage: str, attempt: Callable[[], T], progress: RunProgress) -> T:
    """Return the result of `attempt`, which is called again after each loss, at most `MAX_LOSSES` times."""
    for _ in range(MAX_LOSSES):
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
    first: Survey,
    take_survey: Callable[[], Survey],
    work: Callable[[Survey], Tally],
    progress: RunProgress,
) -> tuple[Survey, Tally]:
    """Call `work` on a survey; after a loss take a new survey and work on the passages that are still in `state`.

    Ray moves the work of a lost node to another node where it can. The losses that get here end a whole pipeline, as
    when intermediate results of a shuffle are lost. After `MAX_LOSSES` of them in a row with nothing finished in
    between, the last one is raised; any other error is raised at once.

    Returns:
        The survey that the last call of `work` got, and the tally that it returned.
    """
    current, losses = first, 0
    needs_survey = False
    while True:
        try:
            if needs_survey:
                latest = take_survey()
                if latest.counts[state] < current.counts[state]:
                    losses = 0
                current, needs_survey = latest, False
            return current, work(current)
        except ray.exceptions.RayError as error:
            losses += 1
            if not is_loss(error) or losses > MAX_LOSSES:
                raise
            needs_survey = True
            progress.recovered(stage, error)
