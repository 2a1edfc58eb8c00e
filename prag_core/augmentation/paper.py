"""The strategy `paper`: one prompt asks for a rewrite, another asks for all pairs as a JSON array."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import astuple

from prag_core.augmentation.filter import Draft, is_rewrite
from prag_core.augmentation.prompts import QUESTIONS_EXAMPLE, questions_prompt, rewrite_prompt
from prag_core.augmentation.replies import TEMPERATURE, TOP_K, attempt_seed, read_reply, reasoning_room
from prag_core.data.parsing import is_storable
from prag_core.llm.generator import Generator, Prompt
from prag_core.llm.reply import without_fence
from prag_core.prompts import passage_text
from prag_core.recipe import AugmentRecipe
from prag_core.records import QAPair

_REWRITE_TOKENS = 1024
_QUESTION_TOKENS = 160

_ARRAY_START = re.compile(r"\[\s*\{")
# "Here is the rewritten passage:" or "Rewritten passage:", which small models write before the rewrite.
_LEAD_IN = re.compile(
    r"\A\s*(?:(?:sure|certainly|here)\b[^\n:]{0,80}|[^\n:]{0,30}(?:passage|version)):\s*", re.IGNORECASE
)
# The same at the beginning of a later line, after a plan or remarks.
_LABEL = re.compile(
    r"^\W*(?:here(?: is|'s) )?(?:the |my |final )*(?:rewrit|revis|rephras|paraphras)\w+\b[^\n:]{0,30}:[*_\s]*",
    re.IGNORECASE | re.MULTILINE,
)
# The last sentence if the token limit cut it off and a complete sentence comes before it.
_CUT_OFF = re.compile(r"(?<=[.!?])\s+[^.!?]*\Z")


def add_rewrites(drafts: Sequence[Draft], generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Add the rewrites that each draft lacks, one rewrite a call: with the same prompt, only the seed differs."""
    for number in range(recipe.rewrites):
        lacking = [draft for draft in drafts if len(draft.rewrites) <= number]
        if not lacking:
            continue
        prompts = []
        for draft in lacking:
            text = passage_text(draft.passage)
            # About 1.3 times the passage's tokens: counted as three bytes a token, and English has about four.
            limit = min(_REWRITE_TOKENS, max(32, len(text.encode()) // 3))
            prompts.append(Prompt(rewrite_prompt(text), max_new_tokens=limit + reasoning_room(draft)))
        replies = generator.generate(
            prompts,
            max_new_tokens=_REWRITE_TOKENS + max(map(reasoning_room, lacking)),
            temperature=TEMPERATURE,
            top_k=TOP_K,
            seed=attempt_seed(recipe, attempt, number),
        )
        for draft, reply in zip(lacking, replies, strict=True):
            content = read_reply(draft, reply)
            if content is None:
                continue
            # The fence may stand around the label or the lead-in, or after it.
            text = without_fence(content)
            label = next((label for label in _LABEL.finditer(text) if label[0].strip() not in draft.passage.text), None)
            text = without_fence(text[label.end() :] if label else _LEAD_IN.sub("", text))
            text = _CUT_OFF.sub("", text).strip()
            if text not in draft.rewrites and is_rewrite(text, draft.passage):
                draft.rewrites.append(text)


def add_pairs(drafts: Sequence[Draft], generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Ask for the pairs as JSON and add those that the filter accepts.

    The first attempt decodes greedily; later attempts sample.
    """
    prompts = []
    for draft in drafts:
        limit = _QUESTION_TOKENS * draft.wanted + reasoning_room(draft)
        prompts.append(Prompt(questions_prompt(passage_text(draft.passage), draft.wanted), max_new_tokens=limit))
    replies = generator.generate(
        prompts,
        max_new_tokens=max((prompt.max_new_tokens or 0 for prompt in prompts), default=1),
        temperature=TEMPERATURE if attempt else 0.0,
        top_k=TOP_K if attempt else 0,
        seed=attempt_seed(recipe, attempt, 0),
    )
    for draft, reply in zip(drafts, replies, strict=True):
        content = read_reply(draft, reply)
        for pair in parse_pairs(content) if content is not None else ():
            if pair is None:
                draft.refused["bad_json"] += 1
            elif len(draft.pairs) < draft.wanted:
                draft.offer(pair)


def parse_pairs(reply: str) -> list[QAPair | None]:
    """Return the pairs of the last JSON array with a pair in a reply, with None for each item that is not a pair.

    Models correct themselves, and repeat the prompt's example; the example counts only where nothing else is. Text and
    code fences around the array are ignored. A reply without such an array gives one None.
    """
    decoder = json.JSONDecoder()
    example = json.loads(QUESTIONS_EXAMPLE)
    found: list[QAPair | None] = [None]
    echoed = True
    position = 0
    while start := _ARRAY_START.search(reply, position):
        try:
            items, position = decoder.raw_decode(reply, start.start())
        except RecursionError:
            break
        except ValueError:
            position = start.end()
            continue
        pairs = [pair if pair and all(map(is_storable, astuple(pair))) else None for pair in map(to_pair, items)]
        if (any(pairs) or found == [None]) and (echoed or items != example):
            found, echoed = pairs, items == example
    return found


def to_pair(item: object) -> QAPair | None:
    """Return a decoded JSON object as a pair; None when a part is missing or is neither a text nor a number."""
    if not isinstance(item, dict):
        return None
    parts = [item.get(name) for name in ("question", "answer", "full_answer")]
    # JSON has no NaN, but Python reads it, and writes it where a value is missing.
    texts = [str(part).strip() for part in parts if isinstance(part, str) or _is_number(part)]
    if len(texts) < 3:
        return None
    question, answer, full_answer = texts
    return QAPair(question, answer.removesuffix(".").strip(), full_answer)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
