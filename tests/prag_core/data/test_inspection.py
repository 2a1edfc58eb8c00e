"""What is said of a corpus before there are settings: files, fields, number of records, what cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prag_core.data import inspection
from prag_core.data.inspection import CorpusSummary, inspect_corpus
from prag_core.errors import InputError
from tests.helpers.corpora import config_of, jsonl, write

ROWS = [{"id": str(n), "title": f"Otter {n}", "text": f"Otter {n} swims."} for n in range(3)]


def look(path: Path, **columns: str) -> CorpusSummary:
    return inspect_corpus(config_of(path, columns=columns))


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.tsv", "c.tsv.gz", "c.parquet"])
def test_each_format_is_counted_and_its_fields_are_named(tmp_path: Path, name: str) -> None:
    found = look(write(tmp_path / name, ROWS))
    assert (found.records, found.certainty, found.passages, found.rejected) == (3, "", 3, ())
    assert sorted(found.fields) == ["id", "text", "title"]


def test_a_folder_of_texts_and_other_files_is_one_corpus(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("Otters swim.")
    (tmp_path / "c.md").write_text("Seals swim. " * 300)
    (tmp_path / "d.pdf").write_bytes(b"%PDF")
    found = look(tmp_path)
    assert (found.records, found.certainty, found.sampled) == (5, "", 5)
    assert found.passages > 5  # the long text is split
    assert [item.first for item in found.listing.left_out] == ["d.pdf"]


def test_usual_other_names_of_the_fields_are_found(tmp_path: Path) -> None:
    found = look(jsonl(tmp_path / "c.jsonl", '{"docid": "1", "Headline": "T", "contents": "Otters swim."}'))
    assert found.columns.model_dump(exclude_defaults=True) == {"id": "docid", "title": "Headline", "text": "contents"}
    assert (found.passages, found.rejected) == (1, ())


def test_a_field_that_is_named_is_used(tmp_path: Path) -> None:
    found = look(jsonl(tmp_path / "c.jsonl", '{"text": "no", "story": "Otters swim. Seals swim."}'), text="story")
    assert found.columns.text == "story"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"a": "x", "b": "y"}\n', r"no field 'text' with the texts; there are 'a', 'b'\n.*--text FIELD"),
        ("c.tsv", "1\tOtters swim.\n", r"no field 'text'.*'1', 'Otters swim\.'\n.*first line of a TSV"),
        ("c.jsonl", '{"text": 7}\n{"text": 8}\n', r"c\.jsonl:1: cannot be used.*holds a int.*\n.*one object a line"),
        ("c.json", '[\n{"text": "x"}\n]\n', r"c\.json:1: cannot be used.*of 3.*\n.*one object a line"),
        ("c.parquet", "not Parquet", r"c\.parquet: cannot be read"),
        ("c.csv", "id,text\n", r"its name has no known ending"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        look(tmp_path / name)


def test_records_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in ROWS]
    found = look(jsonl(tmp_path / "c.jsonl", *good, "{", '{"text": ""}'))
    assert (found.sampled, [reject.reason for reject in found.rejected]) == (5, ["invalid_json", "empty_text"])


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_large_corpus_is_estimated_from_its_beginning(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_COUNTED_BYTES", 8_000_000)
    lines = [json.dumps({"text": f"{n} {n * n} {n**3} swims."}) for n in range(200_000)]
    for part in range(3):
        opener = gzip.open if ending else open
        with opener(tmp_path / f"{part}.jsonl{ending}", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
    found = look(tmp_path)
    assert found.certainty == "about"
    # The position in a packed file is up to a buffer ahead, which counts much in so small a one.
    assert found.records == pytest.approx(600_000, rel=0.3 if ending else 0.1)
    assert found.records % 10_000 == 0
    assert found.sampled == 498
