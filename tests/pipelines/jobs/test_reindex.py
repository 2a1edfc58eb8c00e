"""The nightly job trains exactly what changed, asks the candidate before it serves, and does nothing twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from pipelines.jobs.corpus_diff import CorpusDiff, _count_keys, _count_sources, _differing, _facts, _with_source
from pipelines.jobs.reindex import reindex
from prag_core.config_file import load_config, parse_config
from prag_core.errors import ConfigError, InputError, LeaseError
from prag_core.identity import passage_key
from prag_core.inference.request import Request
from prag_core.inference.service import Service, open_service
from prag_core.records import Answer, Passage, Route, to_table
from prag_core.store.objects import Store
from prag_core.store.pins import kept_snapshots
from prag_core.store.runs import hold_lease
from prag_core.store.snapshot import list_snapshots, load_snapshot, publish, with_route
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.workspace import Workspace, stage


def difference(old: list[Passage], new: list[Passage]) -> CorpusDiff:
    facts = [_facts(to_table(Passage, rows), new=is_new) for rows, is_new in ((old, False), (new, True))]
    places = _differing(pa.concat_tables(facts))
    counts = [*_count_keys(places).to_pylist(), *_count_sources(_with_source(places)).to_pylist()]
    return CorpusDiff(**{row["name"]: row["count"] for row in counts})


def passage(text: str, *sources: str) -> Passage:
    return Passage(passage_key("T", text), "T", text, sources)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([], [], CorpusDiff()),
        ([], [passage("x", "a")], CorpusDiff(passages_new=1, added=1)),
        ([passage("x", "a")], [], CorpusDiff(passages_gone=1, removed=1)),
        ([passage("x", "a")], [passage("x", "a")], CorpusDiff(passages_kept=1)),
        ([passage("x", "a")], [passage("y", "a")], CorpusDiff(passages_new=1, passages_gone=1, changed=1)),
        # The same text under another id, and with one id more or less.
        ([passage("x", "a")], [passage("x", "b")], CorpusDiff(passages_kept=1, moved=1)),
        ([passage("x", "a")], [passage("x", "a", "b")], CorpusDiff(passages_kept=1, moved=1)),
        ([passage("x", "a", "b")], [passage("x", "a")], CorpusDiff(passages_kept=1)),
        # An id gets the text of another id: its old text is gone, and nothing has to be trained.
        (
            [passage("x", "a"), passage("y", "b")],
            [passage("y", "a", "b")],
            CorpusDiff(passages_gone=1, passages_kept=1, changed=1),
        ),
        # Two ids swap their texts.
        (
            [passage("x", "a"), passage("y", "b")],
            [passage("y", "a"), passage("x", "b")],
            CorpusDiff(passages_kept=2, changed=2),
        ),
    ],
)
def test_differences_by_id_and_by_passage(old: list[Passage], new: list[Passage], expected: CorpusDiff) -> None:
    assert difference(old, new) == expected


async def ask(service: Service, passage: Passage) -> Answer:
    """Ask about a passage by a word that no other passage has."""
    return await service.answer(Request(passage.text.split()[-1].strip("."), "prag", top_k=1))


def key_of(answer: Answer) -> str | None:
    return answer.passages[0].key if answer.passages else None


async def a_night_under_load(
    work: Workspace, night: list[str], service: Service, passages: list[Passage], ray_here: str
) -> tuple[dict, list[Answer]]:
    """Run a command while the service answers question after question; return the command's output and the answers."""
    running = asyncio.create_task(asyncio.to_thread(work.run_alone, *night, RAY_ADDRESS=ray_here))
    answers = []
    while not running.done() or len(answers) < len(passages):
        answers.append(await ask(service, passages[len(answers) % len(passages)]))
        await asyncio.sleep(0.1)  # leave the command some of the machine
    # The service changes to the new snapshot under load too.
    asking = [asyncio.create_task(ask(service, passage)) for passage in passages * 3]
    assert await service.refresh()
    answers += await asyncio.gather(*asking)
    return json.loads(await running), answers


def test_a_failed_night_stores_a_report_with_the_error(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "title": "T", "text": "Some text."}))
    paths = {"store": str(tmp_path / "store"), "corpus": {"path": str(tmp_path / "corpus.jsonl")}}
    config = parse_config({**paths, "model": {"name": str(tiny_model_folder)}, "augment": {"generator": "none"}})
    store = Store(config.store)
    with hold_lease(store, "another"), pytest.raises(LeaseError, match="in use by run another"):
        reindex(config, Console(quiet=True))
    (name,) = store.list("runs", "/reindex.json")
    report = store.get_json(name)
    assert name == f"runs/{report['run']}/reindex.json"
    assert report["error"].startswith("LeaseError: ")
    assert not report["published"]
    with pytest.raises(ConfigError, match="no questions to ask"):
        reindex(config, Console(quiet=True), canary_min=0.5)


def test_a_bad_canary_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "canary.jsonl").write_text('{"question": "Why?"}')
    config = parse_config({"store": str(tmp_path / "store"), "corpus": {"path": str(tmp_path / "corpus.jsonl")}})
    with pytest.raises(InputError, match=r"canary\.jsonl: line 1: field 'answers': is missing"):
        reindex(config, Console(quiet=True), canary=tmp_path / "canary.jsonl")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_night_of_ten_changed_five_removed_ten_added(
    tmp_path: Path, ray_here: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = [make_passage(n, words=4) for n in range(160)]
    work = Workspace(tmp_path, old)
    settings = ["-c", "config.yaml", "--set", "run.augment_batch=64"]
    settings += ["--set", "run.train_batch=64", "--set", "run.tokens_per_step=4096"]
    work.run("run", *settings)
    store = Store(str(tmp_path / "store"))
    # Fitted thresholds of `auto` stay through the nights, as their recipe does.
    route = Route(closed_below=1.0, prag_score=2.0, prag_next=0.5, otherwise="rag")
    unfitted = load_snapshot(store)
    publish(store, with_route(unfitted, route))
    first = load_snapshot(store)
    assert first.adapters == 160

    # 1. Ten changed, five removed, ten added, one under another id, twenty in another place.
    changed = [make_passage(n, words=5) for n in range(10)]
    removed = {p.sources for p in old[10:15]}
    added = [make_passage(n, words=4) for n in range(160, 170)]
    kept = [p for p in old[10:] if p.sources not in removed]
    with_id = Passage(kept[50].key, kept[50].title, kept[50].text, ("another",))
    tonight = [*changed, *reversed(kept[:20]), *kept[20:50], with_id, *kept[51:], *added]
    lines = [json.dumps({"id": p.sources[0], "title": p.title, "text": p.text}) for p in tonight]
    (tmp_path / "tonight.jsonl").write_text("\n".join(lines))
    augmentations = tmp_path / "tonight_augmentations.jsonl"
    with augmentations.open("w") as stream:
        for p in tonight:
            pairs = make_augmentation(p).pairs
            qa = [{"question": q.question, "answer": q.answer, "full_answer": q.full_answer} for q in pairs]
            stream.write(json.dumps({"id": p.sources[0], "rewrites": [], "qa": qa}) + "\n")
    (tmp_path / "canary.jsonl").write_text(json.dumps({"question": f"What is {added[0].title}?", "answers": ["x"]}))
    night = ["reindex", *settings, "--corpus", str(tmp_path / "tonight.jsonl"), "--canary", "canary.jsonl", "--json"]
    # What an untrained model says depends on its prompt more than on its adapters, which all learn much the same.
    night += ["--set", f"augment.import_file={augmentations}", "--set", "answer.mode=rag"]
    # A server answers questions during all of this, and is never restarted.
    service = open_service(load_config(tmp_path / "config.yaml", [f"model.name={tmp_path / 'tiny'}"]), store)
    report, under_load = asyncio.run(a_night_under_load(work, night, service, [old[0], old[10], kept[0]], ray_here))
    assert {(answer.snapshot, key_of(answer)) for answer in under_load} >= {
        (first.id, old[0].key),
        (first.id, old[10].key),
        (first.id, kept[0].key),
    }
    assert report["difference"] == {
        "passages_new": 20,
        "passages_gone": 15,
        "passages_kept": 145,
        "added": 10,
        "changed": 10,
        "removed": 5,
        "moved": 1,
    }
    assert (report["trained"], report["augmented"], report["rejected"]) == (20, 20, {})
    assert report["published"]
    assert report["canary_f1"] == report["canary_min"] == 0  # neither knows
    second = load_snapshot(store)
    assert (report["before"], report["snapshot"]) == (first.id, second.id)
    assert (second.passages, second.adapters, second.route) == (165, 165, route)
    assert store.get_json(f"runs/{report['run']}/reindex.json") == report
    assert len({row.key for row in work.ledger()}) == len(work.ledger()) == 180
    index = stage(store.get_json(f"runs/{report['run']}/report.json"), "index")
    assert index["extra"] == {"added": 20, "changed": 1, "removed": 15, "anew": "", "failed": False}

    # 2. The server has the new snapshot: it finds what changed, and no longer what was removed. No request failed.
    assert not asyncio.run(service.refresh())
    expected = ((changed[0], changed[0].key), (old[10], None), (kept[0], kept[0].key), (added[0], added[0].key))
    for passage, found in expected:
        answer = asyncio.run(ask(service, passage))
        assert (answer.snapshot, key_of(answer)) == (second.id, found)
        assert found is None or answer.passages[0].in_weights
    assert {outcome for _, outcome in service.stats().requests} == {"ok"}
    question = f"What is {added[-1].title}?"
    served = asyncio.run(service.answer(Request(question, "rag")))
    service.close()

    # 3. The same again: nothing is trained, asked or published.
    again = json.loads(work.run(*night))
    assert (again["trained"], again["augmented"], again["published"], again["canary_f1"]) == (0, 0, False, None)
    assert again["snapshot"] == second.id
    assert len(list_snapshots(store)) == 3

    # 4. A night that loses a passage that the canary asks for: the old snapshot answers better and stays in service,
    # the candidate can be asked, and it does not count among the newest snapshots that are kept. The archive of the
    # index in service is damaged, so that the new index is built from the corpus.
    archive = tmp_path / "store" / "indexes" / second.index / "lucene.tar.zst"
    archive.write_bytes(archive.read_bytes()[:-1] + b"?")
    (tmp_path / "tonight.jsonl").write_text("\n".join(lines[:-1]))
    (tmp_path / "canary.jsonl").write_text(json.dumps({"question": question, "answers": [served.text]}))
    said = work.run(*night, code=16)
    assert "below what the snapshot in service reaches, 1.000: it was not published" in said
    assert "built from scratch: " in caplog.text
    assert f"indexes/{second.index}/lucene.tar.zst: altered" in caplog.text
    assert load_snapshot(store).id == second.id
    (candidate,) = {s.id for s in list_snapshots(store)} - {unfitted.id, first.id, second.id}
    gone = load_snapshot(store, candidate)
    assert (gone.passages, gone.adapters) == (164, 164)
    assert kept_snapshots(store, 2) == [first.id, second.id, candidate]
    # By its error, not by its name: the run before may have begun in the same second.
    (failed,) = [report for name in store.list("runs", "/reindex.json") if "error" in (report := store.get_json(name))]
    assert (failed["before"], failed["candidate"], failed["published"]) == (second.id, candidate, False)
    assert failed["error"].startswith("CanaryError: ")
    assert failed["difference"]["removed"] == 1
