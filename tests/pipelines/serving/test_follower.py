"""Following the store: whatever it holds, a replica goes on looking."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.serving.follower import Follower
from prag_core.errors import EngineStuckError
from prag_core.identity import seal
from prag_core.llm.base_model import BaseModel
from prag_core.store.snapshot import load_snapshot, publish, renamed
from tests.helpers.serving import World


def test_a_look_that_goes_wrong_in_any_way_is_not_the_last(tiny_session: BaseModel, tmp_path: Path) -> None:
    world = World(tiny_session, tmp_path)
    world.publish(count=2)
    failures: list[str] = []

    async def until(condition) -> None:
        while not condition():
            await asyncio.sleep(0.001)

    async def run() -> None:
        async def look() -> None:
            await service.refresh()

        follower = Follower(look, 0.001, lambda: failures.append(service.snapshot))
        # A recipe of which this version knows nothing: an error that nobody foresaw.
        world.store.put_json("adapters/newer/recipe.json", seal({"recipe": {}, "layout": {}}))
        publish(world.store, renamed(replace(load_snapshot(world.store), recipe="newer")))
        await until(lambda: len(failures) > 1)
        follower.check()
        mended = world.publish(shift=1, count=2)
        await until(lambda: service.snapshot == mended.id)
        follower.end()
        await asyncio.sleep(0.01)
        with pytest.raises(EngineStuckError, match="nothing looks for new snapshots"):
            follower.check()

    with world.service() as service:
        first = service.snapshot
        asyncio.run(run())
    assert set(failures) == {first}
