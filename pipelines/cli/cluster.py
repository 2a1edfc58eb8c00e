"""The commands about where a job runs and what it costs: `prag plan`, `preflight`, `submit`, `status`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.cli.terminal import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    ProfileOption,
    SetOption,
    out,
    print_json,
    settings_of,
)
from prag_core.errors import ConfigError

_STYLES = {"ok": "green", "failed": "red", "warning": "yellow", "skipped": "dim"}


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (plan, preflight, submit, status):
        app.command()(command)


def plan(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    profile: ProfileOption = None,
    measure: Annotated[
        int, typer.Option("--measure", min=0, help="Augment and train so many passages now, to know; stores nothing.")
    ] = 0,
    price_gpu_hour: Annotated[
        float | None, typer.Option("--price-gpu-hour", min=0, help="What an hour of a GPU costs, in dollars.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what `prag run` would do and cost: passages, tokens, GPU-hours, wall time, bytes, requests, dollars.

    Times come from the batches that the store holds of this recipe, or with --measure from a sample that is really
    augmented and trained, on the cluster that RAY_ADDRESS names. Without --measure nothing is spent.
    """
    settings = settings_of(config, set_, profile)

    from pipelines.planning.plan import make_plan  # seconds of imports

    with contextlib.redirect_stdout(sys.stderr):
        made = make_plan(settings, Console(stderr=True), measured=measure, price_gpu_hour=price_gpu_hour)
    if as_json:
        print_json(made.to_json())
        return
    rejected = ", ".join(f"{reason} {n}" for reason, n in sorted(made.rejected.items())) or "none"
    table = Table(title="Plan", show_header=False)
    rows = [
        ("records read", f"{made.records:,}"),
        ("rejected", rejected),
        ("passages", f"{made.passages:,} ({made.duplicates:,} duplicates merged)"),
        ("to augment", f"{made.to_augment:,}"),
        ("to train", f"{made.to_train:,}"),
        ("training tokens", _sure(made.tokens, made.tokens_interval, "{:,.0f}".format)),
        ("adapter bytes", size_text(made.adapter_bytes)),
        ("requests to the store", f"{made.puts:,} writes, {made.gets:,} reads"),
        ("time to augment, one actor", _duration(made.augment_seconds)),
        ("time to train, one actor", _duration(made.train_seconds)),
    ]
    intervals = made.wall_seconds_interval or {}
    rows += [
        (f"time on {n} actors", _sure(wall, intervals.get(n), _duration))
        for n, wall in (made.wall_seconds or {}).items()
    ]
    if made.gpu_hours is not None:
        rows.append(("GPU-hours", _sure(made.gpu_hours, made.gpu_hours_interval, "{:,.2f}".format)))
    if made.dollars is not None:
        rows.append(("GPU dollars", _sure(made.dollars, made.dollars_interval, "{:,.2f}".format)))
    rows += [("times rest on", made.basis), ("recipe", made.recipe)]
    for row in rows:
        table.add_row(*row)
    out.print(table)


def preflight(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check in seconds what would stop `prag run` later: store, model, corpus, Java; on a cluster, each node.

    The cluster is the one that RAY_ADDRESS names. `prag run` begins with the same checks.
    """
    settings = settings_of(config, set_, profile)
    begun = time.perf_counter()
    from pipelines.planning.preflight import preflight as look

    loaded = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        found = look(settings)
    seconds = {"load": round(loaded - begun, 2), "check": round(time.perf_counter() - loaded, 2)}
    if as_json:
        print_json({"findings": [vars(finding) for finding in found.findings], "seconds": seconds})
    else:
        table = Table(title="Preflight")
        for name in ("check", "", "node", "what"):
            table.add_column(name)
        for f in found.findings:
            remedy = f"\n→ {f.remedy}" if f.remedy else ""
            table.add_row(f.check, f"[{_STYLES[f.outcome]}]{f.outcome}[/]", f.where, f"{f.detail}{remedy}")
        out.print(table)
        out.print(f"{seconds['check']:.2f} s, after {seconds['load']:.2f} s to load the libraries")
    found.described()


def submit(
    command: Annotated[list[str], typer.Argument(help="What to run, e.g. `run`; its options after `--`.")],
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    profile: ProfileOption = "cluster",
    address: Annotated[
        str, typer.Option(help="The cluster's job server.", envvar="RAY_API_SERVER_ADDRESS")
    ] = "http://127.0.0.1:8265",
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the job. May be given again.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave the job alone once it is submitted.")] = False,
) -> None:
    """Run a command as a job on a Ray cluster, and follow it: `prag submit -c config.yaml run`.

    The configuration travels with the job; its files must be where every node sees them. The job's id follows from
    the command and the configuration, so submitting again follows the job that runs already. After one that has
    ended, a new one starts, which does what is missing. Ctrl+C leaves the job running.
    """
    from pipelines.jobs.submit import submit as start

    variables = dict(_variable(item) for item in env or [])
    settings = settings_of(config, set_, profile)
    try:
        outcome = start(settings, command, address, variables, _write, wait=not no_wait)
    except KeyboardInterrupt:
        _write("the job goes on; the same command follows it again, `ray job stop` ends it\n")
        raise typer.Exit(130) from None
    if outcome.exit_code is None:
        return
    _write(f"job {outcome.id}: {outcome.message}\n")
    raise typer.Exit(outcome.exit_code)


def status(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the newest run until it ends.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show what the store holds: the snapshot in service, and where the last runs stand, from any machine.

    With --watch the exit code is 0 when the run finished, and 1 when it failed or was stopped.
    """
    from pipelines.jobs.status import read_status
    from pipelines.jobs.status import watch as follow
    from prag_core.store.objects import open_store

    store = open_store(settings_of(config, set_))
    if watch:
        state = ""
        for run in follow(store, every):
            state = run.state
            print_json(vars(run)) if as_json else out.print(run.line(), highlight=False, soft_wrap=True)
        if not state:
            out.print(f"{store.url}: no run yet")
        raise typer.Exit(0 if state in ("finished", "") else 1)
    found = read_status(store)
    if as_json:
        print_json(found.to_json())
        return
    if found.snapshot is None:
        out.print(f"{store.url}: nothing is published yet; run `prag run`")
    else:
        table = Table(title=f"Snapshot {found.snapshot.id}", show_header=False)
        for name in ("created", "passages", "adapters", "corpus_version", "index", "recipe", "base_model"):
            value = getattr(found.snapshot, name)
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
        out.print(table)
    for run in found.runs:
        out.print(run.line(), highlight=False, soft_wrap=True)


def size_text(size: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _sure(value: float, interval: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    if interval is None:
        return f"{show(value)} (one batch measured: no interval)"
    return show(value) if interval[0] == interval[1] else f"{show(value)} ({show(interval[0])} to {show(interval[1])})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured yet: --measure 24 tries so many passages"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _variable(item: str) -> tuple[str, str]:
    name, separator, value = item.partition("=")
    if not separator or not name:
        raise ConfigError(f"--env {item!r} is not NAME=VALUE", "write it as HF_HUB_OFFLINE=1")
    return name, value


def _write(text: str) -> None:
    out.file.write(text)
    out.file.flush()
