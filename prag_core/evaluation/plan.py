"""What an evaluation asks: each question in each mode and under each control, as one list of requests.

A request (`Ask`) names its passages and adapters in full, so its id is its content: an answer that is stored under
it need not be asked for again, whatever else the evaluation was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from prag_core.data.questions import Question
from prag_core.errors import InputError
from prag_core.evaluation.controls import NOTHING, random_name, task_name
from prag_core.evaluation.metrics import contains
from prag_core.identity import fingerprint
from prag_core.prompts import passage_text
from prag_core.records import Augmentation, Hit, MergeRule, Mode, Passage

Control = Literal["wrong", "random", "task", "da"]
CONTROLS: tuple[Control, ...] = get_args(Control)
Retrieval = Literal["bm25", "oracle"]
Wrong = Literal["nearest", "random"]
# Raised when the same request would be answered otherwise.
EVALUATION_VERSION = 1


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be asked.

    The first of `top_k`, of `weights` and of `strengths` is used throughout; the further ones are asked in the modes
    that they change. `strengths` are of the mode `combine`: what its adapters' weights are multiplied by; `reader` says
    which reader is added there, and its weight. `wrong` says whose adapter the control of that name takes: that of the
    nearest passage that is not right, or of a random one. Whatever is drawn at random is drawn `seeds` times. A task
    adapter is trained on `task_passages` other passages, with `task_rounds` times the steps of one passage's adapter.
    """

    modes: tuple[Mode, ...] = ("closed", "rag", "prag", "combine")
    controls: tuple[Control, ...] = ()
    retrieval: Retrieval = "bm25"
    top_k: tuple[int, ...] = (3,)
    weights: tuple[MergeRule, ...] = ("sum",)
    strengths: tuple[float, ...] = (1.0,)
    reader: str = ""
    wrong: Wrong = "nearest"
    seeds: int = 3
    task_passages: int = 8
    task_rounds: int = 1

    @property
    def depth(self) -> int:
        """How many passages have to be retrieved: enough that wrong ones are among them."""
        return 2 * max(self.top_k) + 10


@dataclass(frozen=True)
class Column:
    """One way in which every question is asked: a column of the report's table. `seeds` are averaged."""

    name: str
    mode: Mode
    top_k: int
    weights: MergeRule
    control: str = ""
    seeds: tuple[int, ...] = (0,)
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """One request. `hits` are its passages as they go into prompt and weights; a hit's key names its adapter."""

    question: str
    mode: str
    weights: str
    hits: tuple[Hit, ...]
    strength: float = 1.0
    reader: str = ""

    @property
    def id(self) -> str:
        """Name what decides the answer, once base model, recipe and adapters are given."""
        content = asdict(self)
        # They came later: at their defaults they are no part of the name, or stored answers would be made again.
        if self.strength == 1:
            del content["strength"]
        if not self.reader:
            del content["reader"]
        return fingerprint(content)


@dataclass(frozen=True, slots=True)
class EvaluationReply:
    """A stored answer to an `Ask`, by its id.

    `reasoning` is all that the model wrote where it reasons before its answer. `notes` are why adapters were not used;
    `failed` is why there is no text.
    """

    id: str
    text: str
    reasoning: str
    prompt_tokens: int
    new_tokens: int
    fetch_ms: float
    prompt_ms: float
    inject_ms: float
    prefill_ms: float
    decode_ms: float
    notes: tuple[str, ...] = ()
    failed: str = ""


def draw(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at most `limit` of the questions, drawn at random, the same each time, in their order."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[i] for i in sorted(random.Random(0).sample(range(len(questions)), limit))]


def columns(plan: EvaluationPlan) -> list[Column]:
    """Return the columns of an evaluation, in the order of its table.

    Raises:
        InputError: when `top_k` cannot mean anything, because the gold passages are taken, however many.
    """
    k, weights = plan.top_k[0], plan.weights[0]
    if plan.retrieval == "oracle" and len(plan.top_k) > 1:
        raise InputError(
            "several values of top_k have no meaning with the gold passages", "use --retrieval bm25 for F1 against k"
        )
    drawn = tuple(range(plan.seeds))
    strength = plan.strengths[0]
    made = [Column(mode, mode, k, weights) for mode in plan.modes]
    for control in plan.controls:
        if control == "wrong":
            made.append(Column("wrong", "prag", k, weights, control, drawn if plan.wrong == "random" else (0,)))
        elif control == "random":
            made.append(Column("random", "prag", k, weights, control, drawn))
        elif control == "task":
            made.append(Column("task", "prag", k, weights, control, drawn))
            made.append(Column("task_rag", "combine", k, weights, control, drawn))
        else:
            made.append(Column("da_rag", "rag", k, weights, control))
    if plan.reader and plan.controls:
        made.append(Column("reader_rag", "combine", k, weights, "reader"))
    for mode in plan.modes:
        if mode != "closed":
            made += [Column(f"{mode}_k{other}", mode, other, weights) for other in plan.top_k[1:]]
    for mode in plan.modes:
        if mode in ("prag", "combine"):
            made += [Column(f"{mode}_{other}", mode, k, other) for other in plan.weights[1:]]
    made = [replace(column, strength=strength) if column.mode == "combine" else column for column in made]
    if "combine" in plan.modes:
        made += [Column(f"combine_x{x:g}", "combine", k, weights, strength=x) for x in plan.strengths[1:]]
    return made


@dataclass(frozen=True)
class QuestionContext:
    """What is known of one question before it is asked.

    `ranked` are the retrieved passages, the best first; `gold` the passages that hold the answer; `trained` the keys
    among them all that have an adapter; `pool` some keys of the corpus that have one, for what is drawn at random;
    `augmentations` by key, for the control `da`; `tasks` the task adapter of each seed.
    """

    ranked: tuple[Hit, ...]
    gold: tuple[Passage, ...]
    trained: frozenset[str]
    pool: Sequence[str]
    augmentations: Mapping[str, Augmentation]
    tasks: Sequence[str]


def used_hits(question: Question, column: Column, context: QuestionContext, retrieval: Retrieval) -> tuple[Hit, ...]:
    """Return the passages that a question's own answer rests on."""
    if retrieval == "oracle":
        return tuple(Hit(passage, 1.0) for passage in context.gold)
    return context.ranked[: column.top_k]


def make_request(
    question: Question, column: Column, seed: int, context: QuestionContext, plan: EvaluationPlan
) -> EvaluationRequest:
    """Return one question as one column asks it.

    Raises:
        InputError: when a control has no passage to take.
    """
    hits = used_hits(question, column, context, plan.retrieval)
    if column.mode == "closed":
        hits = ()
    elif column.control == "wrong":
        hits = _wrong(question, hits, seed, context, plan)
    elif column.control == "random":
        # A passage without an adapter must not come into the prompt: a random one stands for the trained alone.
        hits = tuple(_named(hit, random_name(hit.passage.key, seed)) for hit in hits if _has(hit, context))
    elif column.control == "task":
        # One task adapter of weight one, however many passages there are: their weights add up to one, or the first
        # alone has it.
        whole = task_name(context.tasks[seed])
        rest = NOTHING if column.weights == "sum" else whole
        hits = tuple(_named(hit, rest if i else whole) for i, hit in enumerate(hits))
    elif column.control == "reader":
        hits = tuple(_named(hit, NOTHING) for hit in hits)
    elif column.control == "da":
        hits = tuple(replace(hit, passage=_augmented(hit.passage, context.augmentations)) for hit in hits)
    reader = plan.reader if column.mode == "combine" else ""
    return EvaluationRequest(question.question, column.mode, column.weights, hits, column.strength, reader)


def _has(hit: Hit, context: QuestionContext) -> bool:
    return hit.passage.key in context.trained


def _named(hit: Hit, name: str) -> Hit:
    return replace(hit, passage=replace(hit.passage, key=name))


def _wrong(
    question: Question, hits: tuple[Hit, ...], seed: int, context: QuestionContext, plan: EvaluationPlan
) -> tuple[Hit, ...]:
    """Return as many wrong passages with the scores of the right ones: none is used, gold, or holds an answer."""
    right = {hit.passage.key for hit in hits} | {passage.key for passage in context.gold}
    told = [answer for answer in question.answers if answer.lower() not in ("yes", "no")]
    wrong = [
        hit.passage
        for hit in context.ranked
        if hit.passage.key not in right
        and _has(hit, context)
        and not any(contains(passage_text(hit.passage), answer) for answer in told)
    ]
    if plan.wrong == "random":
        wrong = []
    # What is drawn is asked for by its key alone: no control puts a passage into the prompt.
    others = [key for key in context.pool if key not in right]
    random.Random(fingerprint([seed, question.id])).shuffle(others)
    wrong += [Passage(key, "", "", ()) for key in others if key not in {passage.key for passage in wrong}]
    if len(wrong) < len(hits):
        raise InputError(
            f"the control 'wrong' finds only {len(wrong)} other passages with an adapter",
            "leave the control out, or evaluate on a snapshot with more passages",
        )
    return tuple(replace(hit, passage=passage) for hit, passage in zip(hits, wrong, strict=False))


def _augmented(passage: Passage, augmentations: Mapping[str, Augmentation]) -> Passage:
    """Return a passage whose text has its augmentation behind it: what the weights learn, put into the prompt."""
    found = augmentations.get(passage.key)
    if found is None:
        return passage
    pairs = [f"{pair.question} {pair.full_answer}" for pair in found.pairs]
    return replace(passage, text="\n".join([passage.text, *found.rewrites, *pairs]))
