"""`prag import-augmentations` and `export-augmentations`: augmentations made elsewhere, or for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli import options
from pipelines.cli.terminal import out, print_result, progress_to, result_only
from pipelines.words import counted

app = typer.Typer()


@app.command(
    "import-augmentations",
    rich_help_panel=options.RUN,
    epilog="Example: `prag import-augmentations -c config.yaml made.jsonl`",
)
def import_augmentations(
    file: Annotated[str, typer.Argument(help="JSON Lines of id, rewrites, qa, or the paper's published JSON.")],
    config: options.Config = options.EXAMPLE,
    passages_to: Annotated[
        Path | None, typer.Option(help="First write the passages of the paper's JSON to this file, as the corpus.")
    ] = None,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Store augmentations made elsewhere, for the passages of the configured corpus, completed as in a run.

    A later `prag run` uses them if `augment.import_file` names the same file.
    """
    from pipelines.jobs.augmentations import import_into_store
    from prag_core.augmentation.formats import write_corpus

    given: dict[str, object] = {"augment.import_file": file}
    if passages_to is not None:
        written = write_corpus(file, passages_to, options.settings_of(config, set_).storage)
        progress_to.print(f"{passages_to}: {counted(written, 'passage')}")
        given["corpus.path"] = str(passages_to)
    with result_only():
        counts = import_into_store(options.settings_of(config, set_, given), progress_to)
    text = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items())
    print_result(counts, text, as_json)


@app.command(
    "export-augmentations",
    rich_help_panel=options.RUN,
    epilog="Example: `prag export-augmentations -c config.yaml made.jsonl`",
)
def export_augmentations(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    config: options.Config = options.EXAMPLE,
    form: Annotated[
        Literal["jsonl", "paper"], typer.Option(help="`paper` is the format of the paper's published JSON.")
    ] = "jsonl",
    snapshot: options.Snapshot = None,
    set_: options.Set = None,
) -> None:
    """Write the augmentations of a snapshot's passages to a file that `import-augmentations` reads."""
    from pipelines.jobs.augmentations import export_from_store

    settings = options.settings_of(config, set_)
    chosen = options.snapshot_of(settings, snapshot)
    with result_only():
        count = export_from_store(settings, file, form, chosen, progress_to)
    out.print(f"{file}: {counted(count, 'augmentation')}")
