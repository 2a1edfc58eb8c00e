"""`prag plan`: what a run would do and cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from pipelines.cli import options
from pipelines.cli.terminal import print_json, print_table, progress_to, result_only
from pipelines.words import counted, duration
from prag_core.data.files import shown, without_query

if TYPE_CHECKING:
    from pipelines.planning.plan import Plan

app = typer.Typer()


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag plan -c config.yaml --measure 12`")
def plan(
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    profile: options.Profile = None,
    measure: Annotated[
        int | None,
        typer.Option(
            "--measure",
            min=0,
            max=1_000_000,
            show_default=False,
            help="Augment and train this many passages now, to time them. By default a few, for two minutes at most, "
            "where nothing was measured before and it costs nothing; 0: none.",
        ),
    ] = None,
    price_gpu_hour: Annotated[
        float | None, typer.Option("--price-gpu-hour", min=0, help="The price of a GPU hour, in dollars.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what `prag run` would do and cost: passages, tokens, GPU-hours, wall time, bytes, requests, dollars.

    Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names, to read the corpus and the store; stores
    nothing. Times come from batches of this recipe that earlier runs stored. Where there are none, or with --measure,
    they come from a sample of passages, augmented and trained now. On a cluster, and where an endpoint augments, only
    --measure does that.
    """
    settings = options.settings_of(config, set_, {"run.profile": profile})
    cluster = os.environ.get("RAY_ADDRESS")
    ray = f"joining Ray at {cluster}" if cluster else "starting Ray on this machine"
    progress_to.print(f"plan: {ray}, to read {shown(without_query(settings.corpus.path))}")

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
        ("passages", f"{made.passages:,} ({counted(made.duplicates, 'duplicate')} merged)"),
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
        rows.append((f"time on {counted(int(actors), 'actor')}", _estimate(seconds, intervals.get(actors), _duration)))
    if made.gpu_hours is not None:
        rows.append(("GPU-hours", _estimate(made.gpu_hours, made.gpu_hours_interval, "{:,.2f}".format)))
    if made.dollars is not None:
        rows.append(("GPU dollars", _estimate(made.dollars, made.dollars_interval, "{:,.2f}".format)))
    return [*rows, ("based on", made.basis), ("recipe", made.recipe)]


def _estimate(value: float, interval: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    if interval is None:
        return f"{show(value)} (one batch measured: no interval)"
    return show(value) if interval[0] == interval[1] else f"{show(value)} ({show(interval[0])} to {show(interval[1])})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "Unknown. Run `prag plan --measure 12` to time 12 passages."
    return duration(seconds)
