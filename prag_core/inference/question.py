"""What counts as a question: the command line and the server ask the same."""

from __future__ import annotations

import unicodedata

from prag_core.data.parsing import is_storable
from prag_core.errors import InputError

# Letters and signs by their category that nevertheless show nothing.
_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def question_problem(text: str) -> str:
    """Return why a text cannot be a question, or an empty text if it can."""
    if not is_storable(text):
        return "is not Unicode text: it holds bytes that are not UTF-8, or half a surrogate pair"
    # Separators, control and format characters, and marks without a letter to stand on.
    if all(unicodedata.category(character)[0] in "ZCM" or character in _INVISIBLE for character in text):
        return "is blank"
    return ""


def check_question(text: str, max_chars: int) -> None:
    """Check a question that somebody typed.

    Raises:
        InputError: when it is too long, blank or not Unicode text.
    """
    problem = f"has more than {max_chars} characters" if len(text) > max_chars else question_problem(text)
    if problem:
        raise InputError(f"the question {problem}", "ask in a sentence; `serve.max_question_chars` is the limit")
