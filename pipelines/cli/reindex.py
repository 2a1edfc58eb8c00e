"""`prag reindex`: the nightly job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli import options
from pipelines.cli.terminal import print_json, print_table, progress_to, result_only
from pipelines.words import counted

if TYPE_CHECKING:
    from pipelines.jobs.reindex import ReindexReport

app = typer.Typer()


@app.command(
    rich_help_panel=options.RUN,
    epilog="Example: `prag reindex -c config.yaml --corpus tonight.jsonl`",
)
def reindex(
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="The new corpus; default: the configuration's corpus.path.")
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option("--canary", help="JSON Lines of `question` and `answers`, asked before the publication."),
    ] = None,
    canary_min: Annotated[
        float | None,
        typer.Option("--canary-min", min=0, max=1, help="The lowest mean F1; default: that of the one in service."),
    ] = None,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    profile: options.Profile = None,
    wait_s: options.Wait = 0.0,
    take_over: options.TakeOver = False,
    as_json: options.Json = False,
) -> None:
    """Bring the store to a new state of the corpus: do what is new, check it, ask the canary, publish once.

    Unchanged passages keep their adapters, whatever their order or ids. Removed passages are no longer found once the
    new snapshot is published. If nothing changed, nothing is published. If the new snapshot answers the canary worse
    than the one in service, or below --canary-min, it is stored but not published (exit code 16).
    """
    settings = options.settings_of(config, set_, {"corpus.path": corpus, "run.profile": profile})

    from pipelines.jobs.reindex import reindex as run  # takes seconds: a wrong setting is reported before

    with result_only(tell=True):
        report = run(settings, progress_to, canary=canary, canary_min=canary_min, take_over=take_over, wait_s=wait_s)
    if as_json:
        print_json(report.to_json())
    else:
        _show_report(report)


def _show_report(report: ReindexReport) -> None:
    difference, least = report.difference, f"{report.canary_min or 0.0:.3f}"
    rows = [
        ("passages", f"{difference.passages_new} new, {difference.passages_gone} removed"),
        ("kept passages", f"{difference.passages_kept}, with {counted(difference.moved, 'new id')}"),
        ("ids", f"{difference.added} added, {difference.changed} changed, {difference.removed} removed"),
        ("made", f"{counted(report.augmented, 'augmentation')}, {counted(report.trained, 'adapter')}"),
        ("rejected", ", ".join(f"{reason} {n}" for reason, n in sorted(report.rejected.items())) or "none"),
        ("canary", "not asked" if report.canary_f1 is None else f"F1 {report.canary_f1:.3f}, at least {least} wanted"),
        ("in service", report.snapshot if report.published else f"{report.snapshot}, as before: nothing changed"),
    ]
    print_table(f"Reindex {report.run}", rows)
