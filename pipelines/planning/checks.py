"""Checks, and those that each node makes: this file loads no torch, which would take every one of them seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from fsspec.core import url_to_fs

from cluster.preflight import CheckResult
from prag_core.config import Config
from prag_core.data.files import list_files
from prag_core.errors import InputError, PragError, PreflightError, StoreError
from prag_core.llm.checkpoint import find_model
from prag_core.packaged import local_path
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import open_store

if TYPE_CHECKING:
    from prag_core.llm.layout import LoraLayout
    from prag_core.recipe import Recipe


T = TypeVar("T")


@dataclass
class PreflightReport:
    """What was found so far; `recipe` and `layout` are there when the configuration can be described."""

    findings: list[CheckResult] = field(default_factory=list)
    errors: list[PragError] = field(default_factory=list)
    recipe: Recipe | None = None
    layout: LoraLayout | None = None

    def check(self, name: str, look: Callable[[], tuple[str, T]]) -> T | None:
        """Note what `look` says; where it raises a `PragError`, note that, and return None."""
        begun = time.perf_counter()
        try:
            detail, result = look()
        except PragError as error:
            self.errors.append(error)
            self.findings.append(CheckResult(name, "failed", error.message, error.remedy))
            return None
        self.findings.append(CheckResult(name, "ok", f"{detail} ({(time.perf_counter() - begun) * 1000:.0f} ms)"))
        return result

    def note(self, findings: list[CheckResult]) -> None:
        """Take findings about nodes."""
        self.findings += findings
        for finding in findings:
            if finding.outcome == "failed":
                where = f" on {finding.where}" if finding.where else ""
                self.errors.append(PragError(f"{finding.check}{where}: {finding.detail}", finding.remedy))

    def summary(self) -> str:
        """Say in a line or two what was checked, and all of what was not."""
        counts = Counter(finding.outcome for finding in self.findings)
        lines = [f"preflight: {counts['ok']} checks passed"]
        for finding in self.findings:
            if finding.outcome in ("skipped", "warning"):
                remedy = f"; {finding.remedy}" if finding.remedy else ""
                lines.append(f"preflight: {finding.check} {finding.outcome}: {finding.detail}{remedy}")
        return "\n".join(lines)

    def described(self) -> tuple[Recipe, LoraLayout]:
        """Return the recipe and the layout, or raise all that is wrong.

        Raises:
            PragError: the one that was found, as it was raised.
            PreflightError: naming all, when there are several.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            listed = "\n".join(f"- {error}" for error in self.errors)
            raise PreflightError(f"{len(self.errors)} things are wrong:\n{listed}", "mend them all, and run again")
        assert self.recipe is not None
        assert self.layout is not None
        return self.recipe, self.layout


def ask_node(config: Config, probe: str) -> list[CheckResult]:
    """Run on each node: what only it can know. Nothing is loaded, converted or fetched."""
    found = PreflightReport()

    def store() -> tuple[str, None]:
        opened = open_store(config)
        if opened.get_if_exists(probe) != probe.encode():
            raise StoreError(
                f"store = {config.store!r} is another one there than where the job starts",
                "take s3://, or a folder that every node mounts under the same absolute path",
            )
        opened.check_writable()
        return "the same store, writable", None

    def inputs() -> tuple[str, None]:
        list_files(config.corpus)
        file = config.augment.import_file
        if file:
            fs, path = url_to_fs(local_path(file))
            if not fs.exists(path):
                raise InputError(f"augment.import_file = {file!r}: no such file", "put it where every node sees it")
        return "readable", None

    if probe:
        found.check("store", store)
    found.check("inputs", inputs)
    found.check("model", lambda: (find_model(config.model.name), None))
    kind = index_kind(config.index)
    found.check(kind.REQUIREMENT, lambda: (kind.find_requirement(), None))
    return [replace(finding, detail=finding.detail.split(" (")[0]) for finding in found.findings]
