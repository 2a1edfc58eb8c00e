"""The command line `prag`: its commands, and how an error ends it."""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from cluster.session import SessionError
from pipelines.cli import (
    ask,
    augmentations,
    cluster,
    evaluate,
    init,
    keys,
    options,
    passages,
    plan,
    reindex,
    report,
    run,
    serve,
    snapshots,
    status,
    store,
    warmup,
)
from pipelines.cli.stopping import run_until_stopped
from pipelines.cli.terminal import out
from prag_core.data.parsing import is_storable
from prag_core.errors import EXIT_CODES, ClusterError, ConfigError, PragError
from prag_core.packaged import local_path

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

app = typer.Typer(
    name="prag",
    help=(
        "Parametric RAG: passages become LoRA adapters; a question adds the adapters it needs to the weights.\n\n"
        "A first session with a corpus of your own: `prag init corpus.jsonl`, `prag run -c config.yaml`, "
        '`prag ask -c config.yaml "Who …?"`. Without `--config`, commands use the packaged example, '
        f"`{local_path(options.EXAMPLE)}`."
    ),
    epilog=(
        f"Exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}. "
        "`prag submit` ends with the code of its job."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
# The order of the groups in `prag --help`, and of the commands in each.
for module in (init, run, plan, status, report, reindex, warmup, augmentations, ask, serve):
    app.add_typer(module.app)
app.add_typer(keys.app, name="keys", rich_help_panel=options.ASK)
app.add_typer(snapshots.app, name="snapshots", rich_help_panel=options.STORE)
for module in (store, passages, evaluate, cluster):
    app.add_typer(module.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"prag {importlib.metadata.version('prag-ray')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. An expected error, or a signal, ends it with a message and an exit code, no traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Ray would print a stack when this process gets a SIGTERM, which is no failure. It reads this when it is imported.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a sign that the terminal lacks is no reason to fail
    try:
        _check_utf8()
        logging.basicConfig(level=_log_level(), format="%(levelname)s %(name)s: %(message)s")
        run_until_stopped(lambda stop: app(obj=stop, prog_name="prag"))
    except (PragError, SessionError) as raised:
        error = raised if isinstance(raised, PragError) else ClusterError(str(raised), raised.remedy)
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(error.exit_code)
    except OSError as raised:  # a file of the user's, or standard output, that cannot be written
        logging.getLogger(__name__).debug("%s", raised, exc_info=raised)
        remedy = "check the path, the permissions and the free space there; PRAG_LOG=DEBUG shows more"
        typer.secho(f"error: {PragError(str(raised), remedy)}", err=True, fg="red")
        sys.exit(PragError.exit_code)


def _log_level() -> str:
    """Return the level that PRAG_LOG names, and set it there as Ray Serve wants it.

    Raises:
        ConfigError: when there is no such level.
    """
    level = (os.environ.get("PRAG_LOG") or "WARNING").upper()
    if level not in _LOG_LEVELS:
        raise ConfigError(f"PRAG_LOG = {level!r}: no such level", f"known are {', '.join(_LOG_LEVELS)}")
    os.environ["PRAG_LOG"] = level
    return level


def _check_utf8() -> None:
    """Check that everything a user has typed can be stored and shown.

    Raises:
        ConfigError: when an argument, a variable of ours or the current folder holds bytes that are not UTF-8, or
            there is no current folder any more.
    """
    try:
        given = [("the current folder", str(Path.cwd()))]  # Ray sends it to its workers
    except FileNotFoundError:
        raise ConfigError("the current folder was removed", "go to another one") from None
    given += [("argument", argument) for argument in sys.argv[1:]]
    given += [(name, value) for name, value in os.environ.items() if name.startswith("PRAG_")]
    for name, value in given:
        if not is_storable(value):
            from prag_core.data.files import shown

            raise ConfigError(
                f'{name} "{shown(value)}": holds bytes that are not UTF-8',
                "type it in UTF-8, and rename a file whose name is not UTF-8",
            )
