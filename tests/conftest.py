"""Fixtures that more than one test file uses: the tiny model, and invented passages with augmentations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from prag_core.config import ModelConfig
from prag_core.identity import passage_key
from prag_core.models import BaseModel, load_base_model
from prag_core.records import Augmentation, Passage, QAPair
from prag_core.testing import tiny_base_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_base_model(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> BaseModel:
    """A tiny base model of the test's own: tests put hooks on it."""
    return tiny_base_model(tmp_path / "tiny")


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


@pytest.fixture(scope="session")
def tiny_session(tiny_model_folder: Path) -> BaseModel:
    """A tiny base model that many tests share: whoever hooks it takes the hooks off again."""
    return load_base_model(ModelConfig(name=str(tiny_model_folder), dtype="float32", device="cpu"))
