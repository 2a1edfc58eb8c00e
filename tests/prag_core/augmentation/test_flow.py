"""Passages flow: each goes on as soon as it has its reply, and the generator always has its number of prompts."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from prag_core.augmentation.augment import augment_each
from prag_core.errors import GenerationError
from prag_core.llm.generator import Prompt
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, Reject
from tests.helpers.passages import make_passage

LINES = AugmentRecipe("g", "lines", pairs=1, rewrites=0, attempts=2, seed=0, imported=False, cloze=False)
PASSAGES = [make_passage(n) for n in range(60)]
DOWN = GenerationError("HTTP 500", "see what the server logs")


class Model:
    """A generator whose replies take as long as a test says; it counts the prompts at the same time."""

    fingerprint = "model"

    def __init__(self, reply: Callable[[str], Awaitable[str | GenerationError]], concurrency: int) -> None:
        self.concurrency = concurrency
        self.open: list[int] = [0]
        self._reply = reply

    async def ask(self, prompt: Prompt, **_: object) -> str | GenerationError:
        self.open.append(self.open[-1] + 1)
        try:
            return await self._reply(prompt.text)
        finally:
            self.open.append(self.open[-1] - 1)

    async def close(self) -> None:
        pass


def number_of(text: str) -> int:
    return int(re.findall(r"Quorl (\d+)", text)[-1])


def pair(number: int) -> str:
    return f"Q: What is Quorl {number}? | A: w{number}x1"


def run(passages: list[Passage], model: Model, recipe: AugmentRecipe = LINES) -> Iterator[list[Augmentation | Reject]]:
    """Yield what `augment_each` yields, as a caller without a loop of its own gets it."""
    with asyncio.Runner() as runner:
        results = augment_each(iter(passages), model, recipe)

        async def following() -> list[Augmentation | Reject] | None:
            return await anext(results, None)

        try:
            while ended := runner.run(following()):
                yield ended
        finally:
            runner.run(results.aclose())


def numbers(results: list[Augmentation | Reject]) -> list[int]:
    by_key = {passage.key: n for n, passage in enumerate(PASSAGES)}
    return [by_key[result.key] for result in results]


@pytest.mark.parametrize("strategy", ["lines", "writer"])
def test_the_generator_always_has_its_number_of_prompts(strategy: str) -> None:
    """Replies come one at a time, when all that could be asked has been asked."""
    waiting: deque[asyncio.Event] = deque()
    under_way: list[int] = []
    left = deque(PASSAGES)

    async def reply(text: str) -> str:
        waiting.append(turn := asyncio.Event())
        await turn.wait()
        return pair(number_of(text))

    async def reply_in_turn() -> None:
        while True:
            for _ in range(50):
                await asyncio.sleep(0)
            if waiting:
                under_way.extend([len(waiting)] if left else [])
                waiting.popleft().set()

    async def work() -> list[Augmentation | Reject]:
        replying = asyncio.create_task(reply_in_turn())
        passages = (left.popleft() for _ in range(60))
        flow = augment_each(passages, Model(reply, 24), replace(LINES, strategy=strategy))
        made = [result async for ended in flow for result in ended]
        replying.cancel()
        return made

    assert sorted(numbers(asyncio.run(work()))) == list(range(60))
    assert len(under_way) > 30
    assert min(under_way) >= 24
    # A passage for which there is room may ask several questions at once.
    assert max(under_way) <= (24 if strategy == "lines" else 40)


def test_a_slow_passage_holds_up_no_other() -> None:
    others_done = asyncio.Event()

    async def reply(text: str) -> str:
        if number_of(text) == 0:
            await others_done.wait()
        return pair(number_of(text))

    seen: list[int] = []
    for ended in run(PASSAGES, Model(reply, 4)):
        seen += numbers(ended)
        if len(seen) == 59:
            others_done.set()
    assert seen[-1] == 0
    assert len(seen) == 60


def test_seconds_of_all_are_the_time_of_all() -> None:
    async def reply(text: str) -> str:
        await asyncio.sleep(0.05)
        return pair(number_of(text))

    loop_s = 60 / 20 * 0.05
    made = [result for ended in run(PASSAGES, Model(reply, 20)) for result in ended]
    total = sum(result.seconds for result in made if isinstance(result, Augmentation))
    assert loop_s <= total < 10 * loop_s


def test_failures_between_successes_are_rejects() -> None:
    async def reply(text: str) -> str | GenerationError:
        return DOWN if number_of(text) % 3 == 1 else pair(number_of(text))

    made = [result for ended in run(PASSAGES, Model(reply, 4)) for result in ended]
    rejects = [result for result in made if isinstance(result, Reject)]
    assert sorted(numbers([*rejects])) == [n for n in range(60) if n % 3 == 1]
    assert {(reject.reason, reject.attempts) for reject in rejects} == {("generation_failed", 2)}


@pytest.mark.parametrize("concurrency", [2, 20])
def test_a_server_that_goes_down_ends_the_flow_and_rejects_nothing(concurrency: int) -> None:
    async def reply(text: str) -> str | GenerationError:
        return DOWN if number_of(text) >= 10 else pair(number_of(text))

    made: list[Augmentation | Reject] = []
    model = Model(reply, concurrency)

    def work() -> None:
        for ended in run(PASSAGES, model):
            made.extend(ended)

    with pytest.raises(GenerationError, match="HTTP 500"):
        work()
    assert sorted(numbers(made)) == list(range(10))
    # Each of them is asked twice; not many more were asked than it takes to be sure.
    assert len(model.open) < 2 * (10 + 2 * (max(8, concurrency) + 2 * concurrency))


def test_who_stops_early_leaves_no_prompt_under_way() -> None:
    async def reply(text: str) -> str:
        await asyncio.sleep(0.001 if number_of(text) == 0 else 3600)
        return pair(number_of(text))

    model = Model(reply, 8)
    results = run(PASSAGES, model)
    assert numbers(next(results)) == [0]
    results.close()
    assert model.open[-1] == 0
