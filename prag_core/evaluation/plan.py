"""What an evaluation asks: its plan, the columns of its table, and the requests and replies that it stores.

A request names its passages and adapters in full, and its id is the fingerprint of that content. So a stored reply is
used again by any evaluation that would ask the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from prag_core.data.questions import Question
from prag_core.errors import InputError
from prag_core.identity import fingerprint
from prag_core.records import (
    DEFAULT_COMBINE_STRENGTH,
    DEFAULT_TOP_K,
    DEFAULT_WEIGHTS,
    AskedMode,
    Hit,
    MergeRule,
    Route,
)

# The controls that a plan may name: see `prag_core.evaluation.requests`.
Control = Literal["wrong", "random", "task", "da"]
CONTROLS: tuple[Control, ...] = get_args(Control)
# The control of a column: none, a named one, or the reader alone.
ColumnControl = Literal["", "reader"] | Control
Retrieval = Literal["bm25", "oracle"]
WrongPassage = Literal["nearest", "random"]
# Raise it when the same request would get another answer.
EVALUATION_VERSION = 3


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation asks.

    The first of `top_k`, `weights` and `strengths` applies to every column. Each further value adds columns for the
    modes that it affects.
    """

    modes: tuple[AskedMode, ...] = ("closed", "rag", "prag", "combine")
    controls: tuple[Control, ...] = ()
    retrieval: Retrieval = "bm25"  # `oracle` takes the gold passages
    top_k: tuple[int, ...] = (DEFAULT_TOP_K,)  # how many passages a question retrieves
    weights: tuple[MergeRule, ...] = (DEFAULT_WEIGHTS,)
    strengths: tuple[float, ...] = (
        DEFAULT_COMBINE_STRENGTH,
    )  # the adapters' weights are multiplied by it in the mode `combine`
    reader: str = ""  # the reader that is added where passages are in the prompt, and its weight; empty for none
    route: Route | None = None  # the thresholds of the evaluated snapshot, by which `auto` chooses a mode
    wrong: WrongPassage = "nearest"  # the passage whose adapter the control `wrong` takes
    seeds: int = 3  # how many times everything random is drawn
    task_passages: int = 8  # how many passages train a task adapter
    task_rounds: int = 1  # the steps of a task adapter, as a multiple of those of one passage's adapter

    @property
    def depth(self) -> int:
        """How many passages to retrieve so that there are wrong ones among them."""
        return 2 * max(self.top_k) + 10


@dataclass(frozen=True)
class Column:
    """One way to ask every question: a column of the report's table. Scores are averaged over `seeds`."""

    name: str
    mode: AskedMode
    top_k: int
    weights: MergeRule
    control: ColumnControl = ""
    seeds: tuple[int, ...] = (0,)
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """One request. `hits` are its passages, for the prompt and for the weights; a hit's key names its adapter."""

    question: str
    mode: str
    weights: str
    hits: tuple[Hit, ...]
    strength: float = 1.0
    reader: str = ""

    @property
    def id(self) -> str:
        """The fingerprint of all that decides the answer, apart from base model, recipe and adapters."""
        content = asdict(self)
        # These fields are newer than the first stored replies: at their defaults they leave the id as it was.
        if self.strength == 1:
            del content["strength"]
        if not self.reader:
            del content["reader"]
        return fingerprint(content)


@dataclass(frozen=True, slots=True)
class EvaluationReply:
    """The stored answer to an `EvaluationRequest`; `id` is the request's."""

    id: str
    text: str = ""
    reasoning: str = ""  # all that the model wrote, if it reasons before its answer
    prompt_tokens: int = 0
    new_tokens: int = 0
    fetch_ms: float = 0.0
    prompt_ms: float = 0.0
    inject_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    notes: tuple[str, ...] = ()  # why adapters were not used
    failed: str = ""  # why there is no text


def draw(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at most `limit` random questions in their order; the same ones each time."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[i] for i in sorted(random.Random(0).sample(range(len(questions)), limit))]


def columns(plan: EvaluationPlan) -> list[Column]:
    """Return the columns of an evaluation, in the order of its table.

    Raises:
        InputError: when there are several `top_k` and the gold passages are taken, whose number is fixed, or `auto` is
            asked of the gold passages, which have no scores.
    """
    k, weights = plan.top_k[0], plan.weights[0]
    if plan.retrieval == "oracle" and len(plan.top_k) > 1:
        raise InputError("with the gold passages, top_k has no effect", "give one --top-k, or use --retrieval bm25")
    if plan.retrieval == "oracle" and "auto" in plan.modes:
        raise InputError("auto chooses by the scores of a search", "leave it out of --modes, or use --retrieval bm25")
    made = [Column(mode, mode, k, weights) for mode in plan.modes]
    for control in plan.controls:
        made += _control_columns(control, plan)
    if plan.reader and (plan.controls or "rag" in plan.modes):
        made.append(Column("reader_rag", "rag", k, weights, "reader"))
    for mode in plan.modes:
        # The thresholds of `auto` hold for the k that they were fitted to.
        if mode not in ("closed", "auto"):
            made += [Column(f"{mode}_k{other}", mode, other, weights) for other in plan.top_k[1:]]
    for mode in plan.modes:
        if mode in ("prag", "combine"):
            made += [Column(f"{mode}_{other}", mode, k, other) for other in plan.weights[1:]]
    combining = ("combine", "auto")  # `auto` may choose `combine`, and asks as it does
    made = [replace(column, strength=plan.strengths[0]) if column.mode in combining else column for column in made]
    if "combine" in plan.modes:
        made += [Column(f"combine_x{x:g}", "combine", k, weights, strength=x) for x in plan.strengths[1:]]
    return made


def _control_columns(control: Control, plan: EvaluationPlan) -> list[Column]:
    k, weights, seeds = plan.top_k[0], plan.weights[0], tuple(range(plan.seeds))
    match control:
        case "wrong":
            drawn = seeds if plan.wrong == "random" else (0,)
            return [
                Column("wrong", "prag", k, weights, control, drawn),
                Column("wrong_rag", "combine", k, weights, control, drawn),
            ]
        case "random":
            return [Column("random", "prag", k, weights, control, seeds)]
        case "task":
            return [
                Column("task", "prag", k, weights, control, seeds),
                Column("task_rag", "combine", k, weights, control, seeds),
            ]
        case "da":
            return [Column("da_rag", "rag", k, weights, control)]
