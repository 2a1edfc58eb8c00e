"""The strategy `lines`: a model writes its questions and answers one a line, in several drafts.

A model of about a billion parameters writes such lines more reliably than JSON, and a reply that is cut off loses its
last line alone. Each attempt is a draft of its own; the filter keeps what is new in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from prag_core.augmentation.filter import Draft
from prag_core.augmentation.prompts import lines_prompt
from prag_core.augmentation.replies import TEMPERATURE, TOP_K, attempt_seed, read_reply, reasoning_room
from prag_core.llm.generator import Generator, Prompt
from prag_core.prompts import passage_text
from prag_core.recipe import AugmentRecipe
from prag_core.records import QAPair

_PAIR_TOKENS = 48
# "Q: … | A: …", or the answer on the next line; numbers and emphasis around the letters are left out, and what follows
# the answer in its line.
_OPENING = r"^\W*(?:\d+\W+)?Q(?:uestion)?[ \d]*\W*[:：]"
_LINE = re.compile(
    _OPENING + r"\W*(.+?)\s*(?:[|｜→\t]|\n)\W*A(?:nswer)?[ \d]*\W*[:：]\W*(.+?)[ \t]*(?=[|｜]|\bQ[ \d]*[:：]|\r?$)",
    re.IGNORECASE | re.MULTILINE,
)
_QUESTION = re.compile(_OPENING, re.IGNORECASE | re.MULTILINE)


async def add_line_pairs(draft: Draft, generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Ask for the pairs that a draft lacks, and add those that the filter accepts."""
    lacking = draft.wanted - len(draft.pairs)
    reply = await generator.ask(
        Prompt(lines_prompt(passage_text(draft.passage), lacking)),
        max_new_tokens=_PAIR_TOKENS * lacking + reasoning_room(draft),
        temperature=TEMPERATURE,
        top_k=TOP_K,
        seed=attempt_seed(recipe, attempt, 0),
    )
    content = read_reply(draft, reply)
    if content is None:
        return
    pairs = list(parse_lines(content))
    if (bad := max(len(_QUESTION.findall(content)), 1) - len(pairs)) > 0:
        draft.refused["bad_line"] += bad
    for pair in pairs:
        if len(draft.pairs) < draft.wanted:
            draft.offer(pair)


def parse_lines(reply: str) -> Iterator[QAPair]:
    """Yield the pairs of a reply; all other lines are left out, also a question without an answer."""
    for question, answer in _LINE.findall(reply):
        short = answer.strip().strip("*_").removesuffix(".").strip()
        yield QAPair(question.strip().strip("*_").strip(), short, short)
