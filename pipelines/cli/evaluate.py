"""The commands around quality: `prag evaluate`, `warmup`, `import-augmentations`, `export-augmentations`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args

import typer

from pipelines.cli.terminal import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    SetOption,
    out,
    print_json,
    progress_to,
    result_only,
)
from prag_core.config_file import load_config
from prag_core.errors import ConfigError
from prag_core.records import MAX_STRENGTH, MODES, MergeRule

if TYPE_CHECKING:
    from prag_core.data.questions import Question


T = TypeVar("T")
# Sets that come with the project.
_NAMED = {"atlas": "package://pipelines/examples/atlas/questions.jsonl"}
_EXPORTS = ("jsonl", "paper")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""

    @app.command()
    def evaluate(
        config: ConfigOption = DEFAULT_CONFIG,
        dataset: Annotated[
            str, typer.Option(help="A file of questions, FORM:FILE where its form is not plain, or `atlas`.")
        ] = "atlas",
        modes: Annotated[str, typer.Option(help="Which of closed, rag, prag, combine.")] = ",".join(MODES),
        controls: Annotated[str, typer.Option(help="Which of wrong, random, task, da.")] = "",
        retrieval: Annotated[str, typer.Option(help="bm25, or oracle: the gold passages.")] = "bm25",
        top_k: Annotated[str | None, typer.Option(help="Passages; further values add columns, as in 1,2,3.")] = None,
        weights: Annotated[str | None, typer.Option(help="sum, mean, score; further values add columns.")] = None,
        strength: Annotated[
            str | None, typer.Option(help="In combine, of the adapters; further values add columns, as in 1,0.5.")
        ] = None,
        wrong: Annotated[
            str, typer.Option(help="The control `wrong` takes the nearest wrong passage's adapter, or a random one's.")
        ] = "nearest",
        seeds: Annotated[int, typer.Option(min=1, help="How often what is random is drawn.")] = 3,
        task_passages: Annotated[int, typer.Option(min=1, help="Passages that train a task adapter.")] = 8,
        task_rounds: Annotated[int, typer.Option(min=1, help="Its steps, in those of one adapter.")] = 1,
        split: Annotated[str | None, typer.Option(help="Only questions of this split.")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Only so many, drawn at random.")] = None,
        snapshot: Annotated[str | None, typer.Option(help="A snapshot other than the one in service.")] = None,
        url: Annotated[
            str | None, typer.Option(help="Ask a running server instead; its key is read from PRAG_API_KEY.")
        ] = None,
        concurrency: Annotated[int, typer.Option(min=1, help="With --url: questions under way at once.")] = 8,
        judge_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint that judges too.")] = None,
        judge_model: Annotated[str, typer.Option(help="The judge's model.")] = "default",
        report: Annotated[Path, typer.Option(help="The folder for report.json and report.html.")] = Path("report"),
        set_: SetOption = None,
    ) -> None:
        """Ask a set of questions in every mode and under controls; print tables, write a report.

        Killed, or called again with more modes, it asks only what has no stored answer. The last line is one JSON
        object: n, F1 by column, differences and their 95 % intervals.
        """
        settings = load_config(config, set_ or [])

        from pipelines.evaluation.judge import judge
        from pipelines.evaluation.report import print_report, write_report
        from pipelines.evaluation.run import run_evaluation  # seconds of imports
        from pipelines.evaluation.server import evaluate_server
        from prag_core.config import EndpointConfig
        from prag_core.evaluation.plan import CONTROLS, EvaluationPlan, Retrieval, Wrong, draw
        from prag_core.evaluation.summary import summarize, summary_line
        from prag_core.identity import fingerprint
        from prag_core.llm.openai_generator import OpenAIGenerator
        from prag_core.store.objects import open_store

        plan = EvaluationPlan(
            modes=_several("modes", modes, MODES),
            controls=_several("controls", controls, CONTROLS),
            retrieval=_one("retrieval", retrieval, get_args(Retrieval)),
            top_k=_numbers(top_k) if top_k else (settings.answer.top_k,),
            weights=_several("weights", weights or settings.answer.weights, get_args(MergeRule)),
            strengths=_strengths(strength) if strength else (settings.answer.combine_strength,),
            wrong=_one("wrong", wrong, get_args(Wrong)),
            seeds=seeds,
            task_passages=task_passages,
            task_rounds=task_rounds,
        )
        questions = _questions(dataset)
        described = {"name": dataset, "questions": len(questions), "digest": fingerprint([q.id for q in questions])}
        if split is not None:
            questions = [question for question in questions if question.split == split]
        store = open_store(settings)
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
                evaluation = run_evaluation(settings, questions, plan, progress_to, snapshot_id=snapshot, limit=limit)
            if judge_url is not None:
                generator = OpenAIGenerator(EndpointConfig(url=judge_url, model=judge_model))
                evaluation = judge(store, "evaluations", evaluation, generator, progress_to)
        made = summarize(evaluation, described, shlex.join(["prag", *sys.argv[1:]]))
        write_report(made, report)
        print_report(made, out)
        out.print(f"written: {report / 'report.json'} and {report / 'report.html'}")
        print_json(summary_line(made))

    @app.command()
    def warmup(
        data: Annotated[str, typer.Argument(help="Questions to train on: a file, or FORM:FILE.")],
        config: ConfigOption = DEFAULT_CONFIG,
        exclude: Annotated[
            list[str] | None, typer.Option(help="Questions that will be evaluated: none of these is trained on.")
        ] = None,
        learning_rate: Annotated[float, typer.Option(min=0)] = 3e-4,
        epochs: Annotated[int, typer.Option(min=1)] = 1,
        batch: Annotated[int, typer.Option(min=1, help="Questions a step, of all workers together.")] = 8,
        seed: int = 0,
        workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
        limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, drawn at random.")] = None,
        reading: Annotated[
            bool, typer.Option("--reading", help="With their passages in the prompts: a reader, for `answer.reader`.")
        ] = False,
        export: Annotated[Path | None, typer.Option(help="Write it as a PEFT adapter folder, too.")] = None,
        set_: SetOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Train an adapter on questions that overlap with nothing, and store it by its fingerprint.

        Use it with `--set train.initial_adapter=NAME`: every passage's adapter then starts from it. With --reading the
        questions are asked with their passages, which the set has to bring (SQuAD, HotpotQA, 2WikiMultihopQA): use
        that one with `--set answer.reader=NAME`, and it is added to the adapters in the mode `combine`.
        """
        from dataclasses import asdict

        from pipelines.jobs.warmup import run_warmup
        from prag_core.training.warmup import WarmupSettings

        others = [question for name in exclude or [] for question in _questions(name)]
        settings = WarmupSettings(learning_rate=learning_rate, epochs=epochs, batch=batch, seed=seed, reading=reading)
        with result_only():
            made = run_warmup(
                load_config(config, set_ or []),
                _questions(data),
                others,
                settings,
                progress_to,
                workers=workers,
                limit=limit,
                export=export,
            )
        if as_json:
            print_json(asdict(made))
            return
        key = "answer.reader" if reading else "train.initial_adapter"
        out.print(
            f"{made.questions} questions ({made.left_out} left out); loss {made.first_loss:.3f} → "
            f"{made.last_loss:.3f}\nuse it with: --set {key}={made.start}"
        )

    @app.command("import-augmentations")
    def import_augmentations(
        file: Annotated[str, typer.Argument(help="JSON Lines of id, rewrites, qa, or the paper's published JSON.")],
        config: ConfigOption = DEFAULT_CONFIG,
        passages_to: Annotated[
            Path | None, typer.Option(help="First write the passages of the paper's JSON as a corpus of this name.")
        ] = None,
        set_: SetOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Put augmentations made elsewhere into the store, for the passages of the configured corpus.

        A later `prag run` with `augment.import_file` naming the same file finds them there.
        """
        from pipelines.jobs.augmentations import import_into_store
        from prag_core.augmentation.formats import write_corpus

        overrides = [*(set_ or []), f"augment.import_file={json.dumps(file)}"]
        if passages_to is not None:
            progress_to.print(f"{passages_to}: {write_corpus(file, passages_to)} passages")
            overrides.append(f"corpus.path={json.dumps(str(passages_to))}")
        with result_only():
            counts = import_into_store(load_config(config, overrides), progress_to)
        if as_json:
            print_json(counts)
        else:
            out.print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))

    @app.command("export-augmentations")
    def export_augmentations(
        file: Annotated[Path, typer.Argument(help="The file to write.")],
        config: ConfigOption = DEFAULT_CONFIG,
        form: Annotated[str, typer.Option(help="jsonl, or paper: the form of the paper's published JSON.")] = "jsonl",
        snapshot: Annotated[str | None, typer.Option(help="A snapshot other than the one in service.")] = None,
        set_: SetOption = None,
    ) -> None:
        """Write the augmentations of a snapshot's passages to a file that `import-augmentations` takes."""
        from pipelines.jobs.augmentations import export_from_store

        form = _one("form", form, _EXPORTS)
        with result_only():
            count = export_from_store(load_config(config, set_ or []), file, form, snapshot, progress_to)
        out.print(f"{file}: {count} augmentations")


def _questions(name: str) -> list[Question]:
    from prag_core.data.questions import FORMATS, read_questions

    form, colon, path = name.partition(":")
    form, path = (form, path) if colon and form in FORMATS else ("", name)
    return read_questions(_NAMED.get(path, path), form)


def _one(option: str, value: str, known: tuple[T, ...]) -> T:
    for name in known:
        if name == value:
            return name
    raise ConfigError(f"--{option} {value!r}: not known", f"known are {', '.join(map(str, known))}")


def _several(option: str, values: str, known: tuple[T, ...]) -> tuple[T, ...]:
    named = [value.strip() for value in values.split(",") if value.strip()]
    return tuple(dict.fromkeys(_one(option, value, known) for value in named))


def _strengths(values: str) -> tuple[float, ...]:
    try:
        numbers = tuple(dict.fromkeys(float(value) for value in values.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= MAX_STRENGTH for number in numbers):
        raise ConfigError(
            f"--strength {values!r}: not numbers above 0, up to {MAX_STRENGTH:g}", "write it as 0.5, or as 1,0.5"
        )
    return numbers


def _numbers(values: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(value) for value in values.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or max(numbers) > 20:
        raise ConfigError(f"--top-k {values!r}: not numbers from 1 to 20", "write it as 3, or as 1,2,3")
    return numbers
