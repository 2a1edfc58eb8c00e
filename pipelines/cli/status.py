"""`prag status`: the snapshot in service, and how far runs are."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from pipelines.cli import options
from pipelines.cli.stopping import stop_of
from pipelines.cli.terminal import out, print_json, print_table

if TYPE_CHECKING:
    from pipelines.jobs.status import StoreStatus
    from prag_core.store.objects import Store

app = typer.Typer()


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag status -c config.yaml --watch`")
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
        stop.remedy = f"The run goes on. {stop.remedy}"
        raise typer.Exit(_watch(store, every_s, as_json))
    found = read_status(store)
    if as_json:
        print_json(found.to_json())
    else:
        _show_status(found, store)


def _watch(store: Store, every_s: float, as_json: bool) -> int:
    from pipelines.jobs.status import watch

    state = ""
    with contextlib.ExitStack() as shown:
        live: Live | None = None
        for run in watch(store, every_s):
            state = run.state
            if as_json:
                print_json(vars(run))
            elif not out.is_terminal or state != "running":
                shown.close()
                out.print(run.line(), highlight=False, soft_wrap=True)
            else:
                live = live or shown.enter_context(Live(console=out, transient=True))
                live.update(Spinner("dots", Text(f"{run.line()} (written {run.updated[11:19]} UTC)")))
    if not state:
        out.print(f"{store.url}: no run yet")
    return 0 if state in ("finished", "") else 1


def _show_status(found: StoreStatus, store: Store) -> None:
    if found.snapshot is None:
        remedy = "" if any(run.state == "running" for run in found.runs) else "; run `prag run`"
        out.print(f"{found.store}: nothing is published yet{remedy}")
    else:
        from prag_core.store.snapshot import recipe_name

        snapshot = found.snapshot
        rows = [
            ("created", snapshot.created.partition(".")[0].replace("T", " ") + " UTC"),
            ("passages", f"{snapshot.passages:,}"),
            ("adapters", f"{snapshot.adapters:,}"),
            ("recipe", f"{recipe_name(store, snapshot)} {snapshot.recipe}".strip()),
            ("base model", snapshot.base_model),
            ("corpus version", snapshot.corpus_version),
            ("index", snapshot.index),
        ]
        print_table(f"Snapshot {found.snapshot.id}", rows)
    for run in found.runs:
        out.print(run.line(), highlight=False, soft_wrap=True)
