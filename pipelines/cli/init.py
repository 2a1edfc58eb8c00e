"""`prag init`: from a corpus to a configuration."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pipelines.cli import options
from pipelines.cli.terminal import out
from pipelines.words import counted
from prag_core.config import Columns

if TYPE_CHECKING:
    from pipelines.jobs.init import Beginning

app = typer.Typer()

_FORMATS = {"jsonl": "JSON Lines", "tsv": "TSV", "parquet": "Parquet", "text": "text"}


@app.command(rich_help_panel=options.START, epilog="Example: `prag init corpus.jsonl`")
def init(
    corpus: Annotated[
        str, typer.Argument(metavar="[FOLDER|FILE]", help="The corpus: JSON Lines, TSV, Parquet or text, plain or gz.")
    ] = ".",
    to: Annotated[
        Path | None, typer.Option("--to", help="The file to write; default: config.yaml beside the corpus.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    text: Annotated[str, typer.Option(help="The field that holds the texts.")] = Columns().text,
    title: Annotated[str, typer.Option(help="The field that holds the titles.")] = Columns().title,
    id: Annotated[str, typer.Option("--id", help="The field that holds the ids.")] = Columns().id,
) -> None:
    """Look at a corpus of your own, say what it holds, and write a short configuration for it.

    Asks nothing, and changes nothing else. A record needs a text; an id and a title are good to have.
    """
    from pipelines.jobs.init import initialize

    _show(initialize(corpus, to, Columns(id=id, title=title, text=text), force=force))


def _show(begun: Beginning) -> None:
    found = begun.summary
    formats = Counter(_FORMATS[file.format] for file in found.listing.files)
    files = ", ".join(f"{counted(count, 'file')} of {name}" for name, count in formats.items())
    records = f"{found.certainty} {counted(found.records, 'record')}".strip()
    _line("corpus", f"{begun.corpus}: {records} in {files}")
    for item in found.listing.left_out:
        _line("", f"left out: {item}")
    if found.fields:
        used = {role: name for role, name in found.columns if name in found.fields}
        _line("fields", ", ".join(found.fields))
        _line("", "used: " + ", ".join(role if role == name else f"{name} as {role}" for role, name in used.items()))
        if "id" not in used:
            _line("", "no ids: a passage is called by its file and line; name a field by --id FIELD")
        if "title" not in used:
            _line("", "no titles: name a field by --title FIELD if there is one")
    kept = found.sampled - len(found.rejected)
    if found.passages > kept:
        number = round(found.passages / found.sampled * found.records)
        about = "" if found.sampled == found.records else "about "
        _line("passages", f"{about}{number:,}: long texts are split at sentence ends (corpus.max_words)")
    if found.rejected:
        first = found.rejected[0]
        rejected = f"{len(found.rejected):,} of {counted(found.sampled, 'record')} that were read cannot be used"
        _line("rejected", f"{rejected}, such as {first.source}: {first.detail}")
    where = f"on this machine's GPU, {begun.gpu.name}" if begun.gpu else "which comes with prag: for trying out, no GPU"
    _line("model", f"{begun.model}, {where}")
    _line("store", f"{begun.store} (made by the run)")
    _line("written", str(begun.file))
    out.print(f"\nNext: prag run -c {shlex.quote(str(begun.file))}", highlight=False, soft_wrap=True)


def _line(name: str, value: str) -> None:
    out.print(Text.assemble((f"{name:<10}", "bold"), value), soft_wrap=True)
