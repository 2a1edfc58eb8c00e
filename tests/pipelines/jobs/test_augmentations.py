"""Augmentations are exported from a store and imported into another, in our format and in the paper's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from prag_core.augmentation.formats import read_augmentations, write_augmentations, write_corpus
from prag_core.errors import InputError
from prag_core.identity import passage_key
from prag_core.prompts import passage_text
from prag_core.records import Augmentation, from_table
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot, publish, with_tombstones
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.published import publish_passages

PASSAGES = [make_passage(n) for n in range(3)]


def paper_file(path: Path) -> Path:
    """Write a file as the paper's authors publish it: each question repeats the passages that it retrieved."""
    items = [
        {
            "pid": i,
            "passage": passage.text,
            "some-model_rewrite": make_augmentation(passage).rewrites[0],
            "some-model_qa": [asdict(pair) for pair in make_augmentation(passage).pairs],
        }
        for i, passage in enumerate(PASSAGES)
    ]
    records = [{"test_id": 0, "augment": items[:2]}, {"test_id": 1, "augment": items[1:]}]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_the_papers_passages_become_a_corpus(tmp_path: Path) -> None:
    assert write_corpus(str(paper_file(tmp_path / "paper.json")), tmp_path / "new" / "corpus.jsonl") == 3
    lines = [json.loads(line) for line in (tmp_path / "new" / "corpus.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [passage.text for passage in PASSAGES]
    assert len({line["id"] for line in lines}) == 3
    (tmp_path / "ours.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="not in the paper's form"):
        write_corpus(str(tmp_path / "ours.jsonl"), tmp_path / "c.jsonl")


@pytest.mark.parametrize("form", ["jsonl", "paper"])
def test_written_augmentations_are_read_back(tmp_path: Path, form: str) -> None:
    file = tmp_path / "out" / "augmentations"
    write_augmentations(PASSAGES, {p.key: make_augmentation(p) for p in PASSAGES}, file, form)
    found = read_augmentations(str(file))
    assert found.rejects == ()
    for passage in PASSAGES:
        # By its text alone, as for a corpus that has the same passage under another id.
        assert found.find(replace(passage, sources=("other",))) == replace(make_augmentation(passage), attempts=0)
    if form == "paper":
        records = json.loads(file.read_text(encoding="utf-8"))
        assert [record["passages"][0] for record in records] == [passage_text(passage) for passage in PASSAGES]


@pytest.mark.slow
def test_augmentations_are_exported_and_imported_into_another_store(tmp_path: Path, ray_here: str) -> None:
    work = publish_passages(tmp_path, PASSAGES)

    # 1. Export.
    assert "3 augmentations" in work.run("export-augmentations", "-c", "config.yaml", "out/ours.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out" / "ours.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["p0", "p1", "p2"]

    # 2. Import a published file into an empty store, which gets the passages too. No model augments. Passages that the
    # store has forgotten are left out.
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**config, "store": str(tmp_path / "other")}))
    file, store = paper_file(tmp_path / "published.json"), Store(str(tmp_path / "other"))
    forgotten = passage_key("", PASSAGES[0].text)
    publish(store, with_tombstones(load_snapshot(Store(str(tmp_path / "store"))), [forgotten]))
    command = ["import-augmentations", "-c", "other.yaml", "--json", "--passages-to", "p.jsonl", str(file)]
    counts = json.loads(work.run(*command))
    assert counts == {
        "passages": 2,
        "imported": 2,
        "there_before": 0,
        "left_to_next_run": 0,
        "rejected": 0,
        "not_in_corpus": 1,
        "bad_records": 0,
    }
    stored = from_table(Augmentation, store.get_table(Augmentation, store.list("augmentations", ".parquet")))
    assert {a.digest for a in stored} == {make_augmentation(passage).digest for passage in PASSAGES[1:]}
