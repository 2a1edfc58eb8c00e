"""`prag keys`: the API keys of a server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli import options
from pipelines.cli.terminal import print_json, print_raw, print_table
from prag_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.serving.api_keys import KeyFile

app = typer.Typer(
    help="API keys of a server: a file that holds their hashes (`serve.api_keys`). A running server follows it.",
    no_args_is_help=True,
)

FileOption = Annotated[
    Path, typer.Option("--file", "-f", help="The key file, as serve.api_keys names it.", envvar="PRAG_API_KEYS")
]
_DEFAULT = Path("keys.json")


@app.command(epilog="Example: `prag keys add ada --file keys.json --access staff`")
def add(
    name: Annotated[str, typer.Argument(help="The name of the person or program that will use the key.")],
    file: FileOption = _DEFAULT,
    access: Annotated[
        list[str] | None, typer.Option(help="An access tag whose passages the key may see. May be given again.")
    ] = None,
    rate: Annotated[int, typer.Option(min=0, help="Questions a minute; 0: as serve.rate_per_minute says.")] = 0,
) -> None:
    """Make a key and print it. The key is not stored and cannot be shown again."""
    from pipelines.serving.api_keys import KeyFile

    print_raw(KeyFile(file).add(name, access or (), rate) + "\n")


@app.command("list", epilog="Example: `prag keys list --file keys.json`")
def list_(file: FileOption = _DEFAULT, as_json: options.Json = False) -> None:
    """List the keys of a file, without their secrets."""
    keys = [{name: value for name, value in asdict(key).items() if name != "hash"} for key in _existing(file).read()]
    if as_json:
        print_json(keys)
        return
    rows = []
    for key in keys:
        access, rate = ", ".join(key["access"]), str(key["rate_per_minute"] or "")
        rows.append((key["id"], key["name"], access, rate, key["created"], key["revoked"]))
    print_table(str(file), rows, ("id", "name", "access", "a minute", "created", "revoked"))


@app.command(epilog="Example: `prag keys revoke ada --file keys.json`")
def revoke(
    name: Annotated[str, typer.Argument(help="The key's name or id.")],
    file: FileOption = _DEFAULT,
) -> None:
    """Make a key invalid; a running server refuses it from the next request on."""
    key = _existing(file).revoke(name)
    print_raw(f"revoked {key.name} ({key.id})\n")


def _existing(file: Path) -> KeyFile:
    """Return a file of keys that must be there: otherwise a wrong name would pass for a file without keys."""
    from pipelines.serving.api_keys import KeyFile

    if not file.exists():
        raise ConfigError(f"{file}: no such file", "give the one that serve.api_keys names by --file")
    return KeyFile(file)
