"""`prag import-augmentations` and `export-augmentations`: augmentations made elsewhere, or for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.terminal import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    SetOption,
    out,
    print_json,
    progress_to,
    result_only,
    settings_of,
)

app = typer.Typer()


@app.command("import-augmentations")
def import_augmentations(
    file: Annotated[str, typer.Argument(help="JSON Lines of id, rewrites, qa, or the paper's published JSON.")],
    config: ConfigOption = DEFAULT_CONFIG,
    passages_to: Annotated[
        Path | None, typer.Option(help="First write the passages of the paper's JSON to this file, as the corpus.")
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store augmentations made elsewhere, for the passages of the configured corpus.

    A later `prag run` uses them if `augment.import_file` names the same file.
    """
    from pipelines.jobs.augmentations import import_into_store
    from prag_core.augmentation.formats import write_corpus

    options: dict[str, object] = {"augment.import_file": file}
    if passages_to is not None:
        progress_to.print(f"{passages_to}: {write_corpus(file, passages_to)} passages")
        options["corpus.path"] = str(passages_to)
    with result_only():
        counts = import_into_store(settings_of(config, set_, options), progress_to)
    if as_json:
        print_json(counts)
    else:
        out.print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))


@app.command("export-augmentations")
def export_augmentations(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    config: ConfigOption = DEFAULT_CONFIG,
    form: Annotated[
        Literal["jsonl", "paper"], typer.Option(help="`paper` is the format of the paper's published JSON.")
    ] = "jsonl",
    snapshot: Annotated[str | None, typer.Option(help="Use this snapshot, not the one in service.")] = None,
    set_: SetOption = None,
) -> None:
    """Write the augmentations of a snapshot's passages to a file that `import-augmentations` reads."""
    from pipelines.jobs.augmentations import export_from_store

    with result_only():
        count = export_from_store(settings_of(config, set_), file, form, snapshot, progress_to)
    out.print(f"{file}: {count} augmentations")
