"""The command line: `prag run`, `ask`, `rejects`, `demo`; the other commands are in the modules `cli_*`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.session import JoinError
from pipelines.cli import cluster as cli_cluster
from pipelines.cli import evaluate as cli_evaluate
from pipelines.cli import keys as cli_keys
from pipelines.cli import reindex as cli_reindex
from pipelines.cli import serve as cli_serve
from pipelines.cli.store import store_app
from pipelines.cli.terminal import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    ProfileOption,
    SetOption,
    out,
    print_json,
    progress_to,
    result_only,
    settings_of,
)
from prag_core.config import Config
from prag_core.config_file import load_config
from prag_core.errors import ClusterError, PragError
from prag_core.records import MODES, Answer, MergeRule, Mode, Reject

app = typer.Typer(
    name="prag",
    help=(
        "Parametric RAG: passages become LoRA adapters; a question adds the adapters it needs to the weights.\n\n"
        "A first session: `prag plan -c examples/demo.yaml`, `prag run -c examples/demo.yaml`, "
        '`prag ask -c examples/demo.yaml --compare "Who built the Cazambra Lighthouse?"`.\n\n'
        "Exit codes: 0 done, 1 failed, 2 wrong configuration or usage, 3 bad input, 4 base model, "
        "5 store (out of reach, or damaged), 6 somebody else changed the store first, 7 retrieval or Java, "
        "8 generator, 9 too many rejects, 10 another run works on the store, 11 several things are wrong, "
        "12 the cluster, 16 the canary. `prag submit` ends with the code of its job."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(cli_keys.app, name="keys")
# The operator's verbs of the store.
app.add_typer(store_app)


cli_cluster.register(app)
cli_reindex.register(app)
cli_evaluate.register(app)
cli_serve.register(app)


@app.command()
def run(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    profile: ProfileOption = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the store's lease from a run that is known to be dead.")
    ] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Wait so many seconds for another run's lease, also a dead one's.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Do the main job: corpus → augment → train → store → index → publish.

    Run it again after anything: it does only what is missing. What a killed run had stored is kept.
    """
    settings = settings_of(config, set_, profile)

    from pipelines.jobs.run import run_job  # seconds of imports: what is wrong in the settings is said before them

    with result_only():
        report = run_job(settings, progress_to, take_over=take_over, wait_s=wait)
    if as_json:
        print_json(report.to_json())
        return
    table = Table(title=f"Run {report.run}")
    for name in ("stage", "in", "done", "earlier", "rejected", "seconds", "passages/s", "bytes"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in report.stages:
        table.add_row(
            stage.stage,
            str(stage.taken),
            str(stage.done),
            str(stage.earlier),
            str(sum(stage.rejected.values())),
            f"{stage.seconds:.1f}",
            f"{stage.per_second:.2f}",
            cli_cluster.size_text(stage.bytes) if stage.bytes else "",
        )
    out.print(table)
    for reason, count in report.rejected.items():
        out.print(f"rejected: {reason} {count}; `prag rejects` says which")
    out.print(f"{report.adapters} adapters; snapshot {report.snapshot} in service; {report.seconds:.1f} s")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    config: ConfigOption = DEFAULT_CONFIG,
    mode: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODES)}; default: answer.mode.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=20, help="Passages to retrieve.")] = None,
    weights: Annotated[str | None, typer.Option(help="How adapters are added: sum, mean or score.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer in all four modes side by side.")] = False,
    snapshot: Annotated[str | None, typer.Option(help="Answer from this snapshot, not the one in service.")] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from the snapshot in service.

    `closed` is the bare model, `rag` has the passages in the prompt, `prag` has them in the weights, `combine` both.
    """
    overrides = list(set_ or [])
    overrides += [f"answer.{name}={value}" for name, value in (("mode", mode), ("weights", weights)) if value]
    overrides += [f"answer.top_k={top_k}"] if top_k else []
    settings = load_config(config, overrides)
    with result_only():
        answers = _ask(settings, question, MODES if compare else (settings.answer.mode,), snapshot)
    if as_json:
        print_json([asdict(answer) for answer in answers])
        return
    _show_answers(answers)


def _ask(config: Config, question: str, modes: tuple[Mode, ...], snapshot: str | None) -> list[Answer]:
    from prag_core.inference.engine import open_engine
    from prag_core.inference.request import Request
    from prag_core.store.objects import open_store

    engine = open_engine(open_store(config), config, snapshot)
    how: tuple[int, MergeRule] = (config.answer.top_k, config.answer.weights)
    return [engine.answer(Request(question, mode, *how)) for mode in modes]


@app.command()
def rejects(
    config: ConfigOption = DEFAULT_CONFIG,
    stage: Annotated[str | None, typer.Option(help="Only of this stage: corpus, augment or train.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="How many to list one by one.")] = 20,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was rejected, why and where; of all runs of the store."""
    from prag_core.records import from_table
    from prag_core.store.objects import open_store

    store = open_store(load_config(config, set_ or []))
    parts = store.list(f"rejects/{stage}" if stage else "rejects", ".parquet")
    found = {
        (r.stage, r.reason, r.source, r.key, r.recipe): r for r in from_table(Reject, store.get_table(Reject, parts))
    }
    rows = sorted(found.values(), key=lambda r: (r.stage, r.reason, r.source))
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for (of_stage, reason), count in sorted(Counter((r.stage, r.reason) for r in rows).items()):
        out.print(f"{of_stage}/{reason}: {count}")
    if not rows:
        out.print("no rejects")
    for row in rows[:limit]:
        out.print(f"  {row.source}: {row.stage}/{row.reason}: {row.detail}", highlight=False)
    if len(rows) > limit:
        out.print(f"  … and {len(rows) - limit} more; see --limit or --json")


@app.command()
def demo(config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None) -> None:
    """Run the main job on the example corpus, then ask its questions in every mode and print the table.

    The last line is one JSON object with the counts, F1 by mode and seconds by stage.
    """
    settings = load_config(config, set_ or [])

    from pipelines.jobs.demo import run_demo

    with result_only():
        result = run_demo(settings, out)
    print_json(result)


def _show_answers(answers: list[Answer]) -> None:
    for answer in answers:
        out.print(f"[bold]{answer.mode:>8}[/]  {escape(answer.text)}", highlight=False)
        if answer.reasoning:
            out.print(f"          reasoning: {escape(answer.reasoning)}", highlight=False)
        steps = ", ".join(f"{step} {ms:.0f}" for step, ms in answer.milliseconds.items())
        out.print(f"          {steps} ms; {answer.prompt_tokens} prompt tokens, {answer.new_tokens} new")
    last = max(answers, key=lambda answer: len(answer.passages))
    if last.passages:
        table = Table(title="Retrieved passages")
        for name in ("score", "title", "ids", "how it was used"):
            table.add_column(name)
        uses: dict[str, list[str]] = {}
        for answer in answers:
            for passage in answer.passages:
                uses.setdefault(passage.key, []).append(f"{answer.mode}: {_use(passage)}")
        for passage in last.passages:
            table.add_row(
                *map(escape, (f"{passage.score:.2f}", passage.title, ", ".join(passage.sources))),
                "\n".join(map(escape, uses[passage.key])),
            )
        out.print(table)


def _use(passage: Any) -> str:
    places = [n for n, used in (("weights", passage.in_weights), ("prompt", passage.in_prompt)) if used]
    note = f" ({passage.note})" if passage.note else ""
    return " and ".join(places) + note


def main() -> None:
    """Run the command line; an expected error becomes its message and its exit code, never a traceback."""
    logging.basicConfig(level=os.environ.get("PRAG_LOG", "WARNING"), format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (PragError, JoinError) as raised:
        error = raised if isinstance(raised, PragError) else ClusterError(str(raised), raised.remedy)
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(error.exit_code)
