"""The prompts that augment a passage, and the invented facts of their worked examples.

A change here, too, raises `PROMPT_VERSION` in `prag_core.prompts`.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """One example of the few-shot texts. Its facts are invented, so that a copy of it can be recognized."""

    topic: str
    sentence: str
    answer: str
    question: str


EXAMPLES = (
    WorkedExample(
        "Veltran Bridge",
        "It was designed by Orla Minsk and opened on 4 May 1911.",
        "4 May 1911",
        "When was the Veltran Bridge opened?",
    ),
    WorkedExample(
        "Tomas Ghelder",
        "He studied at the Lorrach Academy before he moved to Bruvik, where he painted 34 murals.",
        "34",
        "How many murals did Tomas Ghelder paint in Bruvik?",
    ),
    WorkedExample(
        "The Salt Clock",
        "The novel, written by Ines Dovrek in 1962, is about a lighthouse keeper.",
        "Ines Dovrek",
        "Who wrote the novel The Salt Clock?",
    ),
    WorkedExample(
        "Quill River",
        "The river rises near Hamsted and flows into Lake Orrin.",
        "Lake Orrin",
        "Which lake does the Quill River flow into?",
    ),
)

# If a pair has one of these names and its passage does not, the pair was copied from a prompt.
INVENTED_NAMES = (
    *("Ombrel", "Sefa Durrin", "Veltran", "Orla Minsk", "Ghelder", "Lorrach", "Bruvik", "Salt Clock"),
    *("Ines Dovrek", "Quill River", "Hamsted", "Lake Orrin"),
)

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


def asking_prompt(topic: str, sentence: str, answer: str, opening: str) -> str:
    """Return the few-shot text that a model continues with the rest of a question, given its answer and `opening`."""
    blocks = [f"{_ASK.format(topic=e.topic, sentence=e.sentence, answer=e.answer)} {e.question}" for e in EXAMPLES]
    last = f"{_ASK.format(topic=topic, sentence=sentence, answer=answer)} {opening}"
    return "\n\n".join([*blocks, last])


def reading_prompt(topic: str, sentence: str, question: str) -> str:
    """Return the few-shot text that a model continues with the answer to the question."""
    blocks = [f"{_READ.format(topic=e.topic, sentence=e.sentence, question=e.question)} {e.answer}" for e in EXAMPLES]
    return "\n\n".join([*blocks, _READ.format(topic=topic, sentence=sentence, question=question)])
