"""What goes into the corpus stage comes out of it or is rejected, whatever the files are like."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.resources import PROFILES
from pipelines.stages.ingest import _count, _count_records, _read, _rejects_of, _resolve_ids, ingest
from prag_core.config import CorpusConfig
from prag_core.data.listing import list_files
from prag_core.records import Passage, from_table

LONG = " ".join(f"Sentence {n} has five words." for n in range(60))


def corpus(folder: Path) -> CorpusConfig:
    """Write files that each test the stage in another way; six records are good and three are not."""
    folder.mkdir()
    lines = [
        {"id": "a", "title": "T", "text": LONG},
        {"id": "a#0", "title": "T", "text": "A record with the name of a part."},
        {"id": "a#9", "title": "T", "text": "A record with no such name."},
        {"id": "b#0", "title": "T", "text": "A record that looks like a part of b, which was not split."},
        {"id": "b", "title": "T", "text": "Short."},
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("Coffee.")
    (folder / "y.tsv").write_text('id\ttext\nc\tGood.\nd\t"never closed\n')
    (folder / "link.jsonl").symlink_to(folder / "x.jsonl")
    (folder / "broken.jsonl").symlink_to("nowhere")
    (folder / ".hidden").touch()
    return CorpusConfig(path=str(folder), max_words=100)


def test_no_source_is_the_name_of_two_passages(tmp_path: Path) -> None:
    config = corpus(tmp_path / "corpus")
    files = pa.table({"files": [pickle.dumps(list_files(config).files)]})
    rows = pa.concat_tables(_read(files, config, None))
    resolved = _resolve_ids(rows)
    counts = {name: value[0] for name, value in _count(resolved).items()}
    rejects = _rejects_of(resolved)
    # The link gives each record of x.jsonl a second time.
    assert _count_records(rows) == counts["records"] + len(rejects) == 2 * 6 + 1 + 2
    assert sorted((r.source, r.reason) for r in rejects) == [
        ("link.jsonl:2", "duplicate_id"),
        ("link.jsonl:6", "invalid_json"),
        ("x.jsonl:2", "duplicate_id"),
        ("x.jsonl:6", "invalid_json"),
        ("y.tsv:3", "invalid_tsv"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 14])
def test_the_report_adds_up_and_names_what_was_left_out(tmp_path: Path, ray_here: str, limit: int | None) -> None:
    config = corpus(tmp_path / "corpus").model_copy(update={"limit": limit})
    found = ingest(config, PROFILES["laptop"].tuned(partitions=3))
    assert found.report.balanced
    assert found.report.taken == (limit or 15)
    assert found.report.extra["files"] == 4
    assert found.report.extra["files_left_out"] == {"broken_link": 1, "hidden": 1}
    passages = [p for block in found.passages.iter_batches(batch_format="pyarrow") for p in from_table(Passage, block)]
    sources = [source for passage in passages for source in passage.sources]
    assert sorted(sources) == sorted({*sources}) == ["a#0", "a#1", "a#2", "a#9", "b", "b#0", "c", "caf\\xe9.txt"]
