"""The preflight report, and the checks that run on each node.

This file loads no torch: it would cost each node seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from cluster.preflight import CheckResult
from pipelines.settings import augmenting_model
from pipelines.words import counted
from prag_core.config import Config
from prag_core.data.corpus import Piece, has_made_id, read_first_records
from prag_core.data.files import check_readable
from prag_core.data.listing import list_files
from prag_core.errors import PragError, PreflightError, StoreError
from prag_core.llm.checkpoint import find_model
from prag_core.records import Reject
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import open_store

if TYPE_CHECKING:
    from prag_core.llm.layout import LoraLayout


T = TypeVar("T")


@dataclass
class PreflightReport:
    """What the checks have found so far; `layout` is set once the model and the recipe are known to fit."""

    findings: list[CheckResult] = field(default_factory=list)
    errors: list[PragError] = field(default_factory=list)
    layout: LoraLayout | None = None

    def check(self, name: str, run: Callable[[], tuple[str, T]]) -> T | None:
        """Run a check that returns a detail and a result, record the detail and return the result.

        If it raises a `PragError`, record that and return None.
        """
        begun = time.perf_counter()
        try:
            detail, result = run()
        except PragError as error:
            self.errors.append(error)
            self.findings.append(CheckResult(name, "failed", error.message, error.remedy))
            return None
        duration_ms = (time.perf_counter() - begun) * 1000
        self.findings.append(CheckResult(name, "ok", detail, duration_ms=duration_ms))
        return result

    def add(self, findings: list[CheckResult]) -> None:
        """Add findings about nodes; each failed one becomes an error too."""
        self.findings += findings
        for finding in findings:
            if finding.outcome == "failed":
                where = f" on {finding.where}" if finding.where else ""
                self.errors.append(PragError(f"{finding.check}{where}: {finding.detail}", finding.remedy))

    def summary(self) -> str:
        """Return the number of checks that passed, and a line for each that was skipped or gave a warning."""
        counts = Counter(finding.outcome for finding in self.findings)
        lines = [f"preflight: {counted(counts['ok'], 'check')} passed"]
        for finding in self.findings:
            if finding.outcome == "warning":
                remedy = f"; {finding.remedy}" if finding.remedy else ""
                lines.append(f"preflight: {finding.check} warning: {finding.detail}{remedy}")
            elif finding.outcome == "skipped":
                lines.append(f"{finding.check[0].upper()}{finding.check[1:]} skipped ({finding.detail}).")
        return "\n".join(lines)

    def raise_errors(self) -> None:
        """Raise if a check failed.

        Raises:
            PragError: the error of the check, if one failed.
            PreflightError: naming all errors, if several failed.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            listed = "\n".join(f"- {error}" for error in self.errors)
            raise PreflightError(f"{len(self.errors)} things are wrong:\n{listed}", "fix them all, then run again")


def check_corpus(config: Config) -> tuple[str, list[str]]:
    """List the corpus, and read the first record of each kind of file: what can be listed cannot always be read.

    Returns:
        A line about the files, and what is left out, is rejected or has no id.

    Raises:
        InputError: when the corpus cannot be listed, or such a file cannot be read.
    """
    listing = list_files(config.corpus, config.storage)
    first = read_first_records(listing.files, config.corpus, config.storage)
    warnings = [f"left out: {item}" for item in listing.left_out]
    warnings += [f"{r.source} is rejected: {r.reason}: {r.detail}" for r in first if isinstance(r, Reject)]
    made = [piece for piece in first if isinstance(piece, Piece) and has_made_id(piece)]
    column = config.corpus.columns.id
    warnings += [f"{p.file}:{p.line} has no id in the column {column!r}, so it is called {p.record_id}" for p in made]
    return counted(len(listing.files), "file"), warnings


def check_node(config: Config, probe: str) -> list[CheckResult]:
    """Run the checks that only a node can make about itself. They load and convert nothing.

    `probe` names an object in the store that holds its own name; if it is empty, the store is not checked.
    """
    report = PreflightReport()

    def store() -> tuple[str, None]:
        opened = open_store(config)
        if opened.get_if_exists(probe) != probe.encode():
            raise StoreError(
                f"store = {config.store!r} is another one there than where the job starts",
                "use s3://, or a folder that every node mounts under the same absolute path",
            )
        opened.check_writable()
        return "the same store, writable", None

    def inputs() -> tuple[str, None]:
        check_corpus(config)
        if file := config.augment.import_file:
            check_readable(file, "put it where every node sees it", config.storage)
        return "readable", None

    def model() -> tuple[str, None]:
        found = find_model(config.model.name)
        if config.augment.generator == "transformers":
            find_model(augmenting_model(config))
        return found, None

    if probe:
        report.check("store", store)
    report.check("inputs", inputs)
    report.check("model", model)
    kind = index_kind(config.index)
    report.check(kind.REQUIREMENT, lambda: (str(kind.find_requirement()), None))
    return report.findings
