"""`prag evaluate`: a set of questions, asked in several modes and under controls."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

import typer

from pipelines.cli import options
from pipelines.cli.terminal import out, print_json, progress_to, result_only
from pipelines.words import counted
from prag_core.errors import ConfigError
from prag_core.records import ASKED_MODES, MAX_STRENGTH, MODES, MergeRule

if TYPE_CHECKING:
    from prag_core.config import Config, StorageConfig
    from prag_core.data.questions import Question
    from prag_core.evaluation.plan import EvaluationPlan

app = typer.Typer()
T = TypeVar("T", bound=str)
N = TypeVar("N", int, float)
# Sets that come with the project.
_NAMED = {"atlas": "package://pipelines/examples/atlas/questions.jsonl"}


@app.command(
    rich_help_panel=options.EVALUATE,
    epilog="Example: `prag evaluate -c config.yaml --dataset questions.jsonl`",
)
def evaluate(
    config: options.Config = options.EXAMPLE,
    dataset: Annotated[
        str, typer.Option(help="A file of questions; FORM:FILE if the file does not show its form; or `atlas`.")
    ] = "atlas",
    modes: Annotated[str, typer.Option(help="Some of closed, rag, prag, combine, auto.")] = ",".join(MODES),
    controls: Annotated[str, typer.Option(help="Some of wrong, random, task, da.")] = "",
    retrieval: Annotated[
        Literal["bm25", "oracle"], typer.Option(help="`oracle` takes the gold passages instead of searching.")
    ] = "bm25",
    top_k: Annotated[str | None, typer.Option(help="Passages; further values add columns, as in 1,2,3.")] = None,
    weights: Annotated[str | None, typer.Option(help="sum, mean, score; further values add columns.")] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="What combine multiplies adapters by; further values add columns, as in 1,0.5."),
    ] = None,
    wrong: Annotated[
        Literal["nearest", "random"], typer.Option(help="Which wrong passage's adapter the control `wrong` takes.")
    ] = "nearest",
    seeds: Annotated[int, typer.Option(min=1, help="Number of random seeds.")] = 3,
    task_passages: Annotated[int, typer.Option(min=1, help="Passages that train a task adapter.")] = 8,
    task_rounds: Annotated[
        int, typer.Option(min=1, help="The task adapter's steps, as a multiple of one passage adapter's.")
    ] = 1,
    split: Annotated[str | None, typer.Option(help="Use only the questions of this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask at most this many, drawn at random.")] = None,
    snapshot: options.Snapshot = None,
    url: Annotated[
        str | None, typer.Option(help="Ask a running server instead; its key is read from PRAG_API_KEY.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --url: questions asked at the same time.")] = 8,
    judge_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint whose model judges each answer too.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's model.")] = "default",
    report: Annotated[Path, typer.Option(help="The folder for report.json and report.html.")] = Path("report"),
    fit_auto: Annotated[
        bool, typer.Option("--fit-auto", help="Fit the mode auto's thresholds to the answers; store them.")
    ] = False,
    set_: options.Set = None,
) -> None:
    """Ask a set of questions in every mode and under controls; print tables and write a report.

    Answers are stored: started again, or with more modes, it asks only what has no stored answer. The last line is
    one JSON object: n, F1 by column, differences and their 95 % intervals.

    With --fit-auto, a new snapshot with the thresholds of `auto` takes the place of the evaluated one. Give questions
    that are like those to come, and of which you report no results. Other questions then show what they are worth:
    --modes closed,rag,prag,combine,auto.
    """
    settings = options.settings_of(config, set_)

    from pipelines.evaluation import auto
    from pipelines.evaluation.judge import judge  # takes seconds: a wrong setting is reported before
    from pipelines.evaluation.report import print_report, write_report
    from pipelines.evaluation.run import run_evaluation
    from pipelines.evaluation.server import evaluate_server
    from prag_core.config import EndpointConfig
    from prag_core.evaluation.conclusions import auto_conclusion
    from prag_core.evaluation.plan import CONTROLS, EvaluationPlan, draw
    from prag_core.evaluation.summary import summarize, summary_line
    from prag_core.identity import fingerprint
    from prag_core.llm.openai_generator import OpenAIGenerator
    from prag_core.store.objects import open_store

    plan = EvaluationPlan(
        modes=_names("modes", modes, ASKED_MODES),
        controls=_names("controls", controls, CONTROLS),
        retrieval=retrieval,
        top_k=_numbers("top-k", top_k or str(settings.answer.top_k), int, 20),
        weights=_names("weights", weights or settings.answer.weights, get_args(MergeRule)),
        strengths=_numbers("strength", strength or str(settings.answer.combine_strength), float, MAX_STRENGTH),
        wrong=wrong,
        seeds=seeds,
        task_passages=task_passages,
        task_rounds=task_rounds,
    )
    if not plan.modes:
        raise ConfigError("--modes names none", f"known are {', '.join(ASKED_MODES)}")
    if fit_auto:
        _check_fit(plan, settings, url)
    questions = read_question_set(dataset, settings.storage)
    described = {"name": dataset, "questions": len(questions), "digest": fingerprint([q.id for q in questions])}
    if split is not None:
        known = sorted({question.split for question in questions})
        if split not in known:
            raise ConfigError(f"--split: {dataset} has no split {split!r}", f"it has {', '.join(map(repr, known))}")
        questions = [question for question in questions if question.split == split]
    store = open_store(settings)
    chosen = options.snapshot_of(settings, snapshot)
    with result_only():
        if url is not None:
            evaluation = evaluate_server(
                url,
                draw(questions, limit),
                plan,
                progress_to,
                key=os.environ.get("PRAG_API_KEY", ""),
                max_tokens=settings.answer.max_new_tokens,
                concurrency=concurrency,
            )
        else:
            evaluation = run_evaluation(settings, questions, plan, progress_to, snapshot_id=chosen, limit=limit)
        if judge_url is not None:
            generator = OpenAIGenerator(EndpointConfig(url=judge_url, model=judge_model))
            evaluation = judge(store, "evaluations", evaluation, generator, progress_to)
    fitted = None
    try:
        fitted = auto.fit_auto(store, evaluation) if fit_auto else None
    finally:  # the report is worth having, also where no thresholds are good enough
        command = shlex.join(["prag", *sys.argv[1:]])
        summary = summarize(evaluation, described, command, asdict(fitted) if fitted else None)
        write_report(summary, report)
        print_report(summary, out)
        out.print(f"written: {report / 'report.json'} and {report / 'report.html'}")
    if fitted:
        out.print(auto_conclusion(summary["auto"]).text, highlight=False)
        id, serving = auto.store_route(store, evaluation, fitted.route)
        then = (
            "is in service" if serving else f"is a candidate: put it into service with `prag snapshots rollback {id}`"
        )
        out.print(f"thresholds stored: the snapshot {id} has them and {then}", highlight=False)
    print_json(summary_line(summary))


def _check_fit(plan: EvaluationPlan, settings: Config, url: str | None) -> None:
    """Check that the answers of a plan are those that thresholds of `auto` can be fitted to: as in service, each mode.

    Raises:
        ConfigError: when they are not.
    """
    if url is not None or plan.retrieval != "bm25":
        raise ConfigError("--fit-auto needs the scores of a search in the store", "leave --url and --retrieval out")
    if missing := [mode for mode in MODES if mode not in plan.modes]:
        raise ConfigError(f"--fit-auto compares all modes, and --modes lacks {', '.join(missing)}", "leave --modes out")
    answer = settings.answer
    for option, name, asked, served in (
        ("--top-k", "answer.top_k", plan.top_k[0], answer.top_k),
        ("--weights", "answer.weights", plan.weights[0], answer.weights),
        ("--strength", "answer.combine_strength", plan.strengths[0], answer.combine_strength),
    ):
        if asked != served:
            raise ConfigError(
                f"--fit-auto fits to what is served: {name} = {served}, but the first {option} is {asked}",
                f"leave {option} out, or change the setting",
            )


def read_question_set(name: str, storage: StorageConfig | None = None) -> list[Question]:
    """Read a set of questions that an option names: `FILE`, `FORM:FILE`, or a set that comes with the project.

    Raises:
        InputError: see `prag_core.data.question_sets.read_questions`.
    """
    from prag_core.data.files import shown, without_query
    from prag_core.data.question_sets import FORMATS, read_questions

    form, colon, path = name.partition(":")
    form, path = (form, path) if colon and form in FORMATS else ("", name)
    left_out: Counter[str] = Counter()
    questions = read_questions(_NAMED.get(path, path), form, storage, left_out)
    for reason, count in left_out.items():
        progress_to.print(
            f"{shown(without_query(name))}: {counted(len(questions), 'question')}; left out: {count} {reason}"
        )
    return questions


def _names(option: str, values: str, known: tuple[T, ...]) -> tuple[T, ...]:
    """Return the known names in a comma-separated list, each once."""
    by_name = {str(name): name for name in known}
    named = dict.fromkeys(value.strip() for value in values.split(",") if value.strip())
    for value in named:
        if value not in by_name:
            raise ConfigError(f"--{option}: unknown {value!r}", f"known are {', '.join(known)}")
    if values and not named:
        raise ConfigError(f"--{option} {values!r}: names none", f"known are {', '.join(known)}")
    return tuple(by_name[value] for value in named)


def _numbers(option: str, values: str, kind: Callable[[str], N], most: float) -> tuple[N, ...]:
    """Return the numbers in a comma-separated list, each once; they must be above 0 and at most `most`."""
    try:
        numbers = tuple(dict.fromkeys(kind(value) for value in values.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= most for number in numbers):
        what = "whole numbers from 1" if kind is int else "numbers above 0"
        raise ConfigError(f"--{option} {values!r}: must be {what} to {most:g}", "write one, or several as in 1,2")
    return numbers
