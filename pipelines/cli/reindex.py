"""The command of every night: `prag reindex`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.terminal import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    ProfileOption,
    SetOption,
    print_json,
    print_rows,
    progress_to,
    result_only,
    settings_of,
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(reindex)


def reindex(
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="The new corpus; by default the configuration's corpus.path.")
    ] = None,
    canary: Annotated[
        Path | None, typer.Option("--canary", help="JSON Lines of `question` and `answers`, asked before publishing.")
    ] = None,
    canary_min: Annotated[
        float | None,
        typer.Option(
            "--canary-min", min=0, max=1, help="Publish from this mean F1 on; default: what is in service reaches."
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    profile: ProfileOption = None,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for another run's lease.")] = 0.0,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the store's lease from a run that is known to be dead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the store to a new state of the corpus: do what is new, check, ask the canary, publish once.

    Passages that did not change keep their adapters, whatever their order or ids. What was removed is found no more
    from the publication on. When nothing changed, nothing is published. A candidate that answers the canary worse
    than what is in service, or than --canary-min, is stored and not published (exit code 16).
    """
    overrides = [*(set_ or []), *([f"corpus.path={corpus}"] if corpus else [])]
    settings = settings_of(config, overrides, profile)

    from pipelines.jobs.reindex import reindex as run  # seconds of imports

    with result_only():
        report = run(
            settings,
            progress_to,
            canary=canary,
            canary_min=canary_min,
            take_over=take_over,
            wait_s=wait_s,
        )
    if as_json:
        print_json(report.to_json())
        return
    difference, least = report.difference, f"{report.canary_min or 0.0:.3f}"
    rows = [
        ("passages", f"{difference.passages_new} new, {difference.passages_gone} gone"),
        ("kept passages", f"{difference.passages_kept}, {difference.moved} ids of them new"),
        ("ids", f"{difference.added} added, {difference.changed} changed, {difference.removed} removed"),
        ("made", f"{report.augmented} augmentations, {report.trained} adapters"),
        ("rejected", ", ".join(f"{reason} {n}" for reason, n in sorted(report.rejected.items())) or "none"),
        ("canary", "not asked" if report.canary_f1 is None else f"F1 {report.canary_f1:.3f}, {least} asked for"),
        ("in service", report.snapshot if report.published else f"{report.snapshot}, as before: nothing changed"),
    ]
    print_rows(f"Reindex {report.run}", rows)
