"""From replies to a report: scores with intervals, differences, question types, costs, examples won and lost.

The report is plain data. The same replies always give the same report.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prag_core.data.questions import Question
from prag_core.evaluation import metrics
from prag_core.evaluation.metrics import paired_bootstrap, recall_at_k
from prag_core.evaluation.plan import Column, EvaluationPlan, EvaluationReply

_Answers = Sequence[str]


def _as_paper(metric: Callable[..., float], reply: EvaluationReply, answers: _Answers) -> float:
    return metric(reply.reasoning or reply.text, answers, chain_of_thought=bool(reply.reasoning))


METRICS: dict[str, Callable[[EvaluationReply, _Answers], float]] = {
    "f1": lambda reply, answers: metrics.f1(reply.text, answers),
    "em": lambda reply, answers: metrics.exact_match(reply.text, answers),
    "contains": lambda reply, answers: metrics.contains_answer(reply.text, answers),
    "hotpot_f1": lambda reply, answers: metrics.hotpot_f1(reply.text, answers),
    "paper_f1": lambda reply, answers: _as_paper(metrics.paper_f1, reply, answers),
    "paper_em": lambda reply, answers: _as_paper(metrics.paper_exact_match, reply, answers),
}
# The claims that an evaluation tests, as differences of columns. A report has those whose columns were asked.
DIFFERENCES = (
    *(("prag", other) for other in ("closed", "wrong", "random", "task")),
    *(("combine", other) for other in ("rag", "task_rag", "wrong_rag", "reader_rag", "da_rag")),
    ("task_rag", "rag"),
    *(("auto", other) for other in ("prag", "combine")),
)
_EXAMPLES = 5
# An answer with a lower F1 counts as wrong.
_RIGHT = 0.5
STEPS = ("retrieve", "fetch", "prompt", "inject", "prefill", "decode")


@dataclass(frozen=True)
class Evaluation:
    """All that was asked and answered.

    `gold`, `retrieved`, `retrieve_ms` and `hit_scores` have one entry for each question.
    """

    origin: Mapping[str, Any]  # who answered, as the report says it: the snapshot and the recipe, or the server
    plan: EvaluationPlan
    questions: tuple[Question, ...]
    left_out: Mapping[str, int]  # the number of questions that were not asked, by reason
    columns: tuple[Column, ...]
    gold: tuple[tuple[str, ...], ...]  # keys
    retrieved: tuple[tuple[str, ...], ...]  # keys, best first
    retrieve_ms: tuple[float, ...]
    request_ids: Mapping[str, Sequence[Sequence[str]]]  # by column: for each question, one id for each seed
    replies: Mapping[str, EvaluationReply]  # by a request's id
    verdicts: Mapping[tuple[str, str], float] | None = None  # a judge's scores, by the ids of question and request
    hit_scores: tuple[tuple[float, ...], ...] = ()  # the scores of `retrieved`; none where a server answered

    @property
    def groups(self) -> list[str]:
        """The group of each question for the bootstrap: its first gold passage, or the question itself without one."""
        return [gold[0] if gold else f"question {q.id}" for gold, q in zip(self.gold, self.questions, strict=True)]

    def scores(self, column: str, metric: str) -> list[float]:
        """Return each question's score in a column, averaged over its seeds."""
        scored = []
        for question, ids in zip(self.questions, self.request_ids[column], strict=True):
            if metric == "judge":
                values = [(self.verdicts or {})[question.id, id] for id in ids]
            else:
                # An empty text equals an answer of articles only, such as "The", but a failed reply is never right.
                replies = [self.replies[id] for id in ids]
                values = [0.0 if reply.failed else METRICS[metric](reply, question.answers) for reply in replies]
            scored.append(_mean(values))
        return scored

    @property
    def with_adapters(self) -> list[int]:
        """The positions of the questions for which `prag` and `combine` used an adapter of every passage."""
        own = [self.request_ids[c.name] for c in self.columns if not c.control and c.mode in ("prag", "combine")]
        return [
            i for i in range(len(self.questions)) if not any(self.replies[id].notes for ids in own for id in ids[i])
        ]


def summarize(
    evaluation: Evaluation, dataset: Mapping[str, Any], command: str, auto: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the report of an evaluation as plain values, numbers rounded to four digits.

    `dataset` is what the report says about the set of questions; `command` would make the report again.
    `auto` is a fit of the mode `auto`, an `AutoFit` as plain values.
    """
    names = [column.name for column in evaluation.columns]
    metric_names = [*METRICS, *(["judge"] if evaluation.verdicts is not None else [])]
    scores = {name: {metric: evaluation.scores(name, metric) for metric in metric_names} for name in names}
    groups = evaluation.groups
    report = {
        "command": command,
        "dataset": {**dataset, "asked": len(evaluation.questions), "left_out": dict(evaluation.left_out)},
        **evaluation.origin,
        "plan": asdict(evaluation.plan),
        "columns": {
            column.name: {
                **asdict(column),
                **_column(evaluation, column, scores[column.name], groups),
            }
            for column in evaluation.columns
        },
        "differences": _differences(scores, groups),
        # A passage without an adapter goes into the prompt, so the other questions say less about adapters.
        "with_adapters": _subset(evaluation.with_adapters, scores, groups),
        # Where reading is not enough, an adapter can help most. As `rag` chose them, no difference from it counts.
        "rag_wrong": _subset(_wrong(scores.get("rag")), scores, groups),
        "types": _types(evaluation, scores),
        "retrieval": _retrieval(evaluation),
        "examples": [
            _examples(evaluation, left, right, scores, groups)
            for left, right in (("prag", "closed"), ("combine", "rag"))
            if left in scores and right in scores
        ],
    }
    if auto is not None:
        report["auto"] = auto
    rounded: dict[str, Any] = _rounded(report)
    return rounded


def summary_line(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of a report for scripts: n, F1 by column, and the differences with their intervals."""
    chosen = {f"{d['left']}_{d['right']}": d for d in report["differences"] if d["metric"] == "f1"}
    auto = {"auto": report["auto"]} if "auto" in report else {}
    return {
        **auto,
        "n": report["dataset"]["asked"],
        "f1": {name: column["f1"] for name, column in report["columns"].items()},
        "delta": {name: d["mean"] for name, d in chosen.items()},
        "ci": {name: [d["low"], d["high"]] for name, d in chosen.items()},
    }


def _column(
    evaluation: Evaluation, column: Column, scores: Mapping[str, list[float]], groups: Sequence[str]
) -> dict[str, Any]:
    replies = [evaluation.replies[id] for ids in evaluation.request_ids[column.name] for id in ids]
    _, low, high = paired_bootstrap(scores["f1"], [0.0] * len(groups), groups)
    searched = column.mode != "closed" and evaluation.plan.retrieval == "bm25"
    per_step = {
        "retrieve": list(evaluation.retrieve_ms) if searched else [0.0],
        **{step: [getattr(reply, f"{step}_ms") for reply in replies] for step in STEPS[1:]},
    }
    milliseconds = {step: _mean(values) for step, values in per_step.items()}
    return {
        **{metric: _mean(values) for metric, values in scores.items()},
        "f1_interval": [low, high],
        "milliseconds": {**milliseconds, "total": sum(milliseconds.values())},
        "prompt_tokens": _mean([reply.prompt_tokens for reply in replies]),
        "new_tokens": _mean([reply.new_tokens for reply in replies]),
        "without_adapter": sum(bool(reply.notes) for reply in replies),
        "failed": sum(bool(reply.failed) for reply in replies),
    }


def _differences(scores: Mapping[str, Mapping[str, Sequence[float]]], groups: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for left, right in DIFFERENCES:
        if left in scores and right in scores:
            for metric in ("f1", "paper_f1"):
                mean, low, high = paired_bootstrap(scores[left][metric], scores[right][metric], groups)
                found.append({"left": left, "right": right, "metric": metric, "mean": mean, "low": low, "high": high})
    return found


def _wrong(scores: Mapping[str, Sequence[float]] | None) -> list[int]:
    """Return the positions of the questions that a column answers wrongly."""
    return [i for i, score in enumerate(scores["f1"]) if score < _RIGHT] if scores else []


def _subset(
    chosen: Sequence[int], scores: Mapping[str, Mapping[str, Sequence[float]]], groups: Sequence[str]
) -> dict[str, Any]:
    """Return the scores and differences of the questions at these positions."""
    kept = {
        name: {metric: [values[i] for i in chosen] for metric, values in by_metric.items()}
        for name, by_metric in scores.items()
    }
    return {
        "n": len(chosen),
        "f1": {name: _mean(by_metric["f1"]) for name, by_metric in kept.items()},
        "differences": _differences(kept, [groups[i] for i in chosen]) if chosen else [],
    }


def _types(evaluation: Evaluation, scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    counts = Counter(question.type for question in evaluation.questions)
    return {
        kind or "(none)": {
            "n": count,
            "f1": {
                name: _mean([s for s, q in zip(by_metric["f1"], evaluation.questions, strict=True) if q.type == kind])
                for name, by_metric in scores.items()
            },
        }
        for kind, count in sorted(counts.items())
    }


def _retrieval(evaluation: Evaluation) -> dict[str, Any]:
    """Return recall at several k, averaged over the questions with gold passages; `any` is the share with a hit."""
    pairs = [(found, gold) for found, gold in zip(evaluation.retrieved, evaluation.gold, strict=True) if gold]
    if not pairs:
        return {"n": 0, "recall": {}, "any": {}}
    ks = sorted({1, 3, 5, *evaluation.plan.top_k})
    recalls = {k: [recall_at_k(found, gold, k) for found, gold in pairs] for k in ks}
    return {
        "n": len(pairs),
        "recall": {str(k): _mean(values) for k, values in recalls.items()},
        "any": {str(k): _mean([float(value > 0) for value in values]) for k, values in recalls.items()},
    }


def _examples(
    evaluation: Evaluation,
    left: str,
    right: str,
    scores: Mapping[str, Mapping[str, list[float]]],
    groups: Sequence[str],
) -> dict[str, Any]:
    """Return the questions with the largest gains and losses of `left` against `right`, one for each passage."""
    gains = [a - b for a, b in zip(scores[left]["f1"], scores[right]["f1"], strict=True)]

    def most(sign: int) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        seen = set()
        for i in sorted(range(len(gains)), key=lambda i: (-sign * gains[i], i)):
            if sign * gains[i] <= 0 or len(shown) == _EXAMPLES:
                break
            if groups[i] in seen:
                continue
            seen.add(groups[i])
            question = evaluation.questions[i]
            texts = {name: evaluation.replies[ids[i][0]].text for name, ids in evaluation.request_ids.items()}
            shown.append({"question": question.question, "answers": list(question.answers), "texts": texts})
        return shown

    return {"left": left, "right": right, "won": most(1), "lost": most(-1)}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
