"""A task adapter that could not be trained is a failure of its own, and is not stored."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.evaluation.task_adapters import TrainTasks
from pipelines.settings import make_context
from prag_core.config_file import parse_config
from prag_core.store.objects import Store
from tests.helpers.passages import make_augmentation, make_passage


@pytest.mark.parametrize(
    ("train", "failure"),
    [({}, ""), ({"max_tokens": 32}, "nothing_to_train"), ({"learning_rate": 1e-45}, "nothing_learned")],
)
def test_only_what_learned_is_stored(tmp_path: Path, tiny_model_folder: Path, train: dict, failure: str) -> None:
    config = parse_config(
        {
            "store": str(tmp_path / "store"),
            "corpus": {"path": "none"},
            "model": {"name": str(tiny_model_folder), "dtype": "float32"},
            "augment": {"generator": "none"},
            "train": {"epochs": 1, **train},
        }
    )
    passages = [make_passage(n) for n in range(2)]
    texts = {passage.key: (passage, make_augmentation(passage)) for passage in passages}
    actor = TrainTasks(make_context(config), "evaluations/e", texts, 1)
    outcomes = actor(pa.Table.from_pylist([{"name": "one", "keys": list(texts)}])).to_pylist()
    assert [(outcome["key"], outcome["rejected"]) for outcome in outcomes] == [("one", failure)]
    assert len(Store(config.store).list("evaluations", "")) == (0 if failure else 1)
