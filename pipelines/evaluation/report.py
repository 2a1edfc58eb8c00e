"""The report of an evaluation for people: tables on the terminal, and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.report_page import (
    COLOURS,
    CONTROL_COLOUR,
    Plot,
    escape,
    glossary,
    page,
    plotting,
    section,
    table,
)
from pipelines.words import counted, duration
from prag_core.evaluation.conclusions import conclusions
from prag_core.evaluation.summary import STEPS
from prag_core.records import ASKED_MODES

_LOG_WIDTH = 200
_Rows = list[list[str]]
_CONTROL_TERMS = {
    "wrong": "prag with the adapter of another passage: what it gains is form, not knowledge",
    "random": "prag with random factors of the same size",
    "task": "prag with an adapter that was trained on other passages, by the same recipe",
    "wrong_rag": "combine with the adapter of another passage",
    "task_rag": "combine with an adapter that was trained on other passages",
    "reader_rag": "rag with the reader, an adapter that was trained to answer from passages",
    "da_rag": "rag with the augmentations of the passages in the prompt too",
}
_TERMS = {
    "closed": "the bare model, without passages",
    "rag": "the passages in the prompt",
    "prag": "the passages' adapters in the weights, and no passage in the prompt",
    "combine": "the passages in the prompt and in the weights",
    "auto": "for each question the mode that the snapshot's thresholds choose by the scores of the search",
    **_CONTROL_TERMS,
    "F1": "words that an answer shares with the best accepted answer, from 0 to 1 (SQuAD)",
    "EM": "share of the answers that equal an accepted one (SQuAD)",
    "contains": "share of the answers in which an accepted answer occurs",
    "paper F1": "F1 as the paper's evaluator computes it",
    "95 %": "an interval by bootstrap over passages; a difference holds if it does not contain 0",
    "recall, any": "share of a question's gold passages that were found; share of the questions with at least one",
}


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
        shown = Table(title=title)
        for i, name in enumerate(head):
            shown.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


def html_page(report: Mapping[str, Any]) -> str:
    """Return the page: what is shown first, then plots, tables, examples, terms, and where all comes from."""
    said = "".join(
        f'<li class="{ {True: "good", False: "bad", None: "open"}[one.holds] }">{escape(one.text)}</li>'
        for one in conclusions(report)
    )
    asked, retrieval = counted(report["dataset"]["asked"], "question"), report["plan"]["retrieval"]
    parts = [
        f'<p class="quiet">{asked}, passages by {escape(retrieval)}, snapshot {escape(report["snapshot"]["id"])}</p>',
        f'<ul class="verdict">{said}</ul>' if said else "",
        *(section(title, svg) for title, svg in _plots(report)),
        *(section(title, table(title, head, rows)) for title, head, rows in _tables(report)),
    ]
    for examples in report["examples"]:
        for outcome in ("won", "lost"):
            title = f"{examples['left']} {outcome} against {examples['right']}"
            parts.append(section(title, _examples(title, examples[outcome]) if examples[outcome] else "<p>None.</p>"))
    parts.append(section("Terms", glossary({name: text for name, text in _TERMS.items() if _is_used(name, report)})))
    origin = [f"snapshot {report['snapshot']['id']}"]
    if "recipe" in report:
        origin.append(f"recipe {report['recipe']['train']['name']} {report['recipe']['fingerprint']}")
    if "server" in report:
        origin.append(f"server {report['server']}")
    details = json.dumps({"recipe": report.get("recipe", {}), "plan": report["plan"]}, indent=1, ensure_ascii=False)
    parts.append(
        section(
            "Origin",
            f"<p>{escape(', '.join(origin))}. The command that makes this report again:</p>"
            f"<pre>{escape(report['command'])}</pre>"
            f"<details><summary>Recipe and plan</summary><pre>{escape(details)}</pre></details>",
        )
    )
    return page(f"Evaluation: {report['dataset']['name']}", parts)


def _is_used(term: str, report: Mapping[str, Any]) -> bool:
    return term not in (*ASKED_MODES, *_CONTROL_TERMS) or term in report["columns"]


# ---- tables


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], _Rows]]:
    """Return the tables of the report, each as its title, its head and its rows of texts."""
    columns: Mapping[str, Any] = report["columns"]
    judged = any("judge" in column for column in columns.values())
    head = ["", "F1", "95 %", "EM", "contains", "paper F1", *(["judge"] if judged else []), "time", "prompt tokens"]
    rows = [
        [
            name,
            f"{c['f1']:.3f}",
            "{:.3f} … {:.3f}".format(*c["f1_interval"]),
            f"{c['em']:.3f}",
            f"{c['contains']:.3f}",
            f"{c['paper_f1']:.3f}",
            *([f"{c['judge']:.3f}"] if judged else []),
            duration(c["milliseconds"]["total"] / 1e3),
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
    if "auto" in report:
        tables += _auto_tables(report["auto"])
    odd = [
        [name, str(c["without_adapter"]), str(c["failed"])]
        for name, c in columns.items()
        if c["without_adapter"] or c["failed"]
    ]
    if odd:
        head = ["", "answers with a passage that had no adapter", "failed"]
        tables.append(("Not as planned", head, odd))
    return tables


def _auto_tables(fit: Mapping[str, Any]) -> list[tuple[str, list[str], _Rows]]:
    """Return what `auto` reaches beside each single mode, and the thresholds."""
    head = ["", "F1", "95 %", "time", "of combine's", "chosen by auto"]
    rows = [
        [
            name,
            f"{score['f1']:.3f}",
            f"{score['low']:.3f} … {score['high']:.3f}",
            duration(score["milliseconds"] / 1e3),
            f"{score['time_share']:.0%}",
            f"{fit['chosen'][name]:.0%}" if name in fit["chosen"] else "",
        ]
        for name, score in {**fit["modes"], "auto": fit["auto"]}.items()
    ]
    title = f"auto, cross-validated in {fit['folds']} folds: {counted(fit['n'], 'question')}, all times with the search"
    thresholds = [[name, f"{value}"] for name, value in fit["route"].items()]
    return [(title, head, rows), ("Thresholds of auto, fitted to all these questions", ["", "value"], thresholds)]


def _f1_differences(differences: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return two cells for each difference of F1, its mean and its interval, by the name of the difference."""
    return {
        f"{d['left']} − {d['right']}": [f"{d['mean']:+.3f}", f"{d['low']:+.3f} … {d['high']:+.3f}"]
        for d in differences
        if d["metric"] == "f1"
    }


def _examples(title: str, items: Sequence[Mapping[str, Any]]) -> str:
    head = ["question", "accepted", *items[0]["texts"]]
    rows = [[item["question"], "; ".join(item["answers"]), *item["texts"].values()] for item in items]
    return table(title, head, rows, "text")


# ---- plots


def _plots(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the plots as (title, SVG); the same report always gives the same bytes."""
    columns: Mapping[str, Any] = report["columns"]
    plots: list[Plot] = []

    def new_axes(title: str, height: float, x_label: str, y_label: str = "") -> Any:
        plot = Plot(title, height)
        plots.append(plot)
        plot.axes.set_xlabel(x_label)
        plot.axes.set_ylabel(y_label)
        return plot.axes

    with plotting():
        # 1. Modes and controls, with intervals.
        axes = new_axes("Modes and controls", 0.4 * len(columns) + 0.9, "F1, with 95 % interval (grey: controls)")
        names = list(columns)[::-1]
        f1 = [columns[name]["f1"] for name in names]
        low = [max(0.0, columns[name]["f1"] - columns[name]["f1_interval"][0]) for name in names]
        high = [max(0.0, columns[name]["f1_interval"][1] - columns[name]["f1"]) for name in names]
        colours = [_colour(columns[name]) for name in names]
        axes.barh(names, f1, xerr=[low, high], color=colours, ecolor="#000000", capsize=3)
        axes.set_xlim(0, 1)

        # 2. The claims: differences with their intervals.
        claims = [d for d in report["differences"] if d["metric"] == "f1"][::-1]
        if claims:
            axes = new_axes("Differences", 0.4 * len(claims) + 0.9, "F1, with 95 % interval")
            for row, claim in enumerate(claims):
                colour = COLOURS.get(claim["left"], CONTROL_COLOUR)
                axes.plot([claim["low"], claim["high"]], [row, row], color=colour, linewidth=3)
                axes.plot(claim["mean"], row, "o", color=colour)
            axes.set_yticks(range(len(claims)), [f"{claim['left']} − {claim['right']}" for claim in claims])
            axes.axvline(0, color="#000000", linewidth=1)

        # 3. F1 against latency.
        axes = new_axes("F1 against latency", 3.5, "seconds an answer", "F1")
        for name, column in columns.items():
            point = (column["milliseconds"]["total"] / 1e3, column["f1"])
            axes.plot(*point, "o", color=_colour(column))
            axes.annotate(name, point, xytext=(4, 4), textcoords="offset points")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)

        # 4. F1 against k.
        by_k = {
            mode: sorted((c["top_k"], c["f1"]) for c in columns.values() if _varies_k(c, mode, report))
            for mode in ("rag", "prag", "combine")
        }
        if any(len(points) > 1 for points in by_k.values()):
            axes = new_axes("F1 against k", 4.0, "k, passages retrieved", "F1")
            for mode, points in by_k.items():
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", label=mode, color=COLOURS[mode])
            axes.set_xticks(sorted({k for points in by_k.values() for k, _ in points}))
            axes.set_ylim(0, 1)
            axes.legend(frameon=False)

        # 5. F1 by question type: the modes alone, or the bars would be too many to tell apart.
        kinds, modes = report["types"], [name for name in ASKED_MODES if name in columns]
        if len(kinds) > 1 and modes:
            axes = new_axes("F1 by question type", 4.0, "", "F1")
            width = 0.8 / len(modes)
            for i, name in enumerate(modes):
                places = [j + (i - len(modes) / 2 + 0.5) * width for j in range(len(kinds))]
                axes.bar(places, [kind["f1"][name] for kind in kinds.values()], width, label=name, color=COLOURS[name])
            axes.set_xticks(range(len(kinds)), [f"{kind} ({scores['n']})" for kind, scores in kinds.items()])
            axes.set_ylim(0, 1)
            axes.legend(frameon=False, ncols=2)
        return [(plot.title, plot.svg()) for plot in plots]


def _colour(column: Mapping[str, Any]) -> str:
    return CONTROL_COLOUR if column["control"] else COLOURS[column["mode"]]


def _varies_k(column: Mapping[str, Any], mode: str, report: Mapping[str, Any]) -> bool:
    plan = report["plan"]
    asked = (column["mode"], column["control"], column["weights"], column["strength"])
    return asked == (mode, "", plan["weights"][0], plan["strengths"][0] if mode == "combine" else 1.0)
