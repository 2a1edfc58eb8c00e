"""`prag report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import options
from pipelines.cli.terminal import print_result

app = typer.Typer()


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag report -c config.yaml --to run-report.html`")
def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run's id; by default the newest.")] = None,
    to: Annotated[Path, typer.Option("--to", help="The file to write.")] = Path("run-report.html"),
    price_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="Dollars for an hour of one GPU, to show what the run cost.")
    ] = None,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Write a report of a run: passages, rejects, pairs and coverage, losses, seconds and cost by stage.

    It is one HTML page without other files. A run that is under way or has failed has a report too.
    """
    store = options.store_of(config, set_)

    from pipelines.jobs.run_report import read_run_facts, run_page  # takes a second

    facts = read_run_facts(store, run, price_gpu_hour)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(run_page(facts), encoding="utf-8")
    print_result({**facts.to_json(), "file": str(to)}, f"written: {to}", as_json)
