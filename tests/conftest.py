"""Fixtures that more than one test file uses: the tiny model, invented passages with augmentations, the stores."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.s3 import S3Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two tests run at once, so each process computes on one core: OpenMP threads that wait for a core that another process
# has made such tests ten times as slow. This comes before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PRAG_CORES", "1")
# Ray, and later a Java machine, may start in this process: Ray's handler would take Java's SIGSEGV for a crash.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")

from cluster.resources import PROFILES
from cluster.session import ray_session
from prag_core.config import ModelConfig
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.store.objects import Store
from prag_core.testing import tiny_base_model

# The files of tests that take longest, longest first. Two processes take the files in this order (`make slow`).
LONG_FILES = (
    "pipelines/serving/test_deployment.py",
    "benchmarks/test_benchmarks.py",
    "cluster/test_cluster.py",
    "pipelines/jobs/test_run.py",
    "pipelines/jobs/test_warmup.py",
    "examples/test_paper.py",
    "pipelines/cli/test_stopping.py",
    "pipelines/jobs/test_submit.py",
    "pipelines/test_defaults.py",
    "pipelines/jobs/test_reindex.py",
    "pipelines/cli/test_store.py",
    "pipelines/serving/test_page.py",
    "pipelines/evaluation/test_run.py",
    "pipelines/execution/test_isolation.py",
    "prag_core/store/test_s3.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    places = {tests / file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
def ray_here() -> Iterator[str]:
    """Ray runs in this process: commands that tests call in it neither start nor stop one of their own.

    Returns its address, for commands in processes of their own. Its node counts one GPU, for scheduling alone.
    """
    import ray

    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_ADDRESS", raising=False)
            patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
            stack.enter_context(ray_session(PROFILES["laptop"]))
        faulthandler.disable()  # Ray enables it, and a Java machine that this process has started uses its signals
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("ray.init", lambda *_, **__: None)
        patch.setattr("ray.shutdown", lambda: None)
        yield ray.get_runtime_context().gcs_address


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
