"""The site is built strictly: see `make docs`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_broken_link_and_a_name_without_docstring_fail_the_build(tmp_path: Path) -> None:
    for folder in ("docs", "examples", "prag_core"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("mkdocs.yml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, tmp_path)
    with (tmp_path / "docs" / "benchmarks.md").open("a") as page:
        page.write("\nSee [the trainer](trainer.md#nowhere) and [a file](../nowhere.py).\n")
    with (tmp_path / "prag_core" / "identity.py").open("a") as module:
        module.write("\n\ndef unexplained() -> None:\n    pass\n")

    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    assert built.returncode == 1
    for named in ("trainer.md#nowhere", "../nowhere.py", "prag_core.identity.unexplained"):
        assert [line for line in warnings if named in line] != [], warnings
    assert len(warnings) == 3, warnings
