"""Who may import whom, and what importing may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a package imports only packages above it in this list. A package's name alone stands for the
# modules that lie directly in it; docs/architecture.md draws the same order.
ORDER = (
    "cluster",
    "prag_core",
    "prag_core.data",
    "prag_core.llm",
    "prag_core.augmentation",
    "prag_core.training",
    "prag_core.store",
    "prag_core.retrieval",
    "prag_core.maintenance",
    "prag_core.inference",
    "prag_core.passage_model",
    "prag_core.evaluation",
    "prag_core.testing",
    "pipelines",
    "pipelines.execution",
    "pipelines.stages",
    "pipelines.planning",
    "pipelines.jobs",
    "pipelines.maintenance",
    "pipelines.evaluation",
    "pipelines.serving",
    "pipelines.cli",
)
# What each top folder may not import, besides what the order forbids.
FORBIDDEN = {
    "prag_core": {"ray", "fastapi", "starlette", "uvicorn", "typer", "rich", "pipelines", "cluster"},
    "cluster": {"prag_core", "pipelines"},
}


def module_name(file: Path, root: Path = ROOT) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def modules(root: Path = ROOT) -> dict[str, Path]:
    tops = ("cluster", "prag_core", "pipelines")
    return {module_name(file, root): file for top in tops for file in sorted((root / top).rglob("*.py"))}


def imported(file: Path) -> set[str]:
    """Return the full names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative imports hide who imports whom"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return which of these modules each of them imports."""
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        targets = {whole if whole in files else whole.rpartition(".")[0] for whole in imported(file)}
        graph[name] = {target for target in targets if target in files and target != name}
    return graph


def package_of(module: str) -> str:
    """Return the entry of `ORDER` that a module belongs to."""
    if module in ORDER:
        return module
    return module.rpartition(".")[0]


def upward_imports(graph: Mapping[str, set[str]]) -> list[str]:
    rank = {package: i for i, package in enumerate(ORDER)}
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if rank[package_of(target)] > rank[package_of(module)]
    ]


def test_every_module_belongs_to_a_package_of_the_order() -> None:
    names = modules()
    assert len(names) > 100
    assert {package_of(name) for name in names} == set(ORDER)


def test_packages_import_only_packages_below() -> None:
    assert upward_imports(import_graph(modules())) == []


def test_no_import_circles() -> None:
    graph = import_graph(modules())
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    packages: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        packages[package_of(module)] |= {package_of(target) for target in targets} - {package_of(module)}
    TopologicalSorter(packages).prepare()


def test_a_circle_and_an_upward_import_are_found(tmp_path: Path) -> None:
    for name, text in {
        "prag_core/store/objects.py": "from prag_core.store import shards\n",
        "prag_core/store/shards.py": "def f():\n    from prag_core.store.objects import Store\n",
        "prag_core/data/corpus.py": "from prag_core.inference.engine import Engine\n",
        "prag_core/inference/engine.py": "",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    graph = import_graph(modules(tmp_path))
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
    assert upward_imports(graph) == ["prag_core.data.corpus imports prag_core.inference.engine"]


@pytest.mark.parametrize("top", sorted(FORBIDDEN))
def test_a_top_folder_imports_nothing_that_it_must_not_know(top: str) -> None:
    files = sorted((ROOT / top).rglob("*.py"))
    assert files
    wrong = {module_name(f): {name.split(".")[0] for name in imported(f)} & FORBIDDEN[top] for f in files}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_only_the_session_starts_ray() -> None:
    calls = [
        name
        for name, file in modules().items()
        if "ray.init(" in file.read_text(encoding="utf-8").replace("`ray.init`", "")
    ]
    assert calls == ["cluster.session"]


def test_only_retrieval_knows_the_jvm() -> None:
    java = {"jnius", "jnius_config", "pyserini"}
    knowing = {name for name, file in modules().items() if {n.split(".")[0] for n in imported(file)} & java}
    assert knowing
    assert {package_of(name) for name in knowing} == {"prag_core.retrieval"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


MODEL_LIBRARIES = {"torch", "transformers", "jnius"}


def test_what_only_moves_text_loads_no_model_library() -> None:
    # Workers that only move text must not pay seconds for torch.
    names = "prag_core.records, prag_core.data.corpus, prag_core.store.objects, prag_core.config"
    assert not modules_after(f"import {names}") & (MODEL_LIBRARIES | {"ray"})


def test_what_tasks_run_loads_no_model_library() -> None:
    # A task's worker imports the module of the task's function.
    execution = [name for name in modules() if name.startswith("pipelines.execution.")]
    names = [
        *execution,
        "pipelines.stages.ingest",
        "pipelines.stages.augment",
        "pipelines.jobs.corpus_diff",
        "pipelines.planning.measure",
        "pipelines.evaluation.retrieve",
    ]
    assert not modules_after(f"import {', '.join(names)}") & MODEL_LIBRARIES


def test_a_driver_that_trains_nothing_itself_loads_no_model_library() -> None:
    names = [
        "pipelines.jobs.run",
        "pipelines.jobs.reindex",
        "pipelines.jobs.augmentations",
        "pipelines.planning.plan",
        "pipelines.planning.preflight",
        "pipelines.maintenance.operations",
        "pipelines.maintenance.verify",
    ]
    assert not modules_after(f"import {', '.join(names)}") & MODEL_LIBRARIES


def test_the_command_line_helps_before_it_loads_ray_or_torch() -> None:
    assert not modules_after("import pipelines.cli.app") & (MODEL_LIBRARIES | {"ray"})


def test_no_module_of_the_library_loads_ray() -> None:
    names = [name for name in modules() if name.startswith("prag_core.")]
    assert not modules_after(f"import {', '.join(names)}") & {"ray", "jnius"}
