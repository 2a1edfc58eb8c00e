"""A job that fails is repeated: a replica keeps checking the store for new snapshots."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.serving.periodic_task import PeriodicTask
from prag_core.errors import EngineStuckError
from prag_core.identity import seal
from prag_core.llm.base_model import BaseModel
from prag_core.store.snapshot import load_snapshot, publish, with_id
from tests.helpers.serving import World


def test_a_failed_check_is_repeated_whatever_the_error(tiny_session: BaseModel, tmp_path: Path) -> None:
    world = World(tiny_session, tmp_path)
    world.publish(count=2)
    failures: list[str] = []

    async def until(condition) -> None:
        while not condition():
            await asyncio.sleep(0.001)

    async def run() -> None:
        async def refresh() -> None:
            await service.refresh()

        task = PeriodicTask(refresh, 0.001, lambda: failures.append(service.snapshot))
        # A recipe that this version does not know: the job raises something other than a PragError.
        world.store.put_json("adapters/newer/recipe.json", seal({"recipe": {}, "layout": {}}))
        publish(world.store, with_id(replace(load_snapshot(world.store), recipe="newer")))
        await until(lambda: len(failures) > 1)
        task.check()
        repaired = world.publish(shift=1, count=2)
        await until(lambda: service.snapshot == repaired.id)
        task.cancel()
        await asyncio.sleep(0.01)
        with pytest.raises(EngineStuckError, match="no longer checks for new snapshots"):
            task.check()

    with world.service() as service:
        first = service.snapshot
        asyncio.run(run())
    assert set(failures) == {first}
