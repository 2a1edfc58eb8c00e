"""A language model as judge: does an answer mean the same as one of the accepted answers?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prag_core.errors import GenerationError
from prag_core.llm.generator import Generator, Prompt, ask_all
from prag_core.llm.reply import reply_content

# Raise it whenever the prompt changes.
JUDGE_VERSION = 2
# A reply of at most this many words may hold its yes or no anywhere, as in "The answer is: yes".
_SHORT = 5

_PROMPT = (
    "Question: {question}\nAccepted answers: {answers}\nGiven answer: {given}\n\n"
    "Does the given answer say the same as one of the accepted answers? Other words, a longer sentence or another "
    "spelling do not matter; another person, place, number or date does. Reply with one word: yes or no."
)


async def judge_answers(generator: Generator, rows: Sequence[tuple[str, Sequence[str], str]]) -> list[float]:
    """Return 1.0 for each right answer and 0.0 for each wrong one; an empty answer is wrong without asking.

    A row is a question, its accepted answers and the given answer.

    Raises:
        GenerationError: when the judge fails, or replies neither yes nor no; the message says how often.
    """
    asked = [i for i, (_, _, given) in enumerate(rows) if given.strip()]
    prompts = [
        Prompt(_PROMPT.format(question=rows[i][0], answers="; ".join(rows[i][1]), given=rows[i][2])) for i in asked
    ]
    verdicts = [0.0] * len(rows)
    unclear: list[str] = []
    for i, prompt, reply in zip(asked, prompts, await ask_all(generator, prompts, max_new_tokens=8), strict=True):
        if isinstance(reply, GenerationError):
            raise reply
        words = re.findall(r"\w+", (reply_content(reply, prompt.text) or "").lower())
        said = {word for word in words if word in ("yes", "no")}
        both = {*words[:3]} - {"or", "and", "but"} == {"yes", "no"}
        word = words[0] if words and words[0] in said and not both else ""
        if not word and len(words) <= _SHORT and len(said) == 1:
            (word,) = said
        if not word:
            unclear.append(reply)
        verdicts[i] = float(word == "yes")
    if unclear:
        raise GenerationError(
            f"the judge gave {len(unclear)} of {len(prompts)} replies that are neither yes nor no, such as "
            f"{unclear[0]!r}",
            "use a model that follows instructions",
        )
    return verdicts
