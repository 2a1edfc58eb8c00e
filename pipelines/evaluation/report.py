"""A report for people: tables on the terminal, and one self-contained HTML page."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prag_core.evaluation.summary import STEPS

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}th,td{padding:.25em .7em;border-bottom:1px solid #ddd;"
    "text-align:right;vertical-align:top}th:first-child,td:first-child{text-align:left}"
    ".text td{text-align:left}svg{max-width:100%;height:auto}code,pre{background:#f4f4f4;padding:.1em .3em;"
    "white-space:pre-wrap}details{margin:1em 0}.good{color:#176b2c}.bad{color:#a11}"
)
_LOG_WIDTH = 200
_Rows = list[list[str]]


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.html` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(html_page(report), encoding="utf-8")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    if not console.is_terminal:
        # A log has no width of its own. Rich would take 80 columns and cut numbers off.
        console = Console(file=console.file, width=_LOG_WIDTH, markup=False, emoji=False)
    for title, head, rows in _tables(report):
        table = Table(title=title)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def html_page(report: Mapping[str, Any]) -> str:
    """Return the page: the report's origin, tables, plots as SVG, and examples."""
    origin = f"snapshot <code>{_e(report['snapshot']['id'])}</code>"
    if "recipe" in report:
        origin += f", recipe <code>{_e(report['recipe']['train']['name'])} {_e(report['recipe']['fingerprint'])}</code>"
    if "server" in report:
        origin += f", server <code>{_e(report['server'])}</code>"
    parts = [
        f"<h1>Evaluation: {_e(report['dataset']['name'])}</h1>",
        f"<p>{report['dataset']['asked']} questions, {origin}, retrieval {_e(report['plan']['retrieval'])}</p>"
        f"<pre>{_e(report['command'])}</pre>",
    ]
    for title, head, rows in _tables(report):
        parts.append(f"<h2>{_e(title)}</h2>{_html_table(head, rows)}")
    parts += [f"<h2>{_e(title)}</h2>{svg}" for title, svg in _plots(report)]
    for examples in report["examples"]:
        for outcome in ("won", "lost"):
            parts.append(f"<h2>{_e(examples['left'])} {outcome} against {_e(examples['right'])}</h2>")
            parts.append(_examples(examples[outcome]) if examples[outcome] else "<p>None.</p>")
    recipe = json.dumps(report.get("recipe", {}), indent=1, ensure_ascii=False)
    plan = json.dumps(report["plan"], indent=1, ensure_ascii=False)
    parts.append(f"<details><summary>Recipe and plan</summary><pre>{_e(recipe)}\n{_e(plan)}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Evaluation</title><style>{_STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


# ---- tables


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], _Rows]]:
    """Return the tables of the report, each as its title, its head and its rows of texts."""
    columns: Mapping[str, Any] = report["columns"]
    judged = any("judge" in column for column in columns.values())
    head = ["", "F1", "95 %", "EM", "contains", "paper F1", *(["judge"] if judged else []), "ms", "prompt tokens"]
    rows = [
        [
            name,
            f"{c['f1']:.3f}",
            "{:.3f} … {:.3f}".format(*c["f1_interval"]),
            f"{c['em']:.3f}",
            f"{c['contains']:.3f}",
            f"{c['paper_f1']:.3f}",
            *([f"{c['judge']:.3f}"] if judged else []),
            f"{c['milliseconds']['total']:.0f}",
            f"{c['prompt_tokens']:.0f}",
        ]
        for name, c in columns.items()
    ]
    asked = report["dataset"]["asked"]
    tables = [(f"{asked} questions", head, rows)]
    # A passage without an adapter went into the prompt. If there are any, the other questions are shown separately.
    kept = report["with_adapters"]
    apart = kept["n"] < asked
    differences = _f1_differences(report["differences"])
    if differences:
        head = ["", "F1", "95 %", *([f"F1 of the {kept['n']} with an adapter", "95 %"] if apart else [])]
        beside = _f1_differences(kept["differences"]) if apart else {}
        rows = [[name, *cells, *beside.get(name, [])] for name, cells in differences.items()]
        tables.append(("Differences of F1, paired bootstrap", head, rows))
    kinds = dict(report["types"]) if len(report["types"]) > 1 else {}
    if apart:
        kinds["each passage has an adapter"] = kept
    if 0 < report["rag_wrong"]["n"] < asked:
        kinds["rag answers wrongly, F1 below .5"] = report["rag_wrong"]
    if kinds:
        rows = [
            [f"{kind} ({scores['n']})", *(f"{scores['f1'][name]:.3f}" for name in columns)]
            for kind, scores in kinds.items()
        ]
        head = ["", *columns]
        if len(kinds) < len(columns):  # transposed, the table is narrower
            head, *rows = map(list, zip(head, *rows, strict=True))
        tables.append(("F1 by question type", head, rows))
    rows = [[name, *(f"{c['milliseconds'][step]:.1f}" for step in STEPS)] for name, c in columns.items()]
    tables.append(("Milliseconds an answer, in batches", ["", *STEPS], rows))
    if report["retrieval"]["n"]:
        found = report["retrieval"]
        rows = [[k, f"{value:.3f}", f"{found['any'][k]:.3f}"] for k, value in found["recall"].items()]
        tables.append(("Retrieval of gold passages", ["k", "recall", "any"], rows))
    odd = [
        [name, str(c["without_adapter"]), str(c["failed"])]
        for name, c in columns.items()
        if c["without_adapter"] or c["failed"]
    ]
    if odd:
        head = ["", "answers with a passage that had no adapter", "failed"]
        tables.append(("Not as planned", head, odd))
    return tables


def _f1_differences(differences: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return two cells for each difference of F1, its mean and its interval, by the name of the difference."""
    return {
        f"{d['left']} − {d['right']}": [f"{d['mean']:+.3f}", f"{d['low']:+.3f} … {d['high']:+.3f}"]
        for d in differences
        if d["metric"] == "f1"
    }


def _html_table(head: Sequence[str], rows: _Rows, style: str = "") -> str:
    top = "".join(f"<th>{_e(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{style}"><tr>{top}</tr>{body}</table>'


def _examples(items: Sequence[Mapping[str, Any]]) -> str:
    head = ["question", "accepted", *items[0]["texts"]]
    rows = [[item["question"], "; ".join(item["answers"]), *item["texts"].values()] for item in items]
    return _html_table(head, rows, "text")


def _e(text: Any) -> str:
    return html.escape(str(text))


# ---- plots


def _plots(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the plots as (title, SVG); the same report always gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    columns: Mapping[str, Any] = report["columns"]
    plots = []

    def new_axes(height: float = 4.0) -> Any:
        # Not pyplot, which has global state and looks for a display.
        return Figure(figsize=(8, height)).subplots()

    def draw(title: str, axes: Any, x_label: str, y_label: str = "F1") -> None:
        axes.set_xlabel(x_label)
        if y_label:
            axes.set_ylabel(y_label)
            axes.set_ylim(bottom=0)
        axes.figure.tight_layout()
        sink = io.StringIO()
        axes.figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
        plots.append((title, sink.getvalue().partition("?>")[2].partition(">")[2]))

    # The salt fixes the ids in the SVG.
    with matplotlib.rc_context({"svg.hashsalt": "prag", "svg.fonttype": "none", "font.size": 9}):
        # 1. Modes and controls, with intervals.
        axes = new_axes(0.4 * len(columns) + 0.9)
        names = list(columns)[::-1]
        f1 = [columns[name]["f1"] for name in names]
        low = [max(0.0, columns[name]["f1"] - columns[name]["f1_interval"][0]) for name in names]
        high = [max(0.0, columns[name]["f1_interval"][1] - columns[name]["f1"]) for name in names]
        colours = ["#b8b8b8" if columns[name]["control"] else "#4878a8" for name in names]
        axes.barh(names, f1, xerr=[low, high], color=colours, capsize=3)
        draw("Modes and controls", axes, "F1, 95 % interval (grey: controls)", "")

        # 2. F1 against latency.
        axes = new_axes()
        for name, column in columns.items():
            point = (column["milliseconds"]["total"], column["f1"])
            axes.plot(*point, "o", color="#999999" if column["control"] else "#4878a8")
            axes.annotate(name, point, xytext=(4, 4), textcoords="offset points")
        draw("F1 against latency", axes, f"milliseconds an answer ({', '.join(STEPS)})")

        # 3. F1 against k.
        by_k = {
            mode: sorted((c["top_k"], c["f1"]) for c in columns.values() if _varies_k(c, mode, report))
            for mode in ("rag", "prag", "combine")
        }
        if any(len(points) > 1 for points in by_k.values()):
            axes = new_axes()
            for mode, points in by_k.items():
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", label=mode)
            axes.set_xticks(sorted({k for points in by_k.values() for k, _ in points}))
            axes.legend()
            draw("F1 against k", axes, "k, passages retrieved")

        # 4. F1 by question type.
        kinds = report["types"]
        if len(kinds) > 1:
            axes = new_axes()
            width = 0.8 / len(columns)
            for i, name in enumerate(columns):
                places = [j + (i - len(columns) / 2 + 0.5) * width for j in range(len(kinds))]
                axes.bar(places, [kind["f1"][name] for kind in kinds.values()], width, label=name)
            axes.set_xticks(range(len(kinds)), [f"{kind} ({scores['n']})" for kind, scores in kinds.items()])
            axes.legend(fontsize=7, ncols=4)
            draw("F1 by question type", axes, "")
    return plots


def _varies_k(column: Mapping[str, Any], mode: str, report: Mapping[str, Any]) -> bool:
    plan = report["plan"]
    asked = (column["mode"], column["control"], column["weights"], column["strength"])
    return asked == (mode, "", plan["weights"][0], plan["strengths"][0] if mode == "combine" else 1.0)
