"""Print our figures beside the paper's: the last step of docs/reproduce.md.

It takes the folders that run.py wrote, `WORK/NAME`, and prints a table in Markdown for each. All figures are F1 as the
paper's evaluator computes it (`paper_f1`). What the paper reports for a NAME is below; another name has no figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

# The columns of the paper's Table 1: set and type of question → heading.
COLUMNS = {
    "2wikimultihopqa.comparison": "2WQA compare",
    "2wikimultihopqa.bridge_comparison": "2WQA bridge",
    "2wikimultihopqa.inference": "2WQA inf.",
    "2wikimultihopqa.compositional": "2WQA compose",
    "2wikimultihopqa.total": "2WQA total",
    "hotpotqa.bridge": "HQA bridge",
    "hotpotqa.comparison": "HQA compare",
    "hotpotqa.total": "HQA total",
    "popqa.total": "PopQA",
    "cwq.total": "CWQ",
}
TOTALS = [name for name in COLUMNS if name.endswith(".total")]
# The columns of our reports → the paper's names.
MODES = {"closed": "closed", "rag": "Standard RAG", "da_rag": "DA-RAG", "prag": "P-RAG", "combine": "Combine Both"}

# Su et al., Parametric Retrieval Augmented Generation, arXiv 2501.15915v1, Table 1, in the order of COLUMNS.
TABLE_1 = {
    "llama-3.2-1b": {
        "rag": (0.4298, 0.3032, 0.2263, 0.1064, 0.2520, 0.2110, 0.4083, 0.2671, 0.1839, 0.3726),
        "da_rag": (0.3594, 0.2587, 0.2266, 0.0869, 0.2531, 0.1716, 0.3713, 0.2221, 0.2012, 0.3691),
        "prag": (0.4920, 0.3994, 0.2185, 0.1334, 0.2764, 0.1602, 0.4493, 0.1999, 0.2205, 0.3482),
        "combine": (0.5046, 0.4595, 0.2399, 0.1357, 0.3237, 0.2282, 0.4217, 0.2689, 0.2961, 0.4101),
    },
    "qwen2.5-1.5b": {
        "rag": (0.3875, 0.3884, 0.1187, 0.0568, 0.2431, 0.1619, 0.3713, 0.2073, 0.0999, 0.2823),
        "da_rag": (0.3418, 0.4015, 0.1269, 0.0514, 0.2156, 0.1182, 0.3041, 0.1683, 0.1197, 0.2718),
        "prag": (0.4529, 0.4494, 0.2072, 0.1372, 0.3025, 0.1720, 0.4623, 0.2165, 0.1885, 0.3280),
        "combine": (0.4053, 0.4420, 0.1705, 0.1154, 0.2627, 0.2383, 0.5037, 0.2942, 0.2261, 0.3495),
    },
    "llama-3-8b": {
        "rag": (0.5843, 0.4794, 0.1833, 0.0991, 0.3372, 0.1823, 0.3493, 0.2277, 0.1613, 0.3545),
        "da_rag": (0.4921, 0.3344, 0.1523, 0.0670, 0.2396, 0.1587, 0.2860, 0.1996, 0.2255, 0.3481),
        "prag": (0.6353, 0.5437, 0.2471, 0.1992, 0.3932, 0.3115, 0.6557, 0.3563, 0.2413, 0.4541),
        "combine": (0.6432, 0.5556, 0.3160, 0.2339, 0.4258, 0.4025, 0.6918, 0.4559, 0.3059, 0.4728),
    },
}
# P-RAG in the order of TOTALS: Table 2, adapters that start from a warm-up, and Table 3, another augmenting model.
TABLES_2_AND_3 = {
    "llama-3.2-1b-warm": (0.3546, 0.2456, 0.2035, 0.4263),
    "qwen2.5-1.5b-warm": (0.3542, 0.2718, 0.2418, 0.5018),
    "llama-3-8b-warm": (0.4201, 0.4499, 0.2952, 0.5591),
    "llama-3.2-1b-by-qwen2.5-1.5b": (0.2753, 0.1980, 0.2340, 0.3495),
    "llama-3.2-1b-by-llama-3-8b": (0.2748, 0.1935, 0.2207, 0.3498),
    "qwen2.5-1.5b-by-llama-3.2-1b": (0.2974, 0.2005, 0.1829, 0.3183),
    "qwen2.5-1.5b-by-llama-3-8b": (0.2948, 0.2161, 0.2156, 0.3211),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="WORK/NAME", help="folders that run.py wrote")
    for folder in parser.parse_args().folders:
        ours, asked = read_reports(folder / "reports")
        print(f"{table(folder.resolve().name, ours, asked)}\n")


def paper_figures(name: str) -> dict[str, dict[str, float]]:
    """Return what the paper reports for an experiment, by mode and column; nothing where it reports nothing."""
    if name in TABLES_2_AND_3:
        return {"prag": dict(zip(TOTALS, TABLES_2_AND_3[name], strict=True))}
    return {mode: dict(zip(COLUMNS, row, strict=True)) for mode, row in TABLE_1.get(name, {}).items()}


def read_reports(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Return our F1 by mode and column, and the number of questions by column, of the reports that are there."""
    ours: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    asked = {}
    for column in COLUMNS:
        file = folder / column / "report.json"
        if file.exists():
            report = json.loads(file.read_text(encoding="utf-8"))
            asked[column] = report["dataset"]["asked"]
            for mode in MODES:
                if mode in report["columns"]:
                    ours[mode][column] = report["columns"][mode]["paper_f1"]
    if not asked:
        sys.exit(f"{folder}: holds no report of run.py, such as popqa.total/report.json")
    return ours, asked


def table(name: str, ours: Mapping[str, Mapping[str, float]], asked: Mapping[str, int]) -> str:
    """Return the table of an experiment: two rows a mode, the paper's and ours, and last the mean of the totals."""
    rows = [[name, *COLUMNS.values(), "mean of the totals"], ["---"] * (len(COLUMNS) + 2)]
    rows.append(["questions", *(str(asked.get(column, "")) for column in COLUMNS), ""])
    paper = paper_figures(name)
    for mode, title in MODES.items():
        for who, figures in (("paper", paper.get(mode, {})), ("here", ours.get(mode, {}))):
            if figures:
                rows.append([f"{title}, {who}", *(_shown(figures.get(column)) for column in COLUMNS), _mean(figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean(figures: Mapping[str, float]) -> str:
    totals = [figures[column] for column in TOTALS if column in figures]
    return _shown(fmean(totals) if len(totals) == len(TOTALS) else None)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
