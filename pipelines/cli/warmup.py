"""`prag warmup`: an adapter trained on questions: one from which all others start, a reader or a writer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import options
from pipelines.cli.evaluate import read_question_set
from pipelines.cli.terminal import out, print_json, progress_to, result_only
from pipelines.words import counted
from prag_core.errors import ConfigError

app = typer.Typer()

# A writer learns three tasks, and more than a passage's facts.
_WRITER_RANK = 8
_WRITER_RATE = 1e-3


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag warmup -c config.yaml squad:train.json --reading`")
def warmup(
    data: Annotated[str, typer.Argument(help="The questions to train on: a file, FORM:FILE, or `atlas`.")],
    config: options.Config = options.EXAMPLE,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Questions for an evaluation: none of these is trained on.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, show_default=False, help="By default 3e-4, for a writer 1e-3.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a step, over all workers.")] = 8,
    seed: int = 0,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on at most this many, drawn at random.")] = None,
    reading: Annotated[
        bool, typer.Option("--reading", help="Put their passages into the prompts: trains a reader for answer.reader.")
    ] = False,
    asking: Annotated[
        bool, typer.Option("--asking", help="Learn to write the questions: trains a writer for augment.writer.")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="The adapter's rank; 0: the recipe's, for a writer 8.")] = 0,
    export: Annotated[Path | None, typer.Option(help="Write a PEFT adapter folder too.")] = None,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Train an adapter on questions and store it by its fingerprint.

    With `--set train.initial_adapter=NAME`, every passage's adapter starts from it. With --reading, the questions are
    asked with their passages, which the set must contain (SQuAD, HotpotQA, 2WikiMultihopQA). The result is a reader:
    with `--set answer.reader=NAME` it is added wherever a passage is in the prompt. With --asking, the result is a
    writer: with `--set augment.writer=NAME` it writes the pairs of your passages. `prag warmup --asking atlas` learns
    from the pairs of the example corpus and takes some minutes.
    """
    from pipelines.jobs.warmup import pairs_of_the_example, run_warmup
    from prag_core.training.warmup import WarmupSettings

    configured = options.settings_of(config, set_)
    excluded = [question for name in exclude or [] for question in read_question_set(name, configured.storage)]
    if reading and asking:
        raise ConfigError("--reading and --asking are two trainings", "run one after the other")
    if asking:
        learning_rate, rank = learning_rate or _WRITER_RATE, rank or _WRITER_RANK
    settings = WarmupSettings(learning_rate or 3e-4, epochs, batch, seed, reading, asking, rank)
    with result_only():
        trained = run_warmup(
            configured,
            pairs_of_the_example() if asking and data == "atlas" else read_question_set(data, configured.storage),
            excluded,
            settings,
            progress_to,
            workers=workers,
            limit=limit,
            export=export,
        )
    if as_json:
        print_json(asdict(trained))
        return
    setting = "answer.reader" if reading else "augment.writer" if asking else "train.initial_adapter"
    out.print(
        f"{counted(trained.questions, 'question')} ({trained.left_out} left out); loss {trained.first_loss:.3f} → "
        f"{trained.last_loss:.3f}\nuse it with: --set {setting}={trained.start}"
    )
