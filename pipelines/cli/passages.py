"""The commands about single passages: `prag rejects`, `retry`, `forget`, `export`, `import`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli import options
from pipelines.cli.terminal import out, print_json, print_result
from pipelines.words import counted

app = typer.Typer()

StageOption = Annotated[Literal["corpus", "augment", "train"] | None, typer.Option(help="Only rejects of this stage.")]


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag rejects -c config.yaml --stage train`")
def rejects(
    config: options.Config = options.EXAMPLE,
    stage: StageOption = None,
    limit: Annotated[int, typer.Option(min=0, help="The number of rejects to list one by one.")] = 20,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """List what the runs of the store rejected, with the reason and the place in the corpus."""
    from pipelines.maintenance.operations import list_rejects

    rows = list_rejects(options.store_of(config, set_), stage)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for reason, count in sorted(Counter(f"{row.stage}/{row.reason}" for row in rows).items()):
        out.print(f"{reason}: {count}")
    if not rows:
        out.print("no rejects")
    for row in rows[:limit]:
        out.print(f"  {row.source}: {row.stage}/{row.reason}: {row.detail}", highlight=False)
    if len(rows) > limit:
        out.print(f"  … and {len(rows) - limit} more; see --limit or --json")


@app.command(rich_help_panel=options.RUN, epilog="Example: `prag retry -c config.yaml --reason no_usable_pair`")
def retry(
    reason: Annotated[
        str | None, typer.Option(help="Only rejects with this reason; `prag rejects` lists them.")
    ] = None,
    stage: StageOption = None,
    everything: Annotated[bool, typer.Option("--all", help="All rejects, whatever the reason.")] = False,
    take_over: options.TakeOver = False,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Clear rejects: the next `prag run` tries these passages again."""
    from pipelines.maintenance import operations

    if not (reason or stage or everything):
        raise typer.BadParameter("give a --reason, a --stage, or --all", param_hint="prag retry")
    count = operations.retry(options.settings_of(config, set_), stage=stage, reason=reason, take_over=take_over)
    print_result(
        {"retried": count}, f"{counted(count, 'reject')} cleared" + ("; run `prag run`" if count else ""), as_json
    )


@app.command(rich_help_panel=options.STORE, epilog="Example: `prag forget -c config.yaml p17`")
def forget(
    passages: Annotated[list[str], typer.Argument(metavar="KEY|ID…", help="Keys, or ids in the corpus.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Use them again; give keys. Possible until `prag gc` removes their bytes.")
    ] = False,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Never use these passages again (right to erasure): in service at once, and in all later snapshots.

    Afterwards `prag run` makes a corpus and an index without them, even if the corpus file still has them, and
    `prag gc` removes their bytes. `prag gc` names the pinned snapshots that still hold some.
    """
    from pipelines.maintenance import operations

    done = operations.forget(options.store_of(config, set_), passages, undo=undo)
    if as_json:
        print_json({"keys": list(done.keys), "snapshot": done.snapshot})
        return
    known = {passage.key: f"{passage.title} ({', '.join(passage.sources)})" for passage in done.passages}
    for key in done.keys:
        out.print(f"{key}  {known.get(key, 'not in the corpus in service')}", highlight=False)
    out.print(f"snapshot {done.snapshot} is in service", highlight=False)
    if not undo:
        out.print("To erase the data itself, run `prag run`, then `prag gc`; it keeps what is younger than a day.")


@app.command(rich_help_panel=options.STORE, epilog="Example: `prag export -c config.yaml p17 --to adapter`")
def export(
    passage: Annotated[str, typer.Argument(metavar="KEY|ID", help="The passage's key, or its id in the corpus.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write; it must be new or empty.")],
    snapshot: options.Snapshot = None,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Write a passage's adapter as a PEFT folder with a README.md, which `PeftModel.from_pretrained` loads."""
    from pipelines.maintenance import adapters

    settings = options.settings_of(config, set_)
    key = adapters.export(settings, passage, to, options.snapshot_of(settings, snapshot))
    print_result({"key": key, "folder": str(to)}, f"the adapter of {key} is in {to}", as_json)


@app.command("import", rich_help_panel=options.STORE, epilog="Example: `prag import -c config.yaml adapter --id p17`")
def import_(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder: adapter_config.json, adapter_model.safetensors.")],
    key: Annotated[str | None, typer.Option("--key", help="The passage's key.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="The passage's id in the corpus, instead of the key.")] = None,
    take_over: options.TakeOver = False,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Make a PEFT folder the adapter of a passage, and put it into service.

    It must fit the recipe in service (rank, alpha, modules). It is used until the passage's augmentation changes.
    """
    from pipelines.maintenance import adapters

    if (key is None) == (id is None):
        raise typer.BadParameter("name the passage by --key or by --id", param_hint="prag import")
    found, snapshot = adapters.import_adapter(options.settings_of(config, set_), key or id or "", folder, take_over)
    text = f"{found} has the adapter of {folder}; snapshot {snapshot} is in service"
    print_result({"key": found, "snapshot": snapshot}, text, as_json)
