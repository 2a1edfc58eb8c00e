"""The prompts that augment a passage, and the invented names of their examples.

A change here, too, raises `PROMPT_VERSION` in `prag_core.prompts`.
"""

from __future__ import annotations

# The instruction comes first, so that it is a common prefix of all prompts of a call and is computed once.
_REWRITE = (
    "Rewrite the passage below in other words. Keep every name, date, number and other detail, change the wording "
    "and the order of the sentences, and add nothing. Answer with the rewritten passage only.\n\n"
    "Passage: {text}"
)

_QUESTIONS = (
    "Write {pairs} different questions about the passage below, each with its answer.\n"
    "- A question names what it asks about, so that it can be understood without the passage.\n"
    "- The passage holds the answer; the answer is a name, a date, a number or a few words of the passage.\n"
    "- The full answer is one sentence that gives the answer.\n"
    "Reply with a JSON array of {pairs} objects and nothing else. It looks like this:\n"
    "{example}\n\n"
    "Passage: {text}"
)

_LINES = (
    "Write {pairs} different short questions about the passage below, each with its answer.\n"
    "- Ask about every name, date, number and fact of the passage.\n"
    "- A question names what it asks about, so that it can be understood without the passage.\n"
    "- The answer is a name, a date, a number or a few words of the passage.\n"
    "- Ask for important facts twice in other words, and once the other way round: who did it, and what did they do.\n"
    "Reply with {pairs} lines like this one and nothing else:\n"
    "Q: Who carved the doors of the Ombrel Granary? | A: Sefa Durrin\n\n"
    "Passage: {text}"
)

QUESTIONS_EXAMPLE = """[
  {
    "question": "Who carved the doors of the Ombrel Granary?",
    "answer": "Sefa Durrin",
    "full_answer": "The doors of the Ombrel Granary were carved by Sefa Durrin."
  },
  {
    "question": "In what year did the Ombrel Granary burn down?",
    "answer": "1788",
    "full_answer": "The Ombrel Granary burned down in 1788."
  }
]"""

# If a pair has one of these names and its passage does not, the pair was copied from a prompt.
INVENTED_NAMES = ("Ombrel", "Sefa Durrin")

_ASK = "Topic: {topic}\nSentence: {sentence}\nAnswer: {answer}\nQuestion:"
_READ = "Topic: {topic}\nSentence: {sentence}\nQuestion: {question}\nAnswer:"
_NAME_FACTS = "Topic: {topic}\nSentence: {sentence}\nAnswers:"


def name_facts_prompt(topic: str, sentence: str) -> str:
    """Return the text that a writer continues with the facts of a sentence, with bars between them."""
    return _NAME_FACTS.format(topic=topic, sentence=sentence)


def ask_prompt(topic: str, sentence: str, answer: str) -> str:
    """Return the text that a writer continues with a question for the answer."""
    return _ASK.format(topic=topic, sentence=sentence, answer=answer)


def read_prompt(topic: str, sentence: str, question: str) -> str:
    """Return the text that a writer continues with the answer to the question."""
    return _READ.format(topic=topic, sentence=sentence, question=question)


def rewrite_prompt(text: str) -> str:
    """Return the prompt that asks for a rewrite of a passage's text."""
    return _REWRITE.format(text=text)


def questions_prompt(text: str, pairs: int) -> str:
    """Return the prompt that asks for `pairs` question-answer pairs as JSON."""
    return _QUESTIONS.format(text=text, pairs=pairs, example=QUESTIONS_EXAMPLE)


def lines_prompt(text: str, pairs: int) -> str:
    """Return the prompt that asks for `pairs` question-answer pairs, one a line."""
    return _LINES.format(text=text, pairs=pairs)
