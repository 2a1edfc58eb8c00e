"""The strategy `paper`: one prompt asks for a rewrite, another asks for all pairs as a JSON array."""

from __future__ import annotations

import json
import math
import re
from dataclasses import astuple

from prag_core.augmentation.filter import Draft, contains_text, is_rewrite
from prag_core.augmentation.prompts import QUESTIONS_EXAMPLE, questions_prompt, rewrite_prompt
from prag_core.augmentation.replies import TEMPERATURE, TOP_K, attempt_seed, read_reply, reasoning_room
from prag_core.data.parsing import is_storable
from prag_core.llm.generator import Generator, Prompt
from prag_core.llm.reply import without_fence
from prag_core.prompts import passage_text
from prag_core.recipe import AugmentRecipe
from prag_core.records import Passage, QAPair

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
# A remark after the rewrite, and a heading or an announcement before it.
_REMARK = re.compile(
    r"\n\s*\n\W*(?:note\b|let me know|please let|feel free|i hope|i(?:'ve| have)? (?:kept|changed|made|tried)"
    r"|if you|would you|word count)[^\n]*\s*\Z",
    re.IGNORECASE,
)
_ANNOUNCEMENT = re.compile(r"\A\s*(?:#[^\n]*|[^\n]{0,120}:[*_ ]*)\n\s*(?=\S)")
# The last sentence if the token limit cut it off and a complete sentence comes before it.
_CUT_OFF = re.compile(r"(?<=[.!?])\s+[^.!?]*\Z")


async def add_rewrites(draft: Draft, generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Add the rewrites that a draft lacks, one rewrite a prompt: with the same prompt, only the seed differs."""
    source = passage_text(draft.passage)
    # About 1.3 times the passage's tokens: counted as three bytes a token, and English has about four.
    limit = min(_REWRITE_TOKENS, max(32, len(source.encode()) // 3))
    for number in range(len(draft.rewrites), recipe.rewrites):
        reply = await generator.ask(
            Prompt(rewrite_prompt(source)),
            max_new_tokens=limit + reasoning_room(draft),
            temperature=TEMPERATURE,
            top_k=TOP_K,
            seed=attempt_seed(recipe, attempt, number),
        )
        content = read_reply(draft, reply)
        if content is None:
            continue
        # The fence may stand around the label or the lead-in, or after it.
        text = _from_json(without_fence(content))
        label = next((label for label in _LABEL.finditer(text) if label[0].strip() not in draft.passage.text), None)
        text = without_fence(text[label.end() :] if label else _LEAD_IN.sub("", text))
        text = _CUT_OFF.sub("", _unwrapped(text, draft.passage)).strip()
        if text not in draft.rewrites and is_rewrite(text, draft.passage):
            draft.rewrites.append(text)
        else:
            draft.refused["bad_rewrite"] += 1


async def add_pairs(draft: Draft, generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Ask for the pairs as JSON and add those that the filter accepts.

    The first attempt decodes greedily; later attempts sample.
    """
    reply = await generator.ask(
        Prompt(questions_prompt(passage_text(draft.passage), draft.wanted)),
        max_new_tokens=_QUESTION_TOKENS * draft.wanted + reasoning_room(draft),
        temperature=TEMPERATURE if attempt else 0.0,
        top_k=TOP_K if attempt else 0,
        seed=attempt_seed(recipe, attempt, 0),
    )
    content = read_reply(draft, reply)
    for pair in parse_pairs(content) if content is not None else ():
        if pair is None:
            draft.refused["bad_json"] += 1
        elif len(draft.pairs) < draft.wanted:
            draft.offer(pair)


def _unwrapped(text: str, passage: Passage) -> str:
    """Return a rewrite without an announcement, remark, JSON object or quotes around it."""
    line = _ANNOUNCEMENT.match(text)
    if line and not any(contains_text(passage_text(passage), word) for word in re.findall(r"\w{5,}", line[0])):
        text = text[line.end() :]
    while (remark := _REMARK.search(text)) and remark[0].strip() not in passage.text:
        text = text[: remark.start()]
    text = _from_json(without_fence(text)).strip()
    return text[1:-1] if re.fullmatch(r"“[^“”]*”", text) else text


def _from_json(text: str) -> str:
    """Return the one text that a JSON value holds; any other text as it is."""
    try:
        value = json.loads(text)
    except (RecursionError, ValueError):
        return text
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return values[0] if len(values) == 1 and isinstance(values[0], str) and is_storable(values[0]) else text


def parse_pairs(reply: str) -> list[QAPair | None]:
    """Return the pairs of the last JSON array with a pair in a reply, with None for each item that is not a pair.

    Models correct themselves, and repeat the prompt's example; the example counts only where nothing else is. Text and
    code fences around the array are ignored. Without such an array the pairs of all objects are taken, as in a list
    that is cut off or in lines of JSON. A reply without any gives one None.
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
    return (_loose_pairs(reply, example) or found) if echoed else found


def _loose_pairs(reply: str, example: list[object]) -> list[QAPair | None]:
    """Return the pairs of all JSON objects in a reply, with None for each that is not complete."""
    decoder = json.JSONDecoder()
    found: list[QAPair | None] = []
    position = 0
    while (start := reply.find("{", position)) >= 0:
        position = start + 1
        try:
            item, end = decoder.raw_decode(reply, start)
        except RecursionError:
            break
        except ValueError:
            found.append(None)
            continue
        pair = None if item in example else to_pair(item)
        if pair and all(map(is_storable, astuple(pair))):
            found.append(pair)
            position = end
        elif item in example:
            position = end
    return found if any(found) else []


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
