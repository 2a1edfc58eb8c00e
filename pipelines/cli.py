"""The command line: `prag plan`, `run`, `ask`, `serve`, `keys`, `status`, `rejects`, `demo`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipelines import cli_keys
from prag_core.config import Config, load_config
from prag_core.errors import PragError
from prag_core.records import MODES, Answer, Mode, Reject, Weights

app = typer.Typer(
    name="prag",
    help=(
        "Parametric RAG: passages become LoRA adapters; a question adds the adapters it needs to the weights.\n\n"
        "A first session: `prag plan -c examples/demo.yaml`, `prag run -c examples/demo.yaml`, "
        '`prag ask -c examples/demo.yaml --compare "Who built the Cazambra Lighthouse?"`.\n\n'
        "Exit codes: 0 done, 1 failed, 2 wrong configuration or usage, 3 bad input, 4 base model, 5 store, "
        "6 somebody else changed the store first, 7 retrieval or Java, 8 generator, 9 too many rejects, "
        "10 another run works on the store."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(cli_keys.app, name="keys")

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The YAML configuration.", envvar="PRAG_CONFIG", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. `--set train.epochs=4`. May be given again."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a text for people.")]

_DEFAULT_CONFIG = Path("examples/demo.yaml")
_progress_to = Console(stderr=True)
# Bound to the real standard output, see `_result_only`.
_out = Console(file=sys.stdout)


@app.command()
def plan(config: ConfigOption = _DEFAULT_CONFIG, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Say what `prag run` would do: passages, duplicates, tokens, time and bytes. Spends nothing."""
    from pipelines.plan import make_plan

    settings = load_config(config, set_ or [])
    with _result_only():
        made = make_plan(settings)
    if as_json:
        _print_json(made.to_json())
        return
    rejected = ", ".join(f"{reason} {n}" for reason, n in sorted(made.rejected.items())) or "none"
    _rows(
        "Plan",
        [
            ("records read", f"{made.records:,}"),
            ("rejected", rejected),
            ("passages", f"{made.passages:,} ({made.duplicates:,} duplicates merged)"),
            ("to augment", f"{made.to_augment:,}"),
            ("to train", f"{made.to_train:,}"),
            ("training tokens", f"{made.tokens:,}"),
            ("adapter bytes", _bytes(made.adapter_bytes)),
            ("time to augment, one actor", _duration(made.augment_seconds)),
            ("time to train, one actor", _duration(made.train_seconds)),
            ("recipe", made.recipe),
        ],
    )


@app.command()
def run(
    config: ConfigOption = _DEFAULT_CONFIG,
    set_: SetOption = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the store's lease from a run that is known to be dead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Do the main job: corpus → augment → train → store → index → publish.

    Run it again after anything: it does only what is missing. What a killed run had stored is kept.
    """
    from pipelines.job import run_job

    settings = load_config(config, set_ or [])
    with _result_only():
        report = run_job(settings, _progress_to, take_over=take_over)
    if as_json:
        _print_json(report.to_json())
        return
    table = Table(title=f"Run {report.run}")
    for name in ("stage", "in", "done", "earlier", "rejected", "seconds", "passages/s", "bytes"):
        table.add_column(name, justify="left" if name in ("stage", "rejected") else "right")
    for stage in report.stages:
        table.add_row(
            stage.stage,
            str(stage.taken),
            str(stage.done),
            str(stage.earlier),
            ", ".join(f"{reason} {n}" for reason, n in sorted(stage.rejected.items())) or "0",
            f"{stage.seconds:.1f}",
            f"{stage.per_second:.2f}",
            _bytes(stage.bytes) if stage.bytes else "",
        )
    _out.print(table)
    _out.print(f"{report.adapters} adapters; snapshot {report.snapshot} in service; {report.seconds:.1f} s")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    config: ConfigOption = _DEFAULT_CONFIG,
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
    with _result_only():
        answers = _ask(settings, question, MODES if compare else (settings.answer.mode,), snapshot)
    if as_json:
        _print_json([asdict(answer) for answer in answers])
        return
    _show_answers(answers)


def _ask(config: Config, question: str, modes: tuple[Mode, ...], snapshot: str | None) -> list[Answer]:
    from prag_core.engine import Request, open_engine
    from prag_core.store import open_store

    engine = open_engine(open_store(config), config, snapshot)
    how: tuple[int, Weights] = (config.answer.top_k, config.answer.weights)
    return [engine.answer(Request(question, mode, *how)) for mode in modes]


@app.command()
def serve(
    config: ConfigOption = _DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Where to listen; default: serve.host.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="On which port; default: serve.port.")] = None,
    set_: SetOption = None,
) -> None:
    """Answer questions over HTTP until interrupted: the same answers as `prag ask`, for many users at once.

    An address that other machines reach needs `serve.api_keys`; see `prag keys`.
    """
    from pipelines.serve import serve_here

    overrides = list(set_ or [])
    overrides += [f"serve.{name}={value}" for name, value in (("host", host), ("port", port)) if value]
    settings = load_config(config, overrides)
    with _result_only():
        serve_here(
            settings, lambda url: _out.print(_welcome(settings, url), highlight=False, markup=False, soft_wrap=True)
        )


def _welcome(config: Config, url: str) -> str:
    key = "" if config.serve.api_keys is None else ' -H "Authorization: Bearer $PRAG_KEY"'
    body = json.dumps({"question": "Who built the Cazambra Lighthouse?", "mode": config.answer.mode})
    return (
        f"Serving at {url} (Ctrl+C ends it). OpenAI clients: base_url={url}/v1\n"
        f"  curl {url}/v1/answer{key} -H 'Content-Type: application/json' -d '{body}'"
    )


@app.command()
def status(config: ConfigOption = _DEFAULT_CONFIG, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Show what the store holds: the snapshot in service, and the last runs."""
    from prag_core.snapshot import current_id, load_snapshot
    from prag_core.store import open_store

    store = open_store(load_config(config, set_ or []))
    current = load_snapshot(store) if current_id(store) else None
    runs = sorted({name.split("/")[1] for name in store.list("runs", ".yaml")})
    finished = {name.split("/")[1] for name in store.list("runs", "/report.json")}
    document = {
        "store": store.url,
        "snapshot": asdict(current) if current else None,
        "runs": [{"run": name, "finished": name in finished} for name in runs],
    }
    if as_json:
        _print_json(document)
        return
    if current is None:
        _out.print(f"{store.url}: nothing is published yet; run `prag run`")
    else:
        _rows(
            f"Snapshot {current.id}",
            [
                ("created", current.created),
                ("passages", f"{current.passages:,}"),
                ("adapters", f"{current.adapters:,}"),
                ("corpus version", current.corpus_version),
                ("index", current.index),
                ("recipe", current.recipe),
                ("base model", current.base_model),
            ],
        )
    for name in runs[-5:]:
        _out.print(f"run {name}: {'finished' if name in finished else 'not finished (running, failed or killed)'}")


@app.command()
def rejects(
    config: ConfigOption = _DEFAULT_CONFIG,
    stage: Annotated[str | None, typer.Option(help="Only of this stage: corpus, augment or train.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="How many to list one by one.")] = 20,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was rejected, why and where; of all runs of the store."""
    from prag_core.records import from_table
    from prag_core.store import open_store

    store = open_store(load_config(config, set_ or []))
    parts = store.list(f"rejects/{stage}" if stage else "rejects", ".parquet")
    found = {
        (r.stage, r.reason, r.source, r.key, r.recipe): r for r in from_table(Reject, store.get_table(Reject, parts))
    }
    rows = sorted(found.values(), key=lambda r: (r.stage, r.reason, r.source))
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    for (of_stage, reason), count in sorted(Counter((r.stage, r.reason) for r in rows).items()):
        _out.print(f"{of_stage}/{reason}: {count}")
    if not rows:
        _out.print("no rejects")
    for row in rows[:limit]:
        _out.print(f"  {row.source}: {row.stage}/{row.reason}: {row.detail}", highlight=False)
    if len(rows) > limit:
        _out.print(f"  … and {len(rows) - limit} more; see --limit or --json")


@app.command()
def demo(config: ConfigOption = _DEFAULT_CONFIG, set_: SetOption = None) -> None:
    """Run the main job on the example corpus, then ask its questions in every mode and print the table.

    The last line is one JSON object with the counts, F1 by mode and seconds by stage.
    """
    from pipelines.demo import run_demo

    settings = load_config(config, set_ or [])
    with _result_only():
        result = run_demo(settings, _out)
    _print_json(result)


def _result_only() -> contextlib.AbstractContextManager[Any]:
    """Within this context, what libraries print goes to standard error: standard output is for the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


def _show_answers(answers: list[Answer]) -> None:
    for answer in answers:
        _out.print(f"[bold]{answer.mode:>8}[/]  {answer.text}", highlight=False)
        steps = ", ".join(f"{step} {ms:.0f}" for step, ms in answer.milliseconds.items())
        _out.print(f"          {steps} ms; {answer.prompt_tokens} prompt tokens, {answer.new_tokens} new")
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
                f"{passage.score:.2f}", passage.title, ", ".join(passage.sources), "\n".join(uses[passage.key])
            )
        _out.print(table)


def _use(passage: Any) -> str:
    places = [n for n, used in (("weights", passage.in_weights), ("prompt", passage.in_prompt)) if used]
    note = f" ({passage.note})" if passage.note else ""
    return " and ".join(places) + note


def _rows(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column()
    for row in rows:
        table.add_row(*row)
    _out.print(table)


def _print_json(document: Any) -> None:
    _out.file.write(json.dumps(document, ensure_ascii=False) + "\n")


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured yet: run a few passages first (--set corpus.limit=8)"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Run the command line; an expected error becomes its message and its exit code, never a traceback."""
    logging.basicConfig(level=os.environ.get("PRAG_LOG", "WARNING"), format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except PragError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
