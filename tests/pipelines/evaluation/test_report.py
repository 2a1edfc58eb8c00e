"""The report for people: tables on the terminal, and the HTML page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from pipelines.evaluation.report import html_page, print_report, write_report
from prag_core.evaluation.plan import Column
from prag_core.evaluation.summary import summarize
from tests.helpers.evaluations import evaluation, report


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_self_contained_and_always_the_same(tmp_path: Path) -> None:
    made = report()
    page = html_page(made)
    assert page == html_page(json.loads(json.dumps(made)))
    parsed = _Page()
    parsed.feed(page)
    assert parsed.names.count("svg") == 4  # modes, differences, latency, types; one k draws no curve
    assert {link for link in parsed.links if not link.startswith("#")} == set()
    assert "Question 1 &lt;b&gt;?" in page
    told = ("20260101T000000-ab", "recall ab", "prag evaluate --dataset invented", "random", "weights hold")
    for text in told:
        assert text in page
    assert page.index("The weights hold") < page.index("<svg") < page.index("<table")
    cells = "</th><td>+0.333</td><td>+0.167 … +0.500</td><td>+0.667</td><td>+0.500 … +1.000</td>"
    assert f'<th scope="row">prag − closed{cells}' in page
    assert "each passage has an adapter" in page
    whole = replace(evaluation(), replies={id: replace(r, notes=()) for id, r in evaluation().replies.items()})
    assert "with an adapter" not in html_page(summarize(whole, {"name": "x"}, ""))
    assert not re.search(r"url\((?!#)", page)
    write_report(made, tmp_path / "deep" / "report")
    assert json.loads((tmp_path / "deep" / "report" / "report.json").read_text(encoding="utf-8")) == made


def test_a_log_gets_whole_numbers() -> None:
    made = report()
    made["columns"] |= {f"combine_mean_{i}": made["columns"]["prag"] for i in range(9)}
    for kind in made["types"].values():
        kind["f1"] |= dict.fromkeys(made["columns"], 0.5)
    made["with_adapters"]["f1"] |= dict.fromkeys(made["columns"], 0.5)
    log = io.StringIO()
    print_report(made, Console(file=log))
    lines = log.getvalue().splitlines()
    assert not [line for line in lines if re.search(r"\S…", line)]
    (row,) = [line.split() for line in lines if "combine_mean_8" in line and line.count("0.500") == 3]
    assert row[1] == "combine_mean_8"


def test_auto_is_a_column_of_the_page() -> None:
    plain = evaluation()
    chosen = Column("auto", "auto", 1, plain.plan.weights[0])
    ids = {**plain.request_ids, "auto": plain.request_ids["prag"]}
    made = summarize(replace(plain, columns=(*plain.columns, chosen), request_ids=ids), {"name": "x"}, "")
    page = html_page(made)
    assert made["columns"]["auto"]["f1"] == made["columns"]["prag"]["f1"]
    assert '<th scope="row">auto − prag</th><td>+0.000</td>' in page
    assert "the mode that the snapshot" in page
    assert "the mode that the snapshot" not in html_page(report())


def test_f1_against_k_is_drawn() -> None:
    plain = evaluation()
    more = Column("prag_k3", "prag", 3, plain.plan.weights[0])
    both = replace(
        plain, columns=(*plain.columns, more), request_ids={**plain.request_ids, "prag_k3": plain.request_ids["prag"]}
    )
    assert html_page(summarize(both, {"name": "x"}, "")).count("<svg") == 5
