"""The commands that keep a store sound: `prag verify`, `repair`, `gc`, `du`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from pipelines.cli import options
from pipelines.cli.terminal import out, print_json, print_table, progress_to, result_only
from pipelines.words import counted, duration
from prag_core.errors import StoreError

if TYPE_CHECKING:
    from pipelines.maintenance.operations import GarbageReport, RepairReport
    from pipelines.maintenance.verify import VerifyReport
    from prag_core.maintenance.inventory import Finding

app = typer.Typer()

_SHOWN = 50


@app.command(rich_help_panel=options.STORE, epilog="Example: `prag verify -c config.yaml --full`")
def verify(
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte: check checksums, shapes and finite values too.")
    ] = False,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Check the store, in parallel; changes nothing. The exit code is 5 when it is damaged or empty.

    `prag verify` checks that each object that another one names is there, with its size; `prag verify --full` also
    reads them all. `prag repair` repairs the damage.
    """
    from pipelines.maintenance import operations

    settings = options.settings_of(config, set_)
    with result_only():
        verified = operations.verify(settings, progress_to, full=full)
    if as_json:
        print_json(verified.to_json())
    else:
        _show_verified(verified)
    if verified.findings:
        raise typer.Exit(StoreError.exit_code)


def _show_verified(verified: VerifyReport) -> None:
    _show_findings(verified.findings)
    rate = "sizes and presence only"
    if verified.full:
        rate = f"{decimal(int(verified.size_bytes / max(verified.seconds, 1e-9)))}/s"
    damage = f"{len(verified.findings)} damaged; run `prag repair`" if verified.findings else "no damage"
    size = decimal(verified.size_bytes)
    objects = counted(verified.objects, "object")
    out.print(f"{objects}, {size}, {duration(verified.seconds)} ({rate}): {damage}")


def _show_findings(findings: Sequence[Finding]) -> None:
    rows = [(f.name, f.kind, f.detail, f"{len(f.keys):,}" if f.keys else "") for f in findings[:_SHOWN]]
    if rows:
        print_table("Damage", rows, ("object", "kind", "detail", "adapters"), right=("adapters",))
    if len(findings) > _SHOWN:
        out.print(f"… and {len(findings) - _SHOWN:,} more; see --json")


@app.command(rich_help_panel=options.STORE, epilog="Example: `prag repair -c config.yaml`")
def repair(
    fast: Annotated[bool, typer.Option("--fast", help="Check sizes and presence only, as `prag verify` does.")] = False,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Make what was removed again now, or leave it to the next run.")
    ] = True,
    take_over: options.TakeOver = False,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Repair the store: find what is damaged, remove it, and run the job, which makes it again.

    The job has the configuration that the run in service stored; `--set` changes it. `--config` and `--set` say where
    the store is. Good adapters beside a damaged one are kept. If the command is killed, the same command continues.
    Until the run is done, passages without an adapter go into the prompt.
    """
    from pipelines.maintenance import operations

    settings = options.settings_of(config, set_)
    with result_only():
        report = operations.repair_store(
            settings, progress_to, full=not fast, run=run, take_over=take_over, overrides=set_ or ()
        )
    if as_json:
        print_json(report.to_json())
    else:
        _show_repair(report)


def _show_repair(report: RepairReport) -> None:
    verified, repaired = report.verified, report.repaired
    _show_findings(verified.findings)
    if repaired is None:
        out.print(f"{counted(verified.objects, 'object')}: no damage, nothing to repair")
        return
    lost = [finding.name for finding in verified.findings if not finding.repairable]
    rows = [
        ("damaged", f"{len(verified.findings):,}"),
        ("adapters removed", f"{len(repaired.dropped):,}"),
        ("ledger parts replaced", f"{len(repaired.moved):,}"),
        ("objects removed", f"{len(repaired.removed):,}"),
        ("lost for good", ", ".join(lost) or "nothing"),
        ("snapshot in service", (report.run or {}).get("snapshot") or repaired.serving or "none"),
        ("made again", _made_again(report.run)),
    ]
    print_table("Repair", rows)


def _made_again(run: dict[str, Any] | None) -> str:
    if run is None:
        return "not yet: run `prag run`"
    made = {stage["stage"]: stage["done"] - stage["earlier"] for stage in run["stages"] if stage["stage"] != "corpus"}
    return ", ".join(f"{stage} {n:,}" for stage, n in made.items() if n) or "nothing was missing"


@app.command(rich_help_panel=options.STORE, epilog="Example: `prag gc -c config.yaml --dry-run`")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed. Try this first.")] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="The number of newest snapshots to keep; default: storage.keep_snapshots.")
    ] = None,
    grace: Annotated[
        str, typer.Option(help="Keep everything younger than this: 30m, 24h, 7d. A writer may still be at work.")
    ] = "24h",
    take_over: options.TakeOver = False,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Compact the ledger, and remove everything that is no longer needed.

    The newest snapshots, the pinned ones and the one in service are kept, with everything they name. So are the
    augmentations and rejects that recent runs would resume from. Compaction makes few ledger parts of many and
    rewrites shards in which few adapters still count. Removed are the bytes of forgotten passages, and the adapters
    of passages that are in no kept corpus.
    """
    from pipelines.maintenance import operations

    settings = options.settings_of(config, set_)
    try:
        grace_s = options.parse_age(grace)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--grace") from None
    with result_only():
        report = operations.collect_garbage(
            settings, progress_to, keep=keep, grace_s=grace_s, dry_run=dry_run, take_over=take_over
        )
    if as_json:
        print_json(report.to_json())
    else:
        _show_garbage(report)


def _show_garbage(report: GarbageReport) -> None:
    title = f"Garbage ({'would be removed' if report.dry_run else 'removed'})"
    _show_sizes(title, report.garbage.by_kind(), len(report.garbage.objects), report.garbage.size_bytes)
    if c := report.compacted:
        now = f"; now {counted(c.new_parts, 'part')}" if c.new_parts else ""
        rows = f"{counted(c.rows, 'row')} in {counted(c.parts, 'part')}"
        out.print(f"ledger: {rows}; {c.superseded:,} superseded, {c.forgotten:,} forgotten{now}")
    if report.erased:
        erased = counted(len(report.erased), "part")
        out.print(f"forgotten passages were erased from {erased} of augmentations and rejects")
    for id, parts in report.held.items():
        place = f"forgotten passages are still in {counted(len(parts), 'part')} that snapshot {id} names"
        command = "`prag run`, then `prag gc`" if id == report.serving else f"`prag snapshots unpin {id}`"
        out.print(f"{place}. To erase the data itself, run {command}.")
    if report.young:
        out.print(
            f"forgotten passages are still in {counted(len(report.young), 'part')} younger than --grace. To erase the "
            "data itself, run `prag gc` when it is older, or `prag gc --grace 0s` when no run is at work."
        )


@app.command(rich_help_panel=options.STORE, epilog="Example: `prag du -c config.yaml`")
def du(config: options.Config = options.EXAMPLE, set_: options.Set = None, as_json: options.Json = False) -> None:
    """Show how many bytes each kind of object has, and how many `prag gc` could remove."""
    from pipelines.maintenance import operations

    settings = options.settings_of(config, set_)
    used = operations.measure_usage(options.store_of(config, set_), settings.storage.keep_snapshots)
    if as_json:
        print_json(used.to_json())
        return
    kinds = sorted(used.size_bytes, key=lambda kind: -used.size_bytes[kind])
    by_kind = {kind: (used.objects[kind], used.size_bytes[kind]) for kind in kinds}
    _show_sizes(settings.store, by_kind, sum(used.objects.values()), sum(used.size_bytes.values()))
    each, unneeded = decimal(int(used.bytes_per_adapter)), decimal(used.unreferenced_bytes)
    out.print(f"{counted(used.adapters, 'ledger row')}, {each} each with its shard; `prag gc` could remove {unneeded}")


def _show_sizes(title: str, by_kind: Mapping[str, tuple[int, int]], objects: int, size_bytes: int) -> None:
    rows = [(kind, f"{count:,}", decimal(size)) for kind, (count, size) in by_kind.items()]
    rows.append(("all", f"{objects:,}", decimal(size_bytes)))
    print_table(title, rows, ("kind", "objects", "bytes"), right=("objects", "bytes"))
