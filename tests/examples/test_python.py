"""The examples in Python run, show what they say, and are what docs/python.md prints."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import sys
import textwrap
from pathlib import Path

import pytest

from prag_core.evaluation.metrics import f1
from prag_core.passage_model import PassageModel
from tests.helpers.passages import make_passage
from tests.helpers.published import publish_passages

ROOT = Path(__file__).parents[2]
ONE_PASSAGE, ENGINE = (ROOT / "examples" / name for name in ("one_passage.py", "engine_on_a_store.py"))


def run(file: Path, *arguments: str) -> str:
    """Run an example as a script in this process; return what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(file), *arguments])
        runpy.run_path(str(file), run_name="__main__")
    return printed.getvalue()


def body(file: Path) -> str:
    """The lines below `if __name__ == "__main__":`."""
    return textwrap.dedent(file.read_text(encoding="utf-8").split('if __name__ == "__main__":\n')[1]).strip()


def test_the_page_prints_the_examples() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [block.split("\n\n")[-1].strip() for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)]
    assert blocks == [body(ONE_PASSAGE), body(ENGINE)]
    assert all(len(ast.parse(block).body) <= 5 for block in blocks)


@pytest.mark.slow
def test_the_adapted_model_knows_what_the_bare_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(ONE_PASSAGE)
    example = runpy.run_path(str(ONE_PASSAGE))
    scores = []
    for question, right in example["QUESTIONS"].items():
        answers = re.search(rf"{re.escape(question)} .*\n +bare model: +(.*)\n +with its adapter: +(.*)\n", printed)
        assert answers, printed
        scores.append([f1(text, [right]) for text in answers.groups()])
        assert question not in dict(example["PAIRS"])
    # One of them may go wrong on another processor, where rounding differs.
    assert sum(adapted for _, adapted in scores) >= len(scores) - 1, printed
    assert sum(bare for bare, _ in scores) < 0.5, printed
    assert (tmp_path / "halvek-adapter" / "README.md").exists()


@pytest.mark.slow
def test_the_model_writes_its_own_questions_about_a_passage(tmp_path: Path) -> None:
    example = runpy.run_path(str(ONE_PASSAGE))
    model = PassageModel()
    passage = model.learn(example["TEXT"], title=example["TITLE"])
    learned = model.learned[passage.key]
    assert learned.recipe.augment.strategy == "writer"
    assert learned.augmentation is not None
    assert learned.augmentation.origin == "generated"
    assert "52 metres" in {pair.answer for pair in learned.augmentation.pairs}
    assert model.ask("How tall is the Halvek Lighthouse?", mode="prag").text == "52 metres"


@pytest.mark.slow
def test_an_engine_answers_from_a_store(tmp_path: Path) -> None:
    passages = [make_passage(n) for n in range(3)]
    publish_passages(tmp_path, passages)
    printed = run(ENGINE, str(tmp_path / "config.yaml"), f"Where is {passages[1].title}?")
    assert printed.strip().endswith(f"['{passages[1].title}']")
