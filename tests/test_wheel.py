"""The wheel holds everything that the packages need: it works without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "pipelines", "prag_core")

pytestmark = pytest.mark.slow

# Runs the command line, then prints each folder that the packages' modules were loaded from.
RUN = f"""
import runpy, sys
try:
    runpy.run_module("pipelines.cli", run_name="__main__")
finally:
    files = [module.__file__ for name, module in sorted(sys.modules.items()) if name.split(".")[0] in {PACKAGES}]
    print("LOADED", *files, sep="\\n", file=sys.stderr)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: a `build` folder left in the checkout would add files that are there no more."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", wheels, ".", cwd=source)
    (made,) = wheels.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *options, "--target", folder, wheel, cwd=folder)
    return folder


def prag(installed: Path, folder: Path, *arguments: str) -> str:
    """Run a command from `folder` on the installed wheel, and return what it prints.

    With `-S`, Python reads no .pth file of the environment, so its editable install does not fill a gap of the wheel.
    """
    path = os.pathsep.join((str(installed), sysconfig.get_path("purelib")))
    done = run(sys.executable, "-S", "-c", RUN, *arguments, cwd=folder, PYTHONPATH=path)
    loaded = done.stderr.partition("LOADED\n")[2].split()
    assert len(loaded) > 10
    assert [file for file in loaded if not Path(file).is_relative_to(installed)] == []
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = {str(p.relative_to(ROOT)) for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file()}
    wanted = {file for file in files if "__pycache__" not in file}
    assert {"pipelines/cli/__main__.py", "pipelines/examples/demo.yaml", "pipelines/serving/static/page.js"} <= wanted
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed ^ wanted == {"cluster/Dockerfile"}


def test_the_installed_wheel_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    assert "Exit codes" in prag(installed, tmp_path, "--help")
    made = json.loads(prag(installed, tmp_path, "plan", "--json", "--measure", "0"))
    assert (made["passages"], made["to_train"]) == (64, 64)
    assert list(tmp_path.iterdir()) == []
