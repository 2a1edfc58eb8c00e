"""Replies of models that reason, or repeat the prompt: only what they say becomes a pair or a rewrite."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from prag_core.augmentation.augment import augment
from prag_core.augmentation.paper import parse_pairs
from prag_core.augmentation.prompts import QUESTIONS_EXAMPLE, rewrite_prompt
from prag_core.errors import GenerationError, PromptTooLongError, UnfinishedReplyError
from prag_core.identity import passage_key
from prag_core.llm.generator import Prompt
from prag_core.prompts import passage_text
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, Reject

TEXT = "The Zembla Tower is a stone beacon on Pelora. It was built in 1871 by Tadeo Quill, and it is 43 metres tall."
TOWER = Passage(passage_key("Zembla Tower", TEXT), "Zembla Tower", TEXT, ("tower",))
DUNES = Passage(passage_key("Dunes", TEXT), "Dunes", TEXT, ("dunes",))
REWRITE = "On Pelora, the engineer Tadeo Quill raised a beacon of stone, 43 metres high, in 1871: the Zembla Tower."
GOOD = json.dumps([{"question": "Who built it?", "answer": "Tadeo Quill", "full_answer": "Tadeo Quill built it."}])
DRAFT = json.dumps([{"question": "When was it built?", "answer": "43 metres", "full_answer": "In 43 metres."}])
RECIPE = AugmentRecipe("scripted", "paper", pairs=1, rewrites=1, attempts=3, seed=0, imported=False)


class Replies:
    """A generator whose replies depend on the prompt and on how many new tokens it may have."""

    fingerprint = "scripted"
    concurrency = 16

    def __init__(self, reply: Callable[[str, int], str | GenerationError]) -> None:
        self._reply = reply
        self.limits: list[int] = []

    async def ask(self, prompt: Prompt, *, max_new_tokens: int, **_: object) -> str | GenerationError:
        self.limits.append(max_new_tokens)
        return self._reply(prompt.text, max_new_tokens)

    async def close(self) -> None:
        pass


def replies(pairs: str, rewrite: str) -> Replies:
    return Replies(lambda text, _: pairs if "JSON array" in text else rewrite)


@pytest.mark.parametrize(
    "pairs",
    [
        f"<think>First {DRAFT}, no.</think>{GOOD}",
        f"The example is {QUESTIONS_EXAMPLE}\nSo:\n```json\n{GOOD}\n```",
        f"{DRAFT}\nThat is wrong. Corrected:\n{GOOD}",
        f"{GOOD}\nIt has the form of {QUESTIONS_EXAMPLE}",
        f"{GOOD}\nNone of them is in the list [{{}}] or [1].",
        f"{'[a] ' * 40}{GOOD}",
        f"draft {DRAFT}</think>{GOOD}",
        f'{GOOD} and not [{{"question": "W\\ud83d?", "answer": "1871", "full_answer": "f"}}]',
        json.dumps({"draft": DRAFT, "pairs": json.loads(GOOD)}),
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}",
    ],
)
def test_the_array_that_was_asked_for_is_taken(pairs: str) -> None:
    (made,) = augment([TOWER], replies(pairs, REWRITE), RECIPE)
    assert isinstance(made, Augmentation)
    assert [pair.answer for pair in made.pairs] == ["Tadeo Quill"]


@pytest.mark.parametrize(
    "rewrite",
    [
        f"<think>I could write: {TEXT}</think>\n\n{REWRITE}",
        f"```\n{REWRITE}\n```",
        f"Here is the rewritten passage:\n```text\n{REWRITE}\n```\nI kept all names.",
        f"```\nRewritten passage: {REWRITE}\n```",
        f"<thinking>\nok\n</thinking>Sure, here it is: {REWRITE}",
        f"<rewrite>{REWRITE}</rewrite>",
        f"Thinking: I keep the names.\n\n**Rewritten passage:**\n{REWRITE}",
        f"1. Keep the names.\nRewrite: ```{REWRITE}```",
        f"<details type='reasoning'>ok</details>\n{REWRITE}",
        f"Okay! I have reworded it for you below:\n\n{REWRITE}",
        f"# Rewritten version\n\n{REWRITE}",
        f"{REWRITE}\n\nNote: I kept all names.\n\nLet me know if I can help!",
        json.dumps({"rewritten_text": REWRITE}),
        f"```json\n{json.dumps({'rewrite': REWRITE})}\n```",
        f"“{REWRITE}”",
    ],
)
def test_a_rewrite_is_stored_without_what_surrounds_it(rewrite: str) -> None:
    (made,) = augment([TOWER], replies(GOOD, rewrite), RECIPE)
    assert isinstance(made, Augmentation)
    assert made.rewrites == (REWRITE,)


@pytest.mark.parametrize(
    "rewrite",
    [
        f"Okay, so I need to rewrite this text about the Zembla Tower on Pelora. {REWRITE}",
        rewrite_prompt(passage_text(TOWER)),
        f"<tool_call>ok</tool_call>{REWRITE}",
    ],
)
def test_what_speaks_of_the_task_is_no_rewrite_and_is_counted(rewrite: str) -> None:
    (made,) = augment([TOWER], replies(GOOD, rewrite), RECIPE)
    assert isinstance(made, Augmentation)
    assert (made.rewrites, made.refused) == ((), ("bad_rewrite=3",))


def test_a_rewrite_that_was_never_written_is_counted() -> None:
    def reply(text: str, limit: int) -> str | GenerationError:
        return GOOD if "JSON array" in text else GenerationError("500")

    (made,) = augment([TOWER], Replies(reply), RECIPE)
    assert isinstance(made, Augmentation)
    assert (made.rewrites, made.refused) == ((), ("no_reply=1",))


@pytest.mark.parametrize(
    "pairs",
    [
        f'{GOOD[:-1]}, {{"question": "How',
        f"1. {GOOD[1:-1]}",
        f"{GOOD[1:-1]}\n",
        f"{GOOD[:-1]},]",
        json.dumps({"1": json.loads(GOOD)[0]}),
        f"{QUESTIONS_EXAMPLE}\n{GOOD[:-1]},",
    ],
)
def test_pairs_that_are_no_whole_array_are_not_lost(pairs: str) -> None:
    assert [pair.answer for pair in parse_pairs(pairs) if pair] == ["Tadeo Quill"]


def test_a_number_that_is_none_is_no_answer() -> None:
    assert parse_pairs('[{"question": "How tall?", "answer": NaN, "full_answer": "f"}]') == [None]


def test_only_the_example_is_a_copy_of_the_prompt() -> None:
    (made,) = augment([TOWER], replies(f"Like this: {QUESTIONS_EXAMPLE}", REWRITE), RECIPE)
    assert isinstance(made, Reject)
    assert made.detail == "refused: prompt_copy=6"


def test_reasoning_that_did_not_end_is_tried_again_with_more_room() -> None:
    def reply(text: str, limit: int) -> str:
        said = GOOD if "JSON array" in text else REWRITE
        return f"<think>{DRAFT}" + (f"</think>{said}" if limit > 2048 else "")

    generator = Replies(reply)
    (made,) = augment([TOWER], generator, RECIPE)
    assert isinstance(made, Augmentation)
    assert (made.rewrites, [pair.answer for pair in made.pairs]) == ((REWRITE,), ["Tadeo Quill"])
    assert made.refused == ()
    rewrite = len(passage_text(TOWER)) // 3
    assert generator.limits == [rewrite, 160 + 2048, rewrite + 2048]


@pytest.mark.parametrize("longer", ["<think>", UnfinishedReplyError("length"), PromptTooLongError("no room")])
def test_reasoning_that_never_ends_is_the_generators_failure(longer: str | GenerationError) -> None:
    """The next run asks again, since the passage is not to blame."""

    def reply(text: str, limit: int) -> str | GenerationError:
        if DUNES.title in text:
            return GOOD if "JSON array" in text else REWRITE
        return longer if limit > 2048 else f"<think>{DRAFT}"

    made, done = augment([TOWER, DUNES], Replies(reply), RECIPE)
    assert isinstance(made, Reject)
    assert (made.reason, made.attempts) == ("generation_failed", 3)
    assert isinstance(done, Augmentation)
    with pytest.raises(UnfinishedReplyError):
        augment([TOWER, TOWER], Replies(reply), RECIPE)


@pytest.mark.parametrize("reply", ["[" * 50_000 + "{", '[{"a":' * 20_000, "[{" * 10_000, "<think>" * 20_000])
def test_no_reply_is_too_strange_to_read(reply: str) -> None:
    assert parse_pairs(reply) == [None]
