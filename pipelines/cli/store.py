"""The command line's verbs for whoever keeps a store: check, mend, clean, look, forget, export, import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.cli.snapshots import snapshots_app
from pipelines.cli.terminal import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    SetOption,
    bytes_text,
    out,
    parse_age,
    print_json,
    print_rows,
    progress_to,
    result_only,
)
from prag_core.config import Config
from prag_core.config_file import load_config
from prag_core.errors import StoreError

if TYPE_CHECKING:
    from pipelines.maintenance.operations import RepairReport
    from prag_core.maintenance.inventory import Finding
    from prag_core.store.objects import Store


store_app = typer.Typer()
store_app.add_typer(snapshots_app, name="snapshots")

TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take the store's lease from a run that is known to be dead.")
]
Passage = Annotated[str, typer.Argument(metavar="KEY|ID", help="A passage's key, or its id in the corpus.")]

_SHOWN = 50


@store_app.command()
def verify(
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte: checksums, finite values, shapes. Else sizes and presence.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the store, in parallel; changes nothing. Exits with 5 when it is damaged.

    `prag verify` looks whether each object that something names is there and long enough; `prag verify --full` reads
    them all. `prag repair` mends what is found.
    """
    from pipelines.maintenance import operations as operate

    settings = load_config(config, set_ or [])
    with result_only():
        verified = operate.verify(settings, progress_to, full=full)
    if as_json:
        print_json(verified.to_json())
    else:
        _show_findings(verified.findings)
        seconds = max(verified.seconds, 1e-9)
        rate = f"{bytes_text(verified.size_bytes / seconds)}/s" if full else "sizes and presence only"
        out.print(
            f"{verified.objects:,} objects, {bytes_text(verified.size_bytes)}, {seconds:.1f} s ({rate}): "
            + (f"{len(verified.findings)} damaged; run `prag repair`" if verified.findings else "no damage")
        )
    if verified.findings:
        raise typer.Exit(StoreError.exit_code)


@store_app.command()
def repair(
    fast: Annotated[bool, typer.Option("--fast", help="Check sizes and presence only, as `prag verify` does.")] = False,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Make again what was taken out, or leave that to the next run.")
    ] = True,
    take_over: TakeOver = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mend the store: find what is damaged, take it out, and run the job, which makes it again.

    Good adapters beside a damaged one are kept as they are. Killed at any moment, the same command goes on. Until the
    run is done, passages without their adapter go into the prompt.
    """
    from pipelines.maintenance import operations as operate

    settings = load_config(config, set_ or [])
    with result_only():
        mended = operate.repair_store(settings, progress_to, full=not fast, run=run, take_over=take_over)
    if as_json:
        print_json(mended.to_json())
        return
    _show_mended(mended)


def _show_mended(mended: RepairReport) -> None:
    _show_findings(mended.verified.findings)
    if mended.repaired is None:
        out.print(f"{mended.verified.objects:,} objects: no damage, nothing to mend")
        return
    lost = [finding.name for finding in mended.verified.findings if not finding.repairable]
    print_rows(
        "Repair",
        [
            ("damaged", f"{len(mended.verified.findings):,}"),
            ("adapters taken out", f"{len(mended.repaired.dropped):,}"),
            ("ledger parts replaced", f"{len(mended.repaired.moved):,}"),
            ("objects removed", f"{len(mended.repaired.removed):,}"),
            ("lost for good", ", ".join(lost) or "nothing"),
            ("snapshot in service", (mended.run or {}).get("snapshot") or mended.repaired.serving or "none"),
            ("made again", _made_again(mended.run)),
        ],
    )


def _made_again(run: dict[str, Any] | None) -> str:
    if run is None:
        return "not yet: run `prag run`"
    made = {stage["stage"]: stage["done"] - stage["earlier"] for stage in run["stages"] if stage["stage"] != "corpus"}
    return ", ".join(f"{stage} {n:,}" for stage, n in made.items() if n) or "nothing was missing"


@store_app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go. Try this first.")] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Newest snapshots to keep; default: storage.keep_snapshots.")
    ] = None,
    grace: Annotated[
        str, typer.Option(help="Leave alone what is younger: 30m, 24h, 7d. Writers may still be at work.")
    ] = "24h",
    take_over: TakeOver = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compact the ledger, and remove what nobody needs any more.

    Kept are the newest snapshots, the pinned ones, the one in service, and all that they name; also what recent runs
    would resume from, augmentations and rejects. Ledger parts become few, shards with few adapters that still count
    are written anew, and the bytes of forgotten passages go, as do adapters of passages that no kept corpus has.
    """
    from pipelines.maintenance import operations as operate

    settings = load_config(config, set_ or [])
    try:
        grace_s = parse_age(grace)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--grace") from None
    with result_only():
        done = operate.collect_garbage(
            settings, progress_to, keep=keep, grace_s=grace_s, dry_run=dry_run, take_over=take_over
        )
    if as_json:
        print_json(done.to_json())
        return
    would = "would go" if dry_run else "removed"
    table = Table(title=f"Garbage ({would})")
    for name in ("what", "objects", "bytes"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for kind, (count, size) in done.garbage.by_kind().items():
        table.add_row(kind, f"{count:,}", bytes_text(size))
    table.add_row("all", f"{len(done.garbage.objects):,}", bytes_text(done.garbage.size_bytes))
    out.print(table)
    if done.compacted:
        c = done.compacted
        out.print(
            f"ledger: {c.rows:,} rows in {c.parts:,} parts; {c.superseded:,} superseded, {c.forgotten:,} forgotten"
            + (f"; now {c.new_parts:,} parts" if c.new_parts else "")
        )
    if done.erased:
        out.print(f"forgotten passages were taken out of {len(done.erased):,} parts of augmentations and rejects")
    for id, parts in done.held.items():
        remedy = "run `prag run`, then `prag gc`" if id == done.serving else f"`prag snapshots unpin {id}`"
        out.print(f"forgotten passages are still in {len(parts)} parts that snapshot {id} names: {remedy}")


@store_app.command()
def retry(
    reason: Annotated[str | None, typer.Option(help="Only those rejected for this reason, see `prag rejects`.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only of this stage: corpus, augment or train.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All rejects, whatever their reason.")] = False,
    take_over: TakeOver = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give rejected passages another chance: the next `prag run` tries them again."""
    from pipelines.maintenance import operations as operate

    if not (reason or stage or everything):
        raise typer.BadParameter("name a --reason or a --stage, or --all", param_hint="prag retry")
    count = operate.retry(load_config(config, set_ or []), stage=stage, reason=reason, take_over=take_over)
    if as_json:
        print_json({"retried": count})
    else:
        out.print(f"{count:,} rejects forgotten" + ("; run `prag run`" if count else ""))


@store_app.command()
def export(
    passage: Passage,
    to: Annotated[Path, typer.Option("--to", help="The folder to write; it must be new or empty.")],
    snapshot: Annotated[str | None, typer.Option(help="Of this snapshot, not the one in service.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a passage's adapter as a PEFT folder, which `PeftModel.from_pretrained` loads."""
    from pipelines.maintenance import adapters

    key = adapters.export(load_config(config, set_ or []), passage, to, snapshot)
    if as_json:
        print_json({"key": key, "folder": str(to)})
    else:
        out.print(f"the adapter of {key} is in {to}", highlight=False)


@store_app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder: adapter_config.json, adapter_model.safetensors.")],
    key: Annotated[str | None, typer.Option("--key", help="The key of the passage that it is of.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="Its id in the corpus, instead of the key.")] = None,
    take_over: TakeOver = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a PEFT folder the adapter of a passage, and put it into service.

    It must fit the recipe in service (rank, alpha, modules), and stays until the passage's augmentation changes.
    """
    from pipelines.maintenance import adapters

    if (key is None) == (id is None):
        raise typer.BadParameter("name the passage by --key or by --id", param_hint="prag import")
    found, snapshot = adapters.import_adapter(load_config(config, set_ or []), key or id or "", folder, take_over)
    if as_json:
        print_json({"key": found, "snapshot": snapshot})
    else:
        out.print(f"{found} has the adapter of {folder}; snapshot {snapshot} is in service", highlight=False)


@store_app.command()
def du(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the store's bytes are, and what of them `prag gc` could remove."""
    from pipelines.maintenance import operations as operate

    settings = load_config(config, set_ or [])
    used = operate.measure_usage(_open(settings), settings.storage.keep_snapshots)
    if as_json:
        print_json(used.to_json())
        return
    table = Table(title=f"{settings.store}")
    for name in ("what", "objects", "bytes"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for kind in sorted(used.size_bytes, key=lambda kind: -used.size_bytes[kind]):
        table.add_row(kind, f"{used.objects[kind]:,}", bytes_text(used.size_bytes[kind]))
    table.add_row("all", f"{sum(used.objects.values()):,}", bytes_text(sum(used.size_bytes.values())))
    out.print(table)
    out.print(
        f"{used.adapters:,} ledger rows, {bytes_text(used.bytes_per_adapter)} each with its shard; "
        f"{bytes_text(used.unreferenced_bytes)} could go (`prag gc`)"
    )


@store_app.command()
def forget(
    passages: Annotated[list[str], typer.Argument(metavar="KEY|ID…", help="Keys, or ids in the corpus.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Use them again: by key, as long as `prag gc` has not come.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Never use these passages again (right to erasure): published at once, in all later snapshots too.

    Then `prag run` makes a corpus and an index without them, though the corpus file still has them, and `prag gc`
    removes their bytes. `prag gc` says when a pinned snapshot still holds some.
    """
    from pipelines.maintenance import operations as operate

    done = operate.forget(_open(load_config(config, set_ or [])), passages, undo=undo)
    if as_json:
        print_json({"keys": list(done.keys), "snapshot": done.snapshot})
        return
    known = {passage.key: passage for passage in done.passages}
    for key in done.keys:
        passage = known.get(key)
        what = f"{passage.title} ({', '.join(passage.sources)})" if passage else "not in the corpus in service"
        out.print(f"{key}  {what}", highlight=False)
    out.print(f"snapshot {done.snapshot} is in service", highlight=False)
    if not undo:
        out.print("run `prag run`, then `prag gc`, and their bytes are gone")


def _open(settings: Config) -> Store:
    from prag_core.store.objects import open_store

    return open_store(settings)


def _show_findings(findings: Sequence[Finding]) -> None:
    if not findings:
        return
    table = Table(title="Damage")
    for name in ("object", "what", "detail", "adapters"):
        table.add_column(name, justify="right" if name == "adapters" else "left", overflow="fold")
    for finding in findings[:_SHOWN]:
        table.add_row(finding.name, finding.kind, finding.detail, f"{len(finding.keys):,}" if finding.keys else "")
    out.print(table)
    if len(findings) > _SHOWN:
        out.print(f"… and {len(findings) - _SHOWN:,} more; see --json")
