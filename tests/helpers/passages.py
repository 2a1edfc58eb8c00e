"""Invented passages and augmentations for them."""

from __future__ import annotations

from prag_core.identity import passage_key
from prag_core.records import Augmentation, Passage, QAPair


def make_passage(number: int, words: int = 30) -> Passage:
    title = f"Quorl {number}"
    text = f"{title} is a hill in Vend. " + " ".join(f"w{number}x{i}" for i in range(words)) + "."
    return Passage(passage_key(title, text), title, text, (f"p{number}",))


def make_augmentation(passage: Passage, pairs: int = 3) -> Augmentation:
    qa = tuple(
        QAPair(f"What is {passage.title} number {i}?", f"thing {i}", f"{passage.title} is thing {i}.")
        for i in range(pairs)
    )
    return Augmentation(passage.key, (f"In Vend lies the hill {passage.title}.",), qa, "imported")


TEXTS = [
    ("Orven Bridge", "The Orven Bridge was designed by Maren Tilsk and opened in 1931."),
    ("Orven Bridge", "A flood damaged two pillars of the bridge in 1954."),
    ("Lake Sulva", "Lake Sulva is 41 metres deep. Its water comes from the Hallen glacier."),
    ("Pell Observatory", "The observatory on Mount Pell holds a telescope with a mirror of 2.4 metres."),
    ("Tessa Norrgard", "Tessa Norrgard wrote the novel The Salt Ledger, and never saw it printed."),
    ("", "A passage without a title mentions the quennel, a small grey bird."),
    ("Émile Grâce", 'He said: "naïve café"\n\tand left 😀 for 東京.'),
    ("Twin", "The gorvath is a musical instrument."),
    ("Twit", "The gorvath is a musical instrument."),
    ("Title\nof two lines", "Nothing but a zanthor."),
]
PASSAGES = [
    Passage(passage_key(title, text), title, text, (f"doc{number}", f"doc{number}b"), ("board", "hr")[: number % 3])
    for number, (title, text) in enumerate(TEXTS)
]
