"""The commands about where a job runs and what it costs: `prag plan`, `preflight`, `submit`, `status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.text import Text

from pipelines.cli import options
from pipelines.cli.stopping import stop_of
from pipelines.cli.terminal import out, print_json, print_raw, print_table, progress_to, result_only
from prag_core.errors import ConfigError

if TYPE_CHECKING:
    from cluster.preflight import CheckResult
    from pipelines.jobs.status import StoreStatus
    from pipelines.planning.plan import Plan
    from prag_core.store.objects import Store

app = typer.Typer()

_STYLES = {"ok": "green", "failed": "red", "warning": "yellow", "skipped": "dim"}


@app.command()
def plan(
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    profile: options.Profile = None,
    measure: Annotated[
        int,
        typer.Option(
            "--measure", min=0, max=1_000_000, help="Augment and train this many passages now; stores nothing."
        ),
    ] = 0,
    price_gpu_hour: Annotated[
        float | None, typer.Option("--price-gpu-hour", min=0, help="The price of a GPU hour, in dollars.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what `prag run` would do and cost: passages, tokens, GPU-hours, wall time, bytes, requests, dollars.

    Times come from batches of this recipe that earlier runs stored. With --measure they come from a sample of
    passages, augmented and trained now on the cluster that RAY_ADDRESS names. Without --measure nothing is spent.
    """
    settings = options.settings_of(config, set_, {"run.profile": profile})

    from pipelines.planning.plan import make_plan  # takes seconds

    with result_only():
        made = make_plan(settings, progress_to, measured=measure, price_gpu_hour=price_gpu_hour)
    if as_json:
        print_json(made.to_json())
    else:
        print_table("Plan", _plan_rows(made))


def _plan_rows(made: Plan) -> list[tuple[str, str]]:
    rejected = ", ".join(f"{reason} {n}" for reason, n in sorted(made.rejected.items())) or "none"
    rows = [
        ("records read", f"{made.records:,}"),
        ("rejected", rejected),
        ("passages", f"{made.passages:,} ({made.duplicates:,} duplicates merged)"),
        ("to augment", f"{made.to_augment:,}"),
        ("to train", f"{made.to_train:,}"),
        ("training tokens", _estimate(made.tokens, made.tokens_interval, "{:,.0f}".format)),
        ("adapter bytes", decimal(made.adapter_bytes)),
        ("requests to the store", f"{made.puts:,} writes, {made.gets:,} reads"),
        ("time to augment, one actor", _duration(made.augment_seconds)),
        ("time to train, one actor", _duration(made.train_seconds)),
    ]
    intervals = made.wall_seconds_interval or {}
    for actors, seconds in (made.wall_seconds or {}).items():
        rows.append((f"time on {actors} actors", _estimate(seconds, intervals.get(actors), _duration)))
    if made.gpu_hours is not None:
        rows.append(("GPU-hours", _estimate(made.gpu_hours, made.gpu_hours_interval, "{:,.2f}".format)))
    if made.dollars is not None:
        rows.append(("GPU dollars", _estimate(made.dollars, made.dollars_interval, "{:,.2f}".format)))
    return [*rows, ("basis of the times", made.basis), ("recipe", made.recipe)]


@app.command()
def preflight(
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    profile: options.Profile = None,
    as_json: options.Json = False,
) -> None:
    """Check in seconds what would stop `prag run` later: store, model, corpus, Java; on a cluster, each node.

    The cluster is the one that RAY_ADDRESS names. `prag run` begins with the same checks.
    """
    settings = options.settings_of(config, set_, {"run.profile": profile})
    begun = time.perf_counter()
    from pipelines.planning.preflight import preflight as check

    loaded = time.perf_counter()
    with result_only():
        found = check(settings)
    seconds = {"load": round(loaded - begun, 2), "check": round(time.perf_counter() - loaded, 2)}
    if as_json:
        print_json({"findings": [vars(finding) for finding in found.findings], "seconds": seconds})
    else:
        print_table("Preflight", map(_finding_row, found.findings), ("check", "", "node", "detail"))
        out.print(f"{seconds['check']:.2f} s, after {seconds['load']:.2f} s to load the libraries")
    found.raise_errors()


def _finding_row(finding: CheckResult) -> tuple[str | Text, ...]:
    outcome = Text(finding.outcome, _STYLES[finding.outcome])
    remedy = f"\n→ {finding.remedy}" if finding.remedy else ""
    duration = "" if finding.duration_ms is None else f" ({finding.duration_ms:.0f} ms)"
    return finding.check, outcome, finding.where, f"{finding.detail}{duration}{remedy}"


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(help="The command to run, e.g. `run`; its options after `--`.")],
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    profile: options.Profile = "cluster",
    address: Annotated[
        str, typer.Option(help="The cluster's job server.", envvar="RAY_API_SERVER_ADDRESS")
    ] = "http://127.0.0.1:8265",
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the job. May be given again.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once the job is submitted.")] = False,
    *,
    context: typer.Context,
) -> None:
    """Run a command as a job on a Ray cluster, and follow it: `prag submit -c config.yaml run`.

    The configuration travels with the job; the files it names must be where every node sees them. The job's id
    follows from the command and the configuration, so submitting the same again follows the running job. If that job
    has ended, a new one starts, which does what is missing. Ctrl+C leaves the job running.
    """
    from pipelines.jobs.submit import submit as start

    known = context.find_root().command.list_commands(context)  # type: ignore[attr-defined]
    if command[0] not in known:
        raise ConfigError(f"prag submit: there is no command {command[0]!r}", f"known are {', '.join(known)}")
    variables = dict(_variable(item) for item in env or [])
    settings = options.settings_of(config, set_, {"run.profile": profile})
    stop = stop_of(context)
    stop.remedy = f"a job that was submitted goes on; `ray job stop` ends it; {stop.remedy}"
    outcome = start(settings, command, address, variables, print_raw, wait=not no_wait)
    if outcome.exit_code is not None:
        print_raw(f"job {outcome.id}: {outcome.message}\n")
        raise typer.Exit(outcome.exit_code)


@app.command()
def status(
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the newest run until it ends.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.1, help="With --watch: seconds between two checks.")] = 2.0,
    as_json: options.Json = False,
    *,
    context: typer.Context,
) -> None:
    """Show the snapshot in service and how far the last runs are, from any machine that reaches the store.

    With --watch the exit code is 0 when the run finished, and 1 when it failed or was stopped.
    """
    from pipelines.jobs.status import read_status

    store = options.store_of(config, set_)
    if watch:
        stop = stop_of(context)
        stop.remedy = f"the run goes on; {stop.remedy}"
        raise typer.Exit(_watch(store, every_s, as_json))
    found = read_status(store)
    if as_json:
        print_json(found.to_json())
    else:
        _show_status(found)


def _watch(store: Store, every_s: float, as_json: bool) -> int:
    from pipelines.jobs.status import watch

    state = ""
    for run in watch(store, every_s):
        state = run.state
        print_json(vars(run)) if as_json else out.print(run.line(), highlight=False, soft_wrap=True)
    if not state:
        out.print(f"{store.url}: no run yet")
    return 0 if state in ("finished", "") else 1


def _show_status(found: StoreStatus) -> None:
    if found.snapshot is None:
        out.print(f"{found.store}: nothing is published yet; run `prag run`")
    else:
        rows = []
        for name in ("created", "passages", "adapters", "corpus_version", "index", "recipe", "base_model"):
            value = getattr(found.snapshot, name)
            rows.append((name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value))
        print_table(f"Snapshot {found.snapshot.id}", rows)
    for run in found.runs:
        out.print(run.line(), highlight=False, soft_wrap=True)


def _estimate(value: float, interval: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    if interval is None:
        return f"{show(value)} (one batch measured: no interval)"
    return show(value) if interval[0] == interval[1] else f"{show(value)} ({show(interval[0])} to {show(interval[1])})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured yet: --measure 24 tries 24 passages"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _variable(item: str) -> tuple[str, str]:
    name, separator, value = item.partition("=")
    if not separator or not name:
        raise ConfigError(f"--env {item!r} is not NAME=VALUE", "write it as HF_HUB_OFFLINE=1")
    return name, value
