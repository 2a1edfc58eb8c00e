"""The main job on a local Ray with the tiny model does what is missing, once, and its counts add up."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prag_core.config import ModelConfig
from prag_core.llm.base_model import load_base_model
from prag_core.llm.lora import find_targets, initial_factors
from prag_core.llm.peft import export_peft, peft_base
from prag_core.recipe import RECIPES
from prag_core.records import Passage
from prag_core.store.adapters import start_fingerprint
from prag_core.testing import write_tiny_model
from tests.helpers.passages import make_passage
from tests.helpers.workspace import Workspace, stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]


def new(report: dict) -> dict[str, int]:
    return {s["stage"]: s["done"] - s["earlier"] for s in report["stages"]}


def test_run_again_shuffle_change_and_ask(tmp_path: Path) -> None:
    passages = [make_passage(n) for n in range(10)]
    work = Workspace(tmp_path, passages)

    # 1. A first run, with two bad lines, a duplicate under another id, and a passage without an augmentation.
    duplicate = Passage(passages[0].key, passages[0].title, passages[0].text, ("again",))
    stranger = make_passage(99)
    work.write_corpus([*passages, duplicate, stranger], extra='not json\n{"id": "e", "title": "t", "text": ""}\n')
    first = work.report()
    assert first["rejected"] == {"augment/not_imported": 1, "corpus/empty_text": 1, "corpus/invalid_json": 1}
    corpus = stage(first, "corpus")
    assert (corpus["taken"], corpus["done"], corpus["extra"]["passages"], corpus["extra"]["duplicates"]) == (
        14,
        12,
        11,
        1,
    )
    assert all(s["balanced"] for s in first["stages"])
    assert first["adapters"] == 10 == len(work.ledger())
    listed = work.run("rejects", "-c", "config.yaml")
    assert "corpus.jsonl:13" in listed
    assert "corpus.jsonl:14" in listed

    # 2. Again, with the lines in another order: the same corpus version, the same snapshot, nothing trained.
    work.write_corpus(
        [stranger, duplicate, *reversed(passages)], extra='{"id": "e", "title": "t", "text": ""}\nnot json\n'
    )
    again = work.report()
    assert new(again) == {"corpus": 12, "augment": 0, "train": 0, "index": 0}
    assert again["snapshot"] == first["snapshot"]
    assert again["adapters"] == 10

    # 3. One passage changed: one adapter is trained, and the old one is not used any more.
    changed = make_passage(3, words=31)
    work.write_corpus([changed if p.sources == ("p3",) else p for p in passages])
    third = work.report()
    assert new(third)["train"] == 1
    assert third["snapshot"] != first["snapshot"]

    # 4. The engine answers from it in all four modes, and says how each passage was used.
    answers = json.loads(work.run("ask", "-c", "config.yaml", "--compare", "--json", f"What is {changed.title}?"))
    assert [a["mode"] for a in answers] == ["combine", "prag", "rag", "closed"]
    assert answers[1]["passages"][0]["key"] == changed.key
    assert answers[1]["passages"][0]["in_weights"]
    steps = {"retrieve", "fetch", "prompt", "wait", "inject", "prefill", "decode"}
    assert set(answers[1]["milliseconds"]) == steps
    assert changed.title in work.run("ask", "-c", "config.yaml", "--compare", f"What is {changed.title}?")

    # 5. The output for programs, and a plan for one new passage that is five times as long as the others.
    assert json.loads(work.run("status", "-c", "config.yaml", "--json"))["snapshot"]["id"] == third["snapshot"]
    work.write_corpus([*passages, make_passage(50, words=150)])
    plan = json.loads(work.run("plan", "-c", "config.yaml", "--json"))
    assert (plan["to_augment"], plan["to_train"], plan["passages"]) == (1, 1, 11)
    assert plan["tokens"] > 2 * max(row.tokens for row in work.ledger())

    # 6. Another base model must not touch this store.
    write_tiny_model(tmp_path / "other", seed=1)
    refused = work.run("run", "-c", "config.yaml", "--set", f"model.name={tmp_path / 'other'}", code=5)
    assert "holds adapters for the base model" in refused
    refused = work.run("ask", "-c", "config.yaml", "--set", f"model.name={tmp_path / 'other'}", "Why?", code=5)
    assert "holds adapters for the base model" in refused


def test_a_killed_driver_loses_nothing_and_trains_nothing_twice(tmp_path: Path) -> None:
    passages = [make_passage(n) for n in range(24)]
    work = Workspace(tmp_path, passages)
    # A recipe that starts from an adapter and trains only the topmost layers.
    base = load_base_model(ModelConfig(name=str(tmp_path / "tiny"), dtype="float32"))
    layout, _ = find_targets(base.model, replace(RECIPES["recall"], last_layers=2))
    export_peft(layout, initial_factors(layout, seed=5), tmp_path / "warm", peft_base(str(tmp_path / "tiny")))
    work.configure(train={"epochs": 12, "last_layers": 2, "initial_adapter": str(tmp_path / "warm")})
    process = work.start("run", "-c", "config.yaml")
    ledger = tmp_path / "store" / "adapters"
    deadline = time.monotonic() + 240
    while not list(ledger.glob("*/ledger/**/*.parquet")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # what its workers were writing when they noticed
    kept = {row.key for row in work.ledger()}
    assert 4 <= len(kept) < 24
    report = work.report()
    assert report["adapters"] == 24
    assert stage(report, "train")["earlier"] == len(kept)
    keys = [row.key for row in work.ledger()]
    assert len(keys) == len(set(keys)) == 24
    described = json.loads(next(ledger.glob("*/recipe.json")).read_text())
    assert described["layout"]["layers"] == [1, 2]
    assert described["recipe"]["train"]["start"] == start_fingerprint(initial_factors(layout, seed=5))
    answers = json.loads(work.run("ask", "-c", "config.yaml", "--json", f"What is {passages[0].title}?"))
    assert answers[0]["passages"][0]["in_weights"]


def test_too_many_rejects_fail_the_run_and_publish_nothing(tmp_path: Path) -> None:
    passages = [make_passage(n) for n in range(8)]
    work = Workspace(tmp_path, passages[:6])
    work.write_corpus(passages, extra="not json\n" * 3)
    augmentations = tmp_path / "augmentations.jsonl"
    known = augmentations.read_text()
    augmentations.write_text("\n".join(known.splitlines()[:2]))
    # Neither the bad records nor the passages without an augmentation are too many by themselves.
    share = ["--set", "run.max_reject_share=0.8"]
    message = work.run("run", "-c", "config.yaml", *share, code=9)
    assert "9 of 11 passages were rejected" in message
    assert "augment/not_imported 6, corpus/invalid_json 3" in message
    assert not (tmp_path / "store" / "CURRENT").exists()

    # With a file that has them, they are tried again: the passages did not cause these rejects.
    augmentations.write_text(known)
    report = work.report()
    assert report["adapters"] == 6
    assert report["rejected"] == {"augment/not_imported": 2, "corpus/invalid_json": 3}


def test_an_error_of_a_worker_is_printed_without_a_traceback(tmp_path: Path, ray_here: str) -> None:
    work = Workspace(tmp_path, [make_passage(1)])
    (tmp_path / "bad.tsv").write_text("id\ttitel\tbody\n1\ta\tb\n")
    wrong = ["--set", f"corpus.path={tmp_path / 'bad.tsv'}"]
    message = work.run_alone("run", "-c", "config.yaml", *wrong, code=3, RAY_ADDRESS=ray_here)
    assert "bad.tsv: has no column 'text'" in message
    assert "corpus.columns.text" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) < 8
