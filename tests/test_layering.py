"""Who may import whom, and what importing may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "prag_core": {"ray", "fastapi", "starlette", "uvicorn", "typer", "rich", "pipelines", "cluster"},
    "cluster": {"prag_core", "pipelines"},
    "pipelines": set(),
}


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_layers_import_only_downwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {file.name: imports_of(file) & FORBIDDEN[package] for file in files}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_only_the_session_starts_ray() -> None:
    calls = []
    for file in sorted(ROOT.glob("*/*.py")):
        if file.parent.name in FORBIDDEN and "ray.init(" in file.read_text(encoding="utf-8").replace("`ray.init`", ""):
            calls.append(f"{file.parent.name}/{file.name}")
    assert calls == ["cluster/session.py"]


def test_only_retrieval_knows_the_jvm() -> None:
    knowing = {
        file.name
        for file in (ROOT / "prag_core").glob("*.py")
        if imports_of(file) & {"jnius", "jnius_config", "pyserini"}
    }
    assert knowing == {"retrieval.py"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_records_and_corpus_load_no_model_library() -> None:
    # Workers that only move text must not pay seconds for torch.
    loaded = modules_after("import prag_core.records, prag_core.corpus, prag_core.store, prag_core.config")
    assert not loaded & {"torch", "transformers", "ray", "jnius"}


def test_what_tasks_run_loads_no_model_library() -> None:
    # A task's worker imports the module of the task's function.
    loaded = modules_after(
        "import pipelines.ingest, pipelines.tables, pipelines.difference, pipelines.timings, pipelines.patience, "
        "pipelines.evaluation_data, pipelines.augment"
    )
    assert not loaded & {"torch", "transformers", "jnius"}


def test_a_driver_that_trains_nothing_itself_loads_no_model_library() -> None:
    loaded = modules_after(
        "import pipelines.job, pipelines.plan, pipelines.reindex, pipelines.operate, pipelines.maintain, "
        "pipelines.exchange, pipelines.preflight"
    )
    assert not loaded & {"torch", "transformers", "jnius"}


def test_the_command_line_helps_before_it_loads_ray_or_torch() -> None:
    loaded = modules_after("import pipelines.cli")
    assert not loaded & {"torch", "transformers", "ray", "jnius"}


def test_no_module_of_the_library_loads_ray() -> None:
    names = [f"prag_core.{file.stem}" for file in (ROOT / "prag_core").glob("[a-z]*.py")]
    assert not modules_after(f"import {', '.join(names)}") & {"ray", "jnius"}
