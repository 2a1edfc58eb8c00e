"""After a loss a stage takes a new survey and goes on; any other error, or too many losses, end it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from rich.console import Console

from pipelines.execution.outcomes import Tally
from pipelines.execution.progress import RunProgress
from pipelines.execution.recovery import MAX_LOSSES, is_loss, resume_until_done, retry_on_loss
from pipelines.execution.survey import Survey
from prag_core.errors import StoreError
from prag_core.store.objects import Store


def in_a_task(cause: Exception) -> Exception:
    return ray.exceptions.RayTaskError("work", "traceback", cause)


def failed_to_start() -> Exception:
    return ray.exceptions.ActorDiedError(in_a_task(ValueError("another model")))


LOSSES = [ray.exceptions.ActorDiedError(), ray.exceptions.NodeDiedError("gone"), ray.exceptions.WorkerCrashedError()]


@pytest.mark.parametrize("error", [*LOSSES, in_a_task(ray.exceptions.WorkerCrashedError())])
def test_losing_a_part_of_the_cluster_is_a_loss(error: Exception) -> None:
    assert is_loss(error)


@pytest.mark.parametrize("error", [in_a_task(StoreError("full")), failed_to_start(), ValueError(), None])
def test_an_error_that_any_node_would_raise_is_no_loss(error: Exception | None) -> None:
    assert not is_loss(error)


@pytest.fixture
def progress(tmp_path: Path) -> RunProgress:
    return RunProgress(Store(str(tmp_path)), "r", Console(quiet=True))


class Stage:
    """A stage with `missing` passages of which each attempt does `step`, and then loses a node."""

    def __init__(self, missing: int, step: int, error: Exception) -> None:
        self.missing, self.step, self.error = missing, step, error
        self.attempts: list[int] = []

    def take_survey(self) -> Survey:
        rows: Any = None
        return Survey(rows, Counter(to_train=self.missing), {})

    def work(self, survey: Survey) -> Tally:
        self.attempts.append(survey.counts["to_train"])
        self.missing -= min(self.step, self.missing)
        if self.missing:
            raise self.error
        return Tally(done=survey.counts["to_train"])

    def run(self, progress: RunProgress) -> tuple[Survey, Tally]:
        return resume_until_done("train", "to_train", self.take_survey(), self.take_survey, self.work, progress)


def test_a_stage_that_makes_progress_survives_any_number_of_losses(progress: RunProgress) -> None:
    stage = Stage(missing=40, step=2, error=LOSSES[0])
    last, tally = stage.run(progress)
    assert len(stage.attempts) == 20 > MAX_LOSSES
    assert stage.attempts == list(range(40, 0, -2))
    assert last.counts["to_train"] == tally.done == 2


def test_a_stage_without_progress_raises_the_last_loss(progress: RunProgress) -> None:
    stage = Stage(missing=40, step=0, error=LOSSES[1])
    with pytest.raises(ray.exceptions.NodeDiedError):
        stage.run(progress)
    assert len(stage.attempts) == MAX_LOSSES + 1


def test_another_error_ends_a_stage_at_once(progress: RunProgress) -> None:
    stage = Stage(missing=40, step=2, error=in_a_task(StoreError("full")))
    with pytest.raises(ray.exceptions.RayTaskError):
        stage.run(progress)
    assert len(stage.attempts) == 1


def test_retries_are_bounded(progress: RunProgress) -> None:
    tries = 0

    def attempt() -> str:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise LOSSES[2]
        return "done"

    assert retry_on_loss("corpus", attempt, progress) == "done"
    tries = -100
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        retry_on_loss("corpus", attempt, progress)
    assert tries == -100 + MAX_LOSSES + 1
