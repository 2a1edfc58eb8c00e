"""The commands about where a job runs: `prag preflight`, `submit`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pipelines.cli import options
from pipelines.cli.stopping import stop_of
from pipelines.cli.terminal import out, print_json, print_raw, print_table, result_only
from pipelines.words import duration
from prag_core.errors import ConfigError

if TYPE_CHECKING:
    from cluster.preflight import CheckResult

app = typer.Typer()

_STYLES = {"ok": "green", "failed": "red", "warning": "yellow", "skipped": "dim"}


@app.command(rich_help_panel=options.CLUSTER, epilog="Example: `prag preflight -c config.yaml --profile cluster`")
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
        out.print(f"{duration(seconds['check'])}, after {duration(seconds['load'])} to load the libraries")
    found.raise_errors()


def _finding_row(finding: CheckResult) -> tuple[str | Text, ...]:
    outcome = Text(finding.outcome, _STYLES[finding.outcome])
    remedy = f"\n→ {finding.remedy}" if finding.remedy else ""
    took = "" if finding.duration_ms is None else f" ({duration(finding.duration_ms / 1e3)})"
    return finding.check, outcome, finding.where, f"{finding.detail}{took}{remedy}"


@app.command(rich_help_panel=options.CLUSTER, epilog="Example: `prag submit -c config.yaml run`")
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


def _variable(item: str) -> tuple[str, str]:
    name, separator, value = item.partition("=")
    if not separator or not name:
        raise ConfigError(f"--env {item!r} is not NAME=VALUE", "write it as HF_HUB_OFFLINE=1")
    return name, value
