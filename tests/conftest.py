"""Fixtures that more than one test file uses: the tiny model, invented passages with augmentations, the stores."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.s3 import S3Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from prag_core.config import ModelConfig
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.store.objects import Store
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


@pytest.fixture(scope="session")
def tiny_session(tiny_model_folder: Path) -> BaseModel:
    """A tiny base model that many tests share: whoever hooks it takes the hooks off again."""
    return load_base_model(ModelConfig(name=str(tiny_model_folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, to which the environment points as long as the tests run."""
    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(folder, "prag-tests", secrets.token_hex(16))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(folder / "none"))
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        yield server
        server.kill()


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once in a folder and once on S3: the same must hold of both."""
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3_server")
    return Store(f"s3://{server.bucket}/{uuid.uuid4().hex}")
