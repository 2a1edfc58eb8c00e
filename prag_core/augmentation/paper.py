"""The strategy `paper`: one prompt asks for a rewrite, another asks for all pairs as a JSON array."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from prag_core.augmentation.filter import Draft, is_rewrite
from prag_core.augmentation.prompts import questions_prompt, rewrite_prompt
from prag_core.errors import GenerationError
from prag_core.llm.generator import Generator, Prompt
from prag_core.prompts import passage_text
from prag_core.recipe import AugmentRecipe
from prag_core.records import QAPair

_TEMPERATURE = 0.7
_TOP_K = 50
_REWRITE_TOKENS = 1024
_QUESTION_TOKENS = 160
# How many opening brackets of a reply to try as the start of its JSON array.
_ARRAY_STARTS = 20

# "Here is the rewritten passage:" or "Rewritten passage:", which small models write before the rewrite.
_LEAD_IN = re.compile(
    r"\A\s*(?:(?:sure|certainly|here)\b[^\n:]{0,80}|[^\n:]{0,30}(?:passage|version)):\s*", re.IGNORECASE
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
            prompts.append(Prompt(rewrite_prompt(text), max_new_tokens=max(32, len(text.encode()) // 3)))
        replies = generator.generate(
            prompts,
            max_new_tokens=_REWRITE_TOKENS,
            temperature=_TEMPERATURE,
            top_k=_TOP_K,
            seed=_seed(recipe, attempt, number),
        )
        for draft, reply in zip(lacking, replies, strict=True):
            if isinstance(reply, GenerationError):
                draft.error = reply
                continue
            text = _CUT_OFF.sub("", _LEAD_IN.sub("", reply)).strip()
            if text not in draft.rewrites and is_rewrite(text, draft.passage):
                draft.rewrites.append(text)


def add_pairs(drafts: Sequence[Draft], generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Ask for the pairs as JSON and add those that the filter accepts.

    The first attempt decodes greedily; later attempts sample.
    """
    prompts = [Prompt(questions_prompt(passage_text(draft.passage), recipe.pairs)) for draft in drafts]
    replies = generator.generate(
        prompts,
        max_new_tokens=_QUESTION_TOKENS * recipe.pairs,
        temperature=_TEMPERATURE if attempt else 0.0,
        top_k=_TOP_K if attempt else 0,
        seed=_seed(recipe, attempt, 0),
    )
    for draft, reply in zip(drafts, replies, strict=True):
        if isinstance(reply, GenerationError):
            draft.error = reply
            continue
        for pair in parse_pairs(reply):
            if pair is None:
                draft.refused["bad_json"] += 1
            elif len(draft.pairs) < recipe.pairs:
                draft.offer(pair)


def parse_pairs(reply: str) -> list[QAPair | None]:
    """Return the pairs of the first JSON array of objects in a reply, with None for each item that is not a pair.

    Text and code fences around the array are ignored. A reply without such an array gives one None.
    """
    decoder = json.JSONDecoder()
    for match in list(re.finditer(r"\[", reply))[:_ARRAY_STARTS]:
        try:
            items, _ = decoder.raw_decode(reply, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(items, list) and any(isinstance(item, dict) for item in items):
            return [to_pair(item) for item in items]
    return [None]


def to_pair(item: object) -> QAPair | None:
    """Return a decoded JSON object as a pair; None when a part is missing or is neither a text nor a number."""
    if not isinstance(item, dict):
        return None
    parts = [item.get(name) for name in ("question", "answer", "full_answer")]
    texts = [str(part).strip() for part in parts if isinstance(part, str | int | float) and not isinstance(part, bool)]
    if len(texts) < 3:
        return None
    question, answer, full_answer = texts
    return QAPair(question, answer.removesuffix(".").strip(), full_answer)


def _seed(recipe: AugmentRecipe, attempt: int, number: int) -> int:
    return recipe.seed + 1_000 * attempt + number
