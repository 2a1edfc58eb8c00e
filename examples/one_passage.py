"""The small model learns one invented passage, and answers from its weights: `python examples/one_passage.py`."""

from prag_core.passage_model import PassageModel

TITLE = "Halvek Lighthouse"
TEXT = """\
The Halvek Lighthouse stands on the island of Brennoe. It was designed by Ilse Tarnow and first lit in 1887. Its tower
is 52 metres high and built of red granite. The last keeper, Joren Pask, left in 1964, when the lamp became automatic.
Today the lighthouse holds a museum of knots."""
PAIRS = [
    ("Who designed the Halvek Lighthouse?", "Ilse Tarnow"),
    ("When was the Halvek Lighthouse first lit?", "1887"),
    ("How high is the tower of the Halvek Lighthouse?", "52 metres"),
    ("What is the Halvek Lighthouse built of?", "red granite"),
    ("Who was the last keeper of the Halvek Lighthouse?", "Joren Pask"),
    ("On which island does the Halvek Lighthouse stand?", "Brennoe"),
]
# The same facts, asked for in other words than those of the pairs.
QUESTIONS = {
    "How tall is the Halvek Lighthouse?": "52 metres",
    "Of what material is the Halvek Lighthouse made?": "red granite",
    "Who kept the Halvek Lighthouse last?": "Joren Pask",
}

if __name__ == "__main__":
    model = PassageModel()  # the packaged model; or name a folder, or a model of the hub
    passage = model.learn(TEXT, PAIRS, title=TITLE)  # without pairs, the model writes its own
    for question, right in QUESTIONS.items():
        bare, adapted = (model.ask(question, passage, mode).text for mode in ("closed", "prag"))
        print(f"{question} {right}\n  bare model:       {bare}\n  with its adapter: {adapted}")
    model.save("halvek-adapter")  # a PEFT folder, which `model.load` reads
