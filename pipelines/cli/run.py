"""`prag run`, the main job, and `prag demo`, which runs it on the example corpus and asks its questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.filesize import decimal

from pipelines.cli import options
from pipelines.cli.terminal import out, print_json, print_table, progress_to, result_only
from pipelines.execution.spinner import spinner
from pipelines.words import counted, duration

if TYPE_CHECKING:
    from pipelines.jobs.run import RunReport

app = typer.Typer()


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag run -c config.yaml`")
def run(
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    profile: options.Profile = None,
    take_over: options.TakeOver = False,
    wait_s: options.Wait = 0.0,
    as_json: options.Json = False,
) -> None:
    """Do the main job: corpus → augment → train → store → index → publish.

    Run it again after any failure: it does only what is missing, and keeps what a killed run had stored.
    """
    settings = options.settings_of(config, set_, {"run.profile": profile})
    with spinner(progress_to, "starting"):
        from pipelines.jobs.run import run_job  # takes seconds: a wrong setting is reported before

    with result_only(tell=True):
        report = run_job(settings, progress_to, take_over=take_over, wait_s=wait_s)
    if as_json:
        print_json(report.to_json())
    else:
        _show_report(report)


@app.command(rich_help_panel=options.START, epilog="Example: `prag demo`")
def demo(config: options.Config = options.EXAMPLE, set_: options.Set = None) -> None:
    """Run the main job on the example corpus, ask its questions in every mode, and print tables.

    The last line is one JSON object with the counts, F1 by mode and seconds by stage.
    """
    settings = options.settings_of(config, set_)
    with spinner(progress_to, "starting"):
        from pipelines.jobs.demo import run_demo  # takes seconds

    with result_only(tell=True):
        result = run_demo(settings, out, progress_to)
    print_json(result)


def _show_report(report: RunReport) -> None:
    columns = ("stage", "in", "done", "reused", "rejected", "time", "passages/s", "bytes")
    rows = [
        (
            stage.stage,
            str(stage.taken),
            str(stage.done),
            str(stage.earlier),
            str(sum(stage.rejected.values())),
            duration(stage.seconds),
            f"{stage.per_second:.2f}",
            decimal(stage.bytes) if stage.bytes else "",
        )
        for stage in report.stages
    ]
    print_table(f"Run {report.run}", rows, columns, right=columns[1:])
    for reason, count in report.rejected.items():
        out.print(f"rejected: {reason} {count}; `prag rejects` lists them")
    adapters, seconds = counted(report.adapters, "adapter"), duration(report.seconds)
    out.print(f"{adapters}; snapshot {report.snapshot} in service; {seconds}", soft_wrap=True)
