"""The operator's commands on a small real store: verify, repair, forget, gc, export, import, snapshots."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from pipelines.cli import store as cli_store
from pipelines.cli import terminal
from pipelines.maintenance.operations import RepairReport
from pipelines.maintenance.verify import VerifyReport
from prag_core.config import ModelConfig
from prag_core.errors import ConfigError, ConflictError, InputError, LeaseError, StoreError
from prag_core.identity import passage_key
from prag_core.llm.base_model import load_base_model
from prag_core.llm.lora import Injector
from prag_core.maintenance.inventory import Finding
from prag_core.maintenance.repair import RepairResult
from prag_core.records import LedgerRow, from_table
from prag_core.store.adapters import LedgerSource, open_adapters
from prag_core.store.objects import Store
from prag_core.store.runs import hold_lease
from prag_core.store.snapshot import current_id, load_snapshot
from tests.helpers.adapters import stack_rows
from tests.helpers.command_line import prag
from tests.helpers.passages import make_passage
from tests.helpers.stores import verify as check
from tests.helpers.workspace import Workspace

pytestmark = pytest.mark.slow

PASSAGES = [make_passage(n) for n in range(6)]
STRANGER = make_passage(99)  # has no augmentation, so it is rejected


def call(*arguments: str) -> tuple[int, str]:
    """Run a command in this process and in the current folder; return its exit code and its result or its message."""
    ended = prag(Path.cwd(), *arguments)
    return ended.code, ended.out or ended.err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_here: str) -> Workspace:
    """A workspace with the store that its run has made."""
    work = Workspace(tmp_path_factory.mktemp("made"), PASSAGES)
    work.write_corpus([*PASSAGES, STRANGER])
    work.report()
    return work


@pytest.fixture
def folder(made: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a copy of it, in which commands run."""
    made.copy_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PRAG_CONFIG", "config.yaml")
    return tmp_path / "work"


def store_of(folder: Path) -> Store:
    return Store(str(folder / "store"))


def rows_of(folder: Path) -> list[LedgerRow]:
    store = store_of(folder)
    return from_table(LedgerRow, store.get_table(LedgerRow, store.list("adapters", ".parquet")))


def served(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    store = store_of(folder)
    snapshot = load_snapshot(store)
    source = LedgerSource(open_adapters(store, snapshot.recipe)[0], snapshot.ledger_parts)
    return {passage.key: source.get(passage.key) for passage in PASSAGES if passage.key in source}


def test_damage_is_repaired_and_a_passage_forgotten_meanwhile_is_removed(
    made: Workspace, folder: Path, ray_here: str
) -> None:
    before, store, victim = served(folder), store_of(folder), PASSAGES[2]
    rows = rows_of(folder)
    assert len(before) == 6
    assert len({row.shard for row in rows}) == 2
    # 1. A byte of one adapter flips, and the ledger part of the other shard is cut short: found.
    flipped = next(row for row in rows if row.key != victim.key)
    data = bytearray(store.get(flipped.shard))
    data[flipped.offset + 1] ^= 32
    store.put(flipped.shard, bytes(data))
    kept = [row.key for row in rows if row.shard == flipped.shard and row.key != flipped.key]
    part = next(
        part
        for part in load_snapshot(store).ledger_parts
        if flipped.shard not in store.get_columns(part, ["shard"])["shard"].to_pylist()
    )
    store.put(part, store.get(part)[:-7])
    code, printed = call("verify", "--full", "--json")
    found = json.loads(printed)
    assert code == StoreError.exit_code
    assert {(f["name"], f["kind"]) for f in found["findings"]} == {(flipped.shard, "checksum"), (part, "checksum")}
    assert [f["keys"] for f in found["findings"] if f["name"] == flipped.shard] == [[flipped.key]]

    # 2. One command repairs it. A passage that is forgotten meanwhile is not published over.
    earlier = set(store.list("runs", "inputs.json"))
    # Its configuration names the store alone: what is made again is what the run's stored configuration says.
    (folder / "store.yaml").write_text(f"store: {folder / 'store'}\ncorpus: {{path: none.jsonl}}\n")
    repairing = made.start("repair", "-c", str(folder / "store.yaml"), RAY_ADDRESS=ray_here)
    deadline = time.monotonic() + 240
    while set(store.list("runs", "inputs.json")) == earlier:
        assert repairing.poll() is None, repairing.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, printed = call("forget", victim.sources[0])
    assert (code, victim.key in printed) == (0, True)
    message = repairing.communicate(timeout=240)[1]
    assert (repairing.returncode, "another publisher" in message) == (ConflictError.exit_code, True), message[-3000:]

    # 3. The run after it publishes what was made again; the corpus file has the forgotten one, the corpus has not. A
    # passage has another text now, and so is another one.
    old, lines = PASSAGES[4], (folder / "corpus.jsonl").read_text().splitlines()
    text = f"{old.text} It is high."
    lines = [line.replace(old.text, text) for line in lines]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    code, printed = call("run", "--json")
    assert code == 0, printed
    report = json.loads(printed)
    assert (report["adapters"], report["stages"][0]["extra"]["forgotten"]) == (5, 1)
    after = served(folder)
    for key in set(before) - {victim.key}:
        rtol, atol = (0.0, 0.0) if key in kept else (0.02, 1e-3)
        torch.testing.assert_close(dict(after[key]), dict(before[key]), rtol=rtol, atol=atol)
    code, printed = call("ask", "--json", "--set", "answer.mode=prag", f"What is {victim.title}?")
    assert code == 0, printed
    used = [passage["key"] for passage in json.loads(printed)[0]["passages"]]
    assert used
    assert victim.key not in used

    # 4. Its bytes go, and the adapter of the text that no kept snapshot's corpus has. What is young would stay.
    code, printed = call("gc", "--dry-run", "--keep", "1")
    assert (code, "younger than --grace" in " ".join(printed.split())) == (0, True), printed
    code, printed = call("gc", "--grace", "0s", "--keep", "1", "--json")
    assert code == 0, printed
    done = json.loads(printed)
    assert (done["held"], done["young"], done["compacted"]["new_parts"]) == ({}, [], 1)
    assert set(served(folder)) == set(before) - {victim.key, old.key}
    assert {row.key for row in rows_of(folder)} == {*served(folder), passage_key(old.title, text)}
    files = {path: path.read_bytes() for path in (folder / "store").rglob("*") if path.is_file()}
    assert {path.parent.name for path, data in files.items() if victim.key.encode() in data} == {"snapshots"}
    for name in store.list("", ".parquet"):
        assert victim.key not in store.get_columns(name, ["key"])["key"].to_pylist(), name
    assert len(store.list("indexes", "index.json")) == len(store.list("corpus", "manifest.json")) == 1
    assert check(store) == []


def test_the_report_of_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.out, "file", io.StringIO())
    finding = Finding("adapters/r/shards/s.safetensors", "checksum", "bytes of 1 of 3 adapters were altered", ("k",))
    verified = VerifyReport(True, 20, 1000, 1.0, (finding,))
    stages = [{"stage": "corpus", "done": 7, "earlier": 0}, {"stage": "train", "done": 6, "earlier": 5}]
    repaired = RepairResult(("k",), ("part",), ("a", "b"), {}, "old")
    cli_store._show_repair(RepairReport(verified, repaired, {"snapshot": "new", "stages": stages}))
    cli_store._show_repair(RepairReport(verified, repaired, None))
    cli_store._show_repair(RepairReport(replace(verified, findings=()), None, None))
    shown = terminal.out.file.getvalue()
    for words in ("checksum", "train 1 ", "new", "not yet: run `prag run`", "nothing to repair"):
        assert words in shown, shown


def test_a_dry_run_removes_nothing(folder: Path) -> None:
    """Before the first publication there is nothing to compact, and so no Ray."""
    store = store_of(folder)
    store.remove("CURRENT")
    store.remove(store.list("snapshots", ".json")[0])
    orphan = f"adapters/{rows_of(folder)[0].recipe}/shards/{'0' * 32}.safetensors"
    store.put(orphan, b"x" * 2000)
    code, printed = call("gc", "--dry-run", "--grace", "0s", "--json")
    assert (code, [item["name"] for item in json.loads(printed)["objects"]]) == (0, [orphan]), printed
    assert store.exists(orphan)
    assert "2.0 kB" in call("gc", "--dry-run", "--grace", "0s")[1]
    assert "0 bytes" in call("gc", "--dry-run")[1]  # it may be a writer's unfinished work
    assert "removed" in call("gc", "--grace", "0s")[1]
    assert not store.exists(orphan)
    assert len(rows_of(folder)) == 6


def test_export_and_import_keep_the_logits(folder: Path) -> None:
    passage, other = PASSAGES[0], PASSAGES[1]
    base = load_base_model(ModelConfig(name=str(folder / "tiny"), dtype="float32"))
    ids = torch.tensor([base.tokenizer.encode(passage.text)[:40]])
    snapshot = load_snapshot(store_of(folder))
    _, recipe = open_adapters(store_of(folder), snapshot.recipe)
    injector = Injector(base.model, recipe)
    rows = stack_rows(injector.layout, [[(served(folder)[passage.key], 1.0)]])
    with injector.active(rows), torch.no_grad():
        expected = base.model(input_ids=ids).logits
    injector.close()
    code, printed = call("export", passage.sources[0], "--to", "out/peft")
    assert (code, passage.key in printed) == (0, True)
    card = (folder / "out/peft/README.md").read_text()
    row = next(row for row in rows_of(folder) if row.key == passage.key)
    for said in (passage.sources[0], passage.title, snapshot.recipe, f"{row.steps} steps", f"{row.last_loss:.3f}"):
        assert said in card, said
    plain = load_base_model(ModelConfig(name=str(folder / "tiny"), dtype="float32"))
    with torch.no_grad():
        assert not torch.allclose(plain.model(input_ids=ids).logits, expected, atol=1e-3)
        peft = PeftModel.from_pretrained(plain.model, str(folder / "out/peft"))
        torch.testing.assert_close(peft(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert call("export", passage.key, "--to", "out/peft")[0] == InputError.exit_code  # not empty any more
    assert call("export", STRANGER.key, "--to", "out/none")[0] == StoreError.exit_code  # was never trained

    # The same folder as another passage's adapter: served at once.
    code, printed = call("import", "out/peft", "--id", other.sources[0], "--json")
    assert code == 0, printed
    assert json.loads(printed)["key"] == other.key
    found = served(folder)
    assert all(torch.equal(found[other.key][name], found[passage.key][name]) for name in found[other.key])
    assert load_snapshot(store_of(folder)).adapters == 6
    code, printed = call("import", "out/peft", "--key", STRANGER.key)
    assert (code, "has no augmentation" in printed) == (InputError.exit_code, True)


def test_snapshots_are_listed_pinned_and_rolled_back_to(folder: Path) -> None:
    store = store_of(folder)
    first = str(current_id(store))
    assert call("forget", PASSAGES[3].key, "--json")[0] == 0
    second = str(current_id(store))
    code, printed = call("snapshots", "list", "--json")
    listed = json.loads(printed)
    assert [(s["id"], s["serving"], s["pinned"]) for s in listed] == [(first, False, False), (second, True, False)]
    code, printed = call("snapshots", "pin", first, "--json")
    assert (code, json.loads(printed)) == (0, {"pinned": [first]})
    code, printed = call("snapshots", "list")
    assert (code, "in service" in printed, "pinned" in printed) == (0, True, True)
    # Whole ids at the 80 columns of a pipe, and the recipe's name beside its hash.
    assert {first, second} <= {*printed.replace("│", " ").split()}
    assert "recall" in printed
    assert json.loads(call("snapshots", "show", "--json")[1])["tombstones"] == [PASSAGES[3].key]
    assert PASSAGES[3].key in call("snapshots", "show", second)[1]
    # A rollback does not bring back a forgotten passage.
    code, printed = call("snapshots", "rollback", first, "--json")
    serving = json.loads(printed)["serving"]
    assert (code, serving) == (0, current_id(store))
    assert load_snapshot(store).tombstones == (PASSAGES[3].key,)
    assert call("forget", "--undo", PASSAGES[3].key)[0] == 0
    assert load_snapshot(store).tombstones == ()
    assert call("snapshots", "unpin", first)[0] == 0
    assert call("snapshots", "unpin", first)[0] == StoreError.exit_code
    assert call("snapshots", "rollback", "2")[0] == InputError.exit_code  # all of them begin so


def test_retry_and_du(folder: Path) -> None:
    assert call("retry")[0] == 2
    code, printed = call("retry", "--reason", "nothing_like_it")
    assert (code, "not_imported" in printed) == (InputError.exit_code, True)
    assert json.loads(call("retry", "--reason", "not_imported", "--json")[1]) == {"retried": 1}
    assert "no rejects" in call("rejects")[1]
    used = json.loads(call("du", "--json")[1])
    on_disk = sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file() and p.suffix != ".lock")
    assert sum(used["size_bytes"].values()) == on_disk
    assert used["adapters"] == 6
    assert "6 ledger rows" in call("du")[1]


def test_what_changes_the_store_waits_for_its_lease(folder: Path) -> None:
    with hold_lease(store_of(folder), "a-run"):
        for command in (["gc"], ["retry", "--all"], ["import", "x", "--id", "p0"]):
            code, printed = call(*command)
            assert (code, "a-run" in printed) == (LeaseError.exit_code, True), command
        assert call("du")[0] == 0
    assert call("gc", "--set", "storage.keep_snapshots=0")[0] == ConfigError.exit_code
    code, printed = call("gc", "--grace", "soon")
    assert (code, "is not an age" in printed) == (2, True), printed
