"""Passage → Augmentation or Reject: rewrites, and questions with their answers.

Three strategies make the questions. With `paper`, an instruction-following model writes them as JSON (Su et al. 2025,
section 3.1); with `lines`, it writes them one a line, in several drafts. With `writer`, a model of some hundred million
parameters does what one adapter has taught it: it names facts, asks for them, and answers. Cloze questions, made by
rules, can fill up the pairs of each strategy. A writer can add pairs on what an imported augmentation leaves out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace

from prag_core.augmentation.cloze import add_cloze_pairs
from prag_core.augmentation.coverage import coverage
from prag_core.augmentation.filter import Draft
from prag_core.augmentation.lines import add_line_pairs
from prag_core.augmentation.paper import add_pairs, add_rewrites
from prag_core.augmentation.writer import add_written_pairs
from prag_core.errors import GenerationError, PromptTooLongError
from prag_core.llm.generator import Generator, Prompt
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, Reject, count_refused

_STRATEGIES = {
    "lines": add_line_pairs,
    "paper": add_pairs,
    "writer": add_written_pairs,
}
# After so many failures in a row, or as many as there are passages under way, the generator is to blame.
_MOST_FAILURES = 8


def augment(
    passages: Sequence[Passage],
    generator: Generator,
    recipe: AugmentRecipe,
    given: Mapping[str, Augmentation] | None = None,
) -> list[Augmentation | Reject]:
    """Augment some passages, and return the results in their order; see `augment_each`.

    Call it from a thread without a running event loop.
    """

    async def results() -> dict[str, Augmentation | Reject]:
        try:
            ended = augment_each(passages, generator, recipe, given)
            return {result.key: result async for results in ended for result in results}
        finally:
            await generator.close()

    by_key = asyncio.run(results())
    return [by_key[passage.key] for passage in passages]


async def augment_each(
    passages: Iterable[Passage],
    generator: Generator,
    recipe: AugmentRecipe,
    given: Mapping[str, Augmentation] | None = None,
) -> AsyncGenerator[list[Augmentation | Reject]]:
    """Make rewrites and question-answer pairs of passages, and yield the results as they come, in any order.

    So many passages are under way that the generator has `generator.concurrency` prompts at a time; each goes on as
    soon as it has its reply. After `recipe.attempts` an augmentation may have fewer rewrites or pairs than the recipe
    asks for. A passage without any pair is a reject, with the reason `no_usable_pair`, `too_long_for_model` or
    `generation_failed`. `seconds` of an augmentation is the time since the one before it.

    `given` are imported augmentations by the passage's key. Pairs are added to theirs, and none of them is a reject.

    Raises:
        GenerationError: when the generator cannot be used, or failed for each of several passages.
    """
    counted = _Counted(generator)
    waiting = iter(passages)
    running: set[_Task] = set()
    finished: deque[_Task] = deque()
    failed: list[tuple[Augmentation | Reject, GenerationError]] = []
    given = given or {}
    most, any_done, last = _MOST_FAILURES, False, time.monotonic()

    def finish(task: _Task) -> None:
        finished.append(task)
        counted.changed.set()

    try:
        while True:
            while max(len(running), counted.open) < generator.concurrency and (passage := next(waiting, None)):
                running.add(task := asyncio.create_task(_augment(passage, counted, recipe, given.get(passage.key))))
                task.add_done_callback(finish)
                await asyncio.sleep(0)  # it asks before the next one is started
            most = max(most, len(running))
            if not running:
                break
            await counted.changed.wait()
            counted.changed.clear()
            results: list[Augmentation | Reject] = []
            while finished and not finished[0].exception():
                running.remove(task := finished.popleft())
                result, error = task.result()
                if error:
                    failed.append((result, error))
                    continue
                if isinstance(result, Augmentation):
                    now = time.monotonic()
                    result, last = replace(result, seconds=now - last), now
                results += [*(without for without, _ in failed), result]
                any_done, failed = True, []
            if results:
                yield results
            if finished:
                finished[0].result()  # raises
            if len(failed) >= most:
                break
        # If all fail, the generator is to blame and not the passages: a server that is down must not reject a corpus.
        if len(failed) >= most or (len(failed) > 1 and not any_done):
            raise failed[0][1]
        if failed:
            yield [without for without, _ in failed]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def complete(passage: Passage, augmentation: Augmentation, recipe: AugmentRecipe) -> Augmentation:
    """Return an imported augmentation with its coverage, and if the recipe says so, filled up with cloze pairs."""
    draft = Draft(passage, wanted_pairs(passage, recipe.pairs), pairs=list(augmentation.pairs))
    if recipe.cloze:
        add_cloze_pairs(draft)
    return replace(augmentation, pairs=tuple(draft.pairs), coverage=coverage(passage, draft.pairs))


def lacks_pairs(augmentation: Augmentation, recipe: AugmentRecipe) -> bool:
    """Return whether the writer should add pairs to an imported augmentation."""
    return recipe.complete_imports and len(augmentation.pairs) < _most_pairs(recipe)


# How many pairs to make of a passage where the configuration does not say.
_WORDS_PER_PAIR = 7
_FEWEST_PAIRS = 8
MOST_PAIRS = 24


def wanted_pairs(passage: Passage, pairs: int) -> int:
    """Return how many pairs to make of a passage: `pairs`, or if it is 0 one for each 7 words, from 8 to 24."""
    return pairs or min(MOST_PAIRS, max(_FEWEST_PAIRS, len(passage.text.split()) // _WORDS_PER_PAIR))


def expected_pairs(passage: Passage, recipe: AugmentRecipe) -> int:
    """Return how many pairs a passage is likely to have: those that are wanted, or more where a writer names its facts.

    Of 143 real passages, those of 45 words got 13 pairs, of 105 words 18, and of 200 words 24.
    """
    if recipe.strategy != "writer" or not recipe.cloze or recipe.pairs:
        return wanted_pairs(passage, recipe.pairs)
    return min(MOST_PAIRS, _FEWEST_PAIRS + len(passage.text.split()) // 10)


def _most_pairs(recipe: AugmentRecipe) -> int:
    """Return how many pairs a passage may have where a writer has named its facts."""
    return recipe.pairs or MOST_PAIRS


_Task = asyncio.Task[tuple[Augmentation | Reject, GenerationError | None]]


class _Counted:
    """A generator whose prompts under way are counted: `open`. `changed` is set whenever one of them has ended."""

    def __init__(self, generator: Generator) -> None:
        self.fingerprint = generator.fingerprint
        self.concurrency = generator.concurrency
        self.open = 0
        self.changed = asyncio.Event()
        self._generator = generator

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        self.open += 1
        try:
            return await self._generator.ask(
                prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
            )
        finally:
            self.open -= 1
            self.changed.set()

    async def close(self) -> None:
        await self._generator.close()


async def _augment(
    passage: Passage, generator: Generator, recipe: AugmentRecipe, given: Augmentation | None
) -> tuple[Augmentation | Reject, GenerationError | None]:
    """Return the result for one passage, and the error of its last attempt if the generator has given nothing."""
    draft = Draft(passage, wanted_pairs(passage, recipe.pairs))
    if given is not None:
        # An import is taken as it is: it gets no rewrite, and the filter refuses none of its pairs. There is room for
        # all that it leaves out, and one attempt, since a later one would ask about its facts again.
        draft.pairs, draft.rewrites = list(given.pairs), list(given.rewrites)
        draft.refused = count_refused(given.refused)
        draft.wanted, recipe = _most_pairs(recipe), replace(recipe, rewrites=0, attempts=1)
    before = len(draft.pairs)
    for attempt in range(recipe.attempts):
        if not _is_open(draft, recipe):
            break
        draft.attempts += 1
        draft.error = None
        await add_rewrites(draft, generator, recipe, attempt)
        if len(draft.pairs) < draft.wanted:
            await _STRATEGIES[recipe.strategy](draft, generator, recipe, attempt)
    too_long = isinstance(draft.error, PromptTooLongError)
    error = draft.error if len(draft.pairs) == before and not too_long else None
    if recipe.strategy == "writer":
        # It names more facts than it finds good questions for, and cloze questions ask for the others.
        draft.wanted = _most_pairs(recipe)
    # Rules must not hide that the generator failed.
    if recipe.cloze and (given or not draft.error):
        add_cloze_pairs(draft)
    return _result(draft, given), error


def _is_open(draft: Draft, recipe: AugmentRecipe) -> bool:
    short = len(draft.pairs) < draft.wanted or len(draft.rewrites) < recipe.rewrites
    return short and not isinstance(draft.error, PromptTooLongError)


def _result(draft: Draft, given: Augmentation | None) -> Augmentation | Reject:
    if draft.error:
        draft.refused["no_reply"] += 1
    refused = tuple(f"{reason}={count}" for reason, count in sorted(draft.refused.items()))
    passage = draft.passage
    if given or (draft.pairs and not isinstance(draft.error, PromptTooLongError)):
        return Augmentation(
            key=passage.key,
            rewrites=tuple(draft.rewrites),
            pairs=tuple(draft.pairs),
            origin="imported" if given else "generated",
            refused=refused,
            attempts=draft.attempts,
            coverage=coverage(passage, draft.pairs),
        )
    if isinstance(draft.error, PromptTooLongError):
        reason, detail = "too_long_for_model", draft.error.message
    elif draft.error:
        reason, detail = "generation_failed", draft.error.message
    else:
        reason, detail = "no_usable_pair", f"refused: {', '.join(refused) or 'nothing was proposed'}"
    source = passage.sources[0] if passage.sources else ""
    return Reject("augment", reason, detail, source, passage.key, draft.attempts)
