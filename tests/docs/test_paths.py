"""The documents name only files, commands, make targets and settings that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from pipelines.cli.app import app
from prag_core.config import Config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TOPS = "prag_core|pipelines|cluster|tests|benchmarks|docs|examples"
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(document: Path) -> Iterator[str]:
    """The code spans of a document, and the lines of its code blocks without their comments."""
    text = document.read_text(encoding="utf-8")
    for number, part in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if number % 2:
            yield from (line.split(" #")[0] for line in part.splitlines())
        else:
            yield from re.findall(r"`([^`]+)`", part)


@every_document
def test_files_exist(document: Path) -> None:
    named = set()
    for span in code(document):
        named |= set(re.findall(r"(?<![\w./<>-])(?:[\w-]+/)*[\w.*-]+\.py\b", span))
        named |= set(re.findall(rf"(?:(?<![\w./:-])|(?<=package://))(?:{TOPS})/[\w./*-]+", span))
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


@every_document
def test_modules_exist(document: Path) -> None:
    named = {name for span in code(document) for name in re.findall(r"\b(?:prag_core|pipelines)(?:\.\w+)+", span)}
    for name in named:
        path = ROOT.joinpath(*name.split("."))
        # A package, a module, or a name that a module defines.
        assert path.is_dir() or path.with_suffix(".py").exists() or path.parent.with_suffix(".py").exists(), name


@every_document
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@every_document
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = {name for span in code(document) for name in re.findall(r"^make ([\w-]+)", span)}
    assert named - targets == set()


@every_document
def test_commands_and_their_options_exist(document: Path) -> None:
    for span in code(document):
        for line in re.findall(r"(?:^|/|; |\|\| )prag ([a-z][^;|]*)", span):
            check_command(typer.main.get_command(app), line.split(), line)


def check_command(command: Any, words: list[str], line: str) -> None:
    """Follow the words of a command line from a group to its command, and check the options behind it."""
    while hasattr(command, "commands") and words and re.fullmatch(r"[a-z-]+", words[0]) and command.commands:
        assert words[0] in command.commands, f"prag {line}: no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if command.name == "submit":
        return  # its options are mixed with those of the command that it submits
    options = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    named = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert named - options == set(), f"prag {line}"


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")


@every_document
def test_settings_exist(document: Path) -> None:
    known = set(settings(Config))
    sections = "|".join(name for name in Config.model_fields)
    pattern = rf"(?:^|(?<=[\s=]))(?:{sections})(?:\.[a-z_0-9]+)+(?![\w/*(])"  # with a bracket it is a call
    named = {name for span in code(document) for name in re.findall(pattern, span)}
    files = (".json", ".jsonl", ".md", ".py", ".yaml")
    assert {name for name in named if not name.endswith(files)} - known == set()


def test_pages_that_the_code_names_exist() -> None:
    files = [*ROOT.glob("*.toml"), *ROOT.glob("*.yaml"), *ROOT.glob("*.yml"), ROOT / "Makefile", ROOT / "CHANGELOG.md"]
    for top in ("cluster", "docs", "examples", "pipelines", "prag_core", "benchmarks", "tests"):
        files += [file for ending in ("py", "yaml", "Dockerfile") for file in (ROOT / top).rglob(f"*{ending}")]
    named = {
        (file, name)
        for file in files
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.(?:md|json|py|yaml)\b", file.read_text(encoding="utf-8"))
    }
    assert named
    assert [(str(file), name) for file, name in named if not (ROOT / name).exists()] == []


def test_what_scripts_import_exists() -> None:
    files = [ROOT / "Makefile", ROOT / "ray_job.yaml", *(ROOT / "cluster").iterdir(), *(ROOT / "docs").rglob("*.md")]
    imports = {
        (module, name.strip())
        for file in files
        if file.is_file()
        for module, names in re.findall(
            r"\bfrom ((?:prag_core|pipelines|cluster)[\w.]*) import ([\w, ]+)", file.read_text(encoding="utf-8")
        )
        for name in names.split(",")
    }
    assert imports
    for module, name in imports:
        found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
        assert found, f"{module}.{name}"
