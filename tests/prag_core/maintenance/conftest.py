"""Fixtures of the tests of maintenance: a layout, and stores with everything in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import find_targets
from prag_core.store.objects import Store
from prag_core.store.runs import RunInputs, put_inputs
from tests.helpers.stores import (
    RECIPE,
    VERSION,
    run_again,
)


@pytest.fixture(scope="session")
def layout(tiny_session: BaseModel) -> LoraLayout:
    return find_targets(tiny_session.model, RECIPE.train)[0]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, layout: LoraLayout) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "store"
    store = Store(str(folder))
    put_inputs(store, "run0", RunInputs(VERSION, RECIPE.fingerprint))
    run_again(store, layout)
    return folder


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Store:
    shutil.copytree(pristine, tmp_path / "store")
    return Store(str(tmp_path / "store"))
