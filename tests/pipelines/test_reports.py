"""The two HTML reports in a real browser: readable by everybody, on a phone, in the dark, and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.evaluation.report import html_page
from pipelines.jobs.run_report import RunFacts, run_page
from pipelines.jobs.status import RunStatus
from prag_core.records import LedgerRow, Reject
from tests.helpers.browser import Browser, open_browser
from tests.helpers.evaluations import report

pytestmark = pytest.mark.slow

STAGES = [
    {
        "stage": stage, "taken": 12, "done": 11, "earlier": 0, "rejected": {"no_usable_pair": 1}, "seconds": 90.0,
        "passages_per_s": 0.12, "bytes": 4_000_000, "extra": extra,
    }
    for stage, extra in (
        ("augment", {"pairs": {"8": 4, "12": 7}, "coverage": 0.8, "refused": {"answer not in the passage": 9}}),
        ("train", {}),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def run_facts() -> RunFacts:
    rows = tuple(
        LedgerRow(f"k{i}", "r", "d", "s", 0, 1, "c", "float32", 20, 500, 3.0, 0.1 * i, 1.5, 0.0) for i in range(9)
    )
    rejects = (Reject("augment", "no_usable_pair", "nothing that its text answers " * 9, "corpus.jsonl:7", "k"),)
    status = RunStatus("20260101T000000-ab", "finished", "2026-01-01T00:00:00+00:00", stages=STAGES)
    return RunFacts(status, "20260101T000100-cd", "s3://bucket/store", rejects, rows, 0.5, 1.25)


@pytest.mark.parametrize("name", ["evaluation", "run"])
def test_a_report_is_for_everybody_at_every_width_and_asks_for_nothing(
    browser: Browser, tmp_path: Path, name: str
) -> None:
    file = tmp_path / f"{name}.html"
    file.write_text(html_page(report()) if name == "evaluation" else run_page(run_facts()), encoding="utf-8")
    browser.hosts_asked()
    browser.chrome.get(file.as_uri())
    for width in (1280, 375):
        for dark in (False, True):
            browser.show_as(width, dark)
            browser.screenshot(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png")
            assert browser.barriers() == []
            assert browser.run("return document.documentElement.scrollWidth") <= width
            # Nothing of a plot is black on black.
            ink = browser.run("return getComputedStyle(document.querySelector('svg text')).fill")
            assert ink == browser.run("return getComputedStyle(document.body).color")
    # The verdict is read before any plot or table.
    order = browser.run("return [...document.querySelectorAll('.verdict, svg, table')].map((one) => one.tagName)")
    assert order[0] == "UL"
    assert browser.complaints() == []
    assert browser.hosts_asked() <= {"None"}
