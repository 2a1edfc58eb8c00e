import gzip
import itertools
import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prag_core.data.chunking import split_text
from prag_core.data.corpus import Piece, merge_pieces, read_records, resolve_ids
from prag_core.data.listing import list_files
from prag_core.errors import InputError
from prag_core.identity import passage_key
from prag_core.records import Passage, Reject, from_table, to_table
from tests.helpers.corpora import ROWS, config_of, jsonl, read, write

REASONS = {"invalid_utf8", "invalid_json", "invalid_tsv", "not_an_object", "missing_column", "wrong_type"}
REASONS |= {"empty_text", "too_long", "too_many_marks", "duplicate_id"}


def only_reject(path: Path, **settings: Any) -> Reject:
    """Return the one reject of a file whose other two records are good."""
    pieces, rejects = read(path, **settings)
    assert len(pieces) == 2
    assert len(rejects) == 1
    assert rejects[0].stage == "corpus"
    assert rejects[0].reason in REASONS
    return rejects[0]


# Formats


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.jsonl", (1, 2, 3)),
        ("x.ndjson.gz", (1, 2, 3)),
        ("x.JSON", (1, 2, 3)),
        ("x.tsv", (2, 4, 5)),  # after the header; the first text holds a newline
        ("x.tsv.gz", (2, 4, 5)),
        ("x.parquet", (1, 2, 3)),
    ],
)
def test_each_format_gives_the_same_pieces(tmp_path, name, lines):
    pieces, rejects = read(write(tmp_path / name), multiline_fields=True)
    assert rejects == []
    assert [(p.id, p.title, p.text) for p in pieces] == [(r["id"], r["title"], r["text"]) for r in ROWS]
    assert [(p.file, p.line) for p in pieces] == [(name, line) for line in lines]
    assert all(p.key == p.record_key == passage_key(p.title, p.text) and p.id == p.record_id for p in pieces)


@pytest.mark.parametrize("name", ["Notes on otters.txt", "Notes on otters.md", "Notes on otters.txt.gz"])
def test_a_text_file_is_one_record(tmp_path, name):
    data = b"\xef\xbb\xbf" + "Otters – and others.\r\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (piece,), rejects = read(tmp_path / name)
    assert (piece.id, piece.title, piece.text) == (
        name.removesuffix(".gz"),
        "Notes on otters",
        "Otters – and others.",
    )
    assert (piece.file, piece.line, rejects) == (name, 1, [])


@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv", "x.parquet"])
def test_columns_are_mapped(tmp_path, name):
    rows = [{"docid": r["id"], "head": r["title"], "body": r["text"], "url": "-"} for r in ROWS]
    path = write(tmp_path / name, rows, ("url", "body", "head", "docid"))
    columns = {"id": "docid", "title": "head", "text": "body"}
    pieces, rejects = read(path, columns=columns, multiline_fields=True)
    assert [(p.id, p.title, p.text) for p in pieces] == [(r["id"], r["title"], r["text"]) for r in ROWS]
    assert rejects == []


def test_the_configured_format_beats_the_name(tmp_path):
    path = jsonl(tmp_path / "corpus.txt", json.dumps(ROWS[0]))
    assert [p.id for p in read(path, format="jsonl")[0]] == ["a"]


def test_dpr_tsv_with_windows_line_ends_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "psgs_w100.tsv"
    path.write_bytes(b'\xef\xbb\xbfid\ttext\ttitle\r\n1\t"Aaron ( or ; ""Ahar"") is"\tAaron\r\n\r\n2\tText\tT\r\n')
    pieces, rejects = read(path)
    assert [(p.id, p.text, p.line) for p in pieces] == [("1", 'Aaron ( or ; "Ahar") is', 2), ("2", "Text", 4)]
    assert rejects == []


def test_ids_and_titles_may_be_numbers_or_absent(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl.d.jsonl",
        '{"id": 7, "title": 1984, "text": "A"}',
        "",
        '{"text": "B"}',
        '{"id": null, "title": null, "text": "C"}',
        '{"id": " ", "text": "D"}',
    )
    pieces, rejects = read(path)
    assert [(p.id, p.title, p.line) for p in pieces] == [
        ("7", "1984", 1),
        ("x.jsonl.d.jsonl:3", "", 3),
        ("x.jsonl.d.jsonl:4", "", 4),
        ("x.jsonl.d.jsonl:5", "", 5),
    ]
    assert rejects == []


def test_control_characters_are_removed(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", json.dumps({"id": "a\0", "title": "T\x1b\n U", "text": "A\0B\x07\tC\x85D\x9f"}))
    (piece,), _ = read(path)
    assert (piece.id, piece.title, piece.text) == ("a", "T U", "AB\tC\x85D")


def test_an_id_has_one_line(tmp_path):
    """It is printed and logged, where a second line would pass for another message."""
    path = jsonl(tmp_path / "x.jsonl", json.dumps({"id": "a\r\nERROR\u2028b", "text": "A"}))
    assert [piece.id for piece in read(path)[0]] == ["a ERROR b"]


# Files that cannot be read


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_a_corrupt_gzip_names_the_file(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    data = bytearray(gzip.compress(json.dumps({"text": random.Random(0).randbytes(9_000).hex()}).encode()))
    if damage == "truncated":
        data = data[:-2_000]
    elif damage == "flipped":
        data[5_000:5_100] = b"\xff" * 100
    else:
        data = bytearray(b'{"text": "plain"}\n')
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.jsonl\.gz: cannot be read: .+"):
        read(path)


@pytest.mark.parametrize("damage", ["not Parquet", "truncated", "flipped"])
def test_a_broken_parquet_names_the_file(tmp_path, damage):
    path = write(tmp_path / "x.parquet")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[4:60] = b"\xff" * 56
    path.write_bytes(
        b"plainly not Parquet" if damage == "not Parquet" else data[:-30] if damage == "truncated" else data
    )
    with pytest.raises(InputError, match=r"x\.parquet: cannot be read: .+"):
        read(path)


@pytest.mark.parametrize("name", ["x.tsv", "x.parquet"])
def test_a_file_without_the_text_column_fails_at_once(tmp_path, name):
    path = write(tmp_path / name)
    with pytest.raises(InputError, match=r"has no column 'body'; it has 'id', .*'text'") as caught:
        read(path, columns={"text": "body"})
    assert str(path) in caught.value.message
    assert "corpus.columns.text" in caught.value.remedy


def test_a_missing_file_fails_when_it_is_read(tmp_path):
    path = jsonl(tmp_path / "gone.jsonl", *GOOD)
    (file,) = list_files(config_of(path)).files
    path.unlink()
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read"):
        list(read_records(file, config_of(path)))


# Records that cannot be used

GOOD = ('{"id": "g1", "text": "good"}', '{"id": "g2", "text": "good too"}')


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "caf\xe9"}', "invalid_utf8", "position 13"),
        (b'{"text": "\\ud83d alone"}', "invalid_utf8", "surrogates"),
        (b'{"text": "cut', "invalid_json", "column 10"),
        (b"[" * 200_000, "invalid_json", "recursion"),
        (b'{"id": ' + b"9" * 5_000 + b', "text": "x"}', "invalid_json", "digits"),
        (b'["text"]', "not_an_object", "list"),
        (b"null", "not_an_object", "NoneType"),
        (b'{"text": "one", "text": "two"}', "invalid_json", "the key 'text' comes twice"),
        (b'{"text": "x", "meta": {"n": 1, "n": 2}}', "invalid_json", "the key 'n' comes twice"),
        (b'{"text": NaN}', "wrong_type", "'text' holds a float"),
        (b'{"id": NaN, "text": "x"}', "wrong_type", "'id' holds a float"),
        (b'{"text": "x"}{"text": "y"}', "invalid_json", "Extra data"),
        (b'{"id": "x", "body": "b"}', "missing_column", "'text'; there are 'id', 'body'; corpus.columns.text"),
        (b"{}", "missing_column", "none"),
        (b'{"text": " \\n\\u0000"}', "empty_text", "'text'"),
        (b'{"text": null}', "empty_text", "'text'"),
        ('{"text": "a' + 101 * "\u0301" + '"}', "too_many_marks", "over 100 marks on one letter"),
        (b'{"text": 5}', "wrong_type", "'text' holds a int"),
        (b'{"text": "x", "id": ["x"]}', "wrong_type", "'id' holds a list"),
        (b'{"text": "x", "title": true}', "wrong_type", "'title' holds a bool"),
        (b'{"text": "' + b"x" * 2_000_000 + b'"}', "too_long", "2,000,012 bytes, over corpus.max_record_bytes"),
    ],
)
def test_a_bad_line_is_rejected_and_the_others_are_read(tmp_path, line, reason, detail):
    reject = only_reject(jsonl(tmp_path / "x.jsonl", GOOD[0], "", line, GOOD[1]))
    assert (reject.reason, reject.source) == (reason, "x.jsonl:3")
    assert detail in reject.detail
    assert len(reject.detail) < 300


@pytest.mark.parametrize(
    ("row", "reason", "line"),
    [
        (b"x\tcaf\xe9\tt", "invalid_utf8", 3),
        (b"x\t \tt", "empty_text", 3),
        (b"x\ttext", "invalid_tsv", 3),
        (b"x\ttext\rmore\tt", "invalid_tsv", 3),
        (b'x\t"text" more\tt', "invalid_tsv", 3),
        (b"x\ttext\tt\tmore", "invalid_tsv", 3),
        (b'x\t"Heroes" is a song\tt', "invalid_tsv", 3),
        (b'x\t"never closed\tt', "invalid_tsv", 3),
        (b"x\t" + b"w " * 30_000 + b"\tt", "too_long", 3),
        (b'x\t"' + b"w\n" * 30_000 + b'"\tt', "too_long", 3),
    ],
)
@pytest.mark.parametrize("end", [b"", b'"after" it\tr\n'], ids=["", "another"])
def test_a_bad_row_is_rejected_and_the_others_are_read(tmp_path, row, reason, line, end):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"id\ttext\ttitle\n1\tgood\tt\n" + row + b"\n2\tgood too\tt\n" + end)
    pieces, rejects = read(path, max_record_bytes=50_000, multiline_fields=b"w\n" in row)
    if b"w\n" in row:  # where the limit falls, reading goes on: the rest of the record is rejected by line
        assert {r.reason for r in rejects[1:]} <= {"invalid_tsv"}
        assert "is a quote never closed?" in rejects[0].detail
    else:
        assert len(rejects) == 1 + bool(end)
    assert (rejects[0].reason, rejects[0].source) == (reason, f"x.tsv:{line}")
    assert [p.id for p in pieces] == ["1", "2"]


# What follows the header line: each row is taken or rejected, and none is swallowed by another.
ODD_ROWS = [
    (b'1\t"Heroes is a song\tt\n2\tsecond\tt\n3\tthird\tt\n4\tby "Bowie"\tt\n5\tlast\tt\n', ["2", "3", "4", "5"]),
    (b'1\t"Heroes is a song\tt\n2\tsecond\tt\n3\t"\tt\n', ["2"]),
    (b'1\t"a\n2\tb"\tt\n', ["2"]),
    (b'"1\ta\tt\n2"\tb\tt\n3\tc\tt\n', ['2"', "3"]),
    (b'1\ta\t"t\n2\tb\t"t\n', []),
    (b'1\t"a""b"\tt\n2\t"""a"" b"\tt\n3\ta""b\tt\n', ["1", "2", "3"]),
    (b'1\t"a\tb"\tt\n2\t"a"\t"t"\r\n3\ta\rb\tt\n', ["1", "2"]),
    (b"1\ta\0b\tt\n2\tb\tt\0\n\0\tc\tt\n", ["1", "2", "x.tsv:4"]),
    (b"1\ta\xe2\x80\xa8b\xc2\x85c\x0bd\tt\n2\tb\tt", ["1", "2"]),
    (b"1\t" + b"w" * 140_000 + b"\tt\n2\t" + b"w" * 210_000 + b"\tt\n3\tc\tt\n", ["1", "3"]),
    (b'1\t"\xff\n2\tb"\tt\n3\tc\tt\n', ["2", "3"]),
]


@pytest.mark.parametrize(("rows", "ids"), ODD_ROWS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_each_row_of_a_tsv_file_is_taken_or_rejected(tmp_path, rows, ids, end):
    path = tmp_path / "x.tsv"
    path.write_bytes((b"id\ttext\ttitle\n" + rows).replace(b"\n", end))
    pieces, rejects = read(path, max_record_bytes=200_000, max_words=10_000)
    assert [p.id for p in pieces] == ids
    places = sorted([p.line for p in pieces] + [int(r.source.partition(":")[2]) for r in rejects])
    assert places == [*range(2, 3 + rows.rstrip(b"\n").count(b"\n"))]


@given(st.lists(st.text('ab"\t\r \0', max_size=12), min_size=1, max_size=8))
def test_no_line_of_a_tsv_file_vanishes(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("tsv") / "x.tsv"
    path.write_text("text\tid\n" + "\n".join(lines) + "\n", newline="")
    pieces, rejects = read(path)
    places = [p.line for p in pieces] + [int(r.source.partition(":")[2]) for r in rejects]
    assert len(set(places)) == len(places)
    blank = [n for n, line in enumerate(lines, start=2) if not {*line} & {*"ab"}]
    assert {*range(2, 2 + len(lines))} - {*blank} <= {*places}


def test_a_field_may_span_lines_if_that_is_asked_for(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('id\ttext\n1\t"a\nb"\n2\tc\n3\t"d\n4\te\n')
    pieces, rejects = read(path, multiline_fields=True)
    assert [(p.id, p.text, p.line) for p in pieces] == [("1", "a\nb", 2), ("2", "c", 4), ("4", "e", 6)]
    assert [r.source for r in rejects] == ["x.tsv:5"]
    pieces, rejects = read(path)
    assert [p.id for p in pieces] == ["2", "4"]
    assert [(r.source, "corpus.multiline_fields" in r.detail) for r in rejects] == [
        ("x.tsv:2", True),
        ("x.tsv:3", False),
        ("x.tsv:5", True),
    ]


def test_a_column_that_is_there_twice_is_refused_by_name(tmp_path):
    (tmp_path / "x.tsv").write_text("id\ttext\ttext \n1\ta\tb\n")
    columns = [pa.array(["1"]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "id", "id"]), tmp_path / "x.parquet")
    for name, column in (("x.tsv", "text"), ("x.parquet", "id")):
        with pytest.raises(InputError, match=rf"{name}: has the column '{column}' more than once"):
            read(tmp_path / name)


@pytest.mark.parametrize("column", ["id", "title"])
def test_a_configured_column_that_is_missing_is_named(tmp_path, column):
    for name in ("x.tsv", "x.parquet"):
        write(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: has no column 'name'") as caught:
            read(tmp_path / name, columns={column: "name"})
        assert f"corpus.columns.{column}" in caught.value.remedy


def test_the_header_of_a_joined_file_is_no_record(tmp_path):
    (tmp_path / "x.tsv").write_text("id\ttext\n1\ta\nid\ttext\n2\tb\n")
    pieces, rejects = read(tmp_path / "x.tsv")
    assert [p.id for p in pieces] == ["1", "2"]
    assert [(r.reason, r.source) for r in rejects] == [("invalid_tsv", "x.tsv:3")]


def test_a_changed_page_of_parquet_is_found_by_its_checksum(tmp_path):
    file = tmp_path / "x.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"id": ["1"], "text": ["a river"]}), file, write_page_checksum=True, **plain)
    file.write_bytes(file.read_bytes().replace(b"a river", b"a tower"))
    with pytest.raises(InputError, match=r"x\.parquet: cannot be read"):
        read(file)


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32()])
def test_a_value_that_python_cannot_hold_rejects_its_row(tmp_path, kind):
    days = pa.array([2**30] * 2, pa.int32()) if pa.types.is_date(kind) else pa.array([2**62] * 2)
    pq.write_table(pa.table({"id": days.cast(kind), "text": ["a", "b"]}), tmp_path / "x.parquet")
    pieces, rejects = read(tmp_path / "x.parquet")
    assert pieces == []
    assert [(r.reason, r.source) for r in rejects] == [("wrong_type", "x.parquet:1"), ("wrong_type", "x.parquet:2")]


def test_a_bad_parquet_row_is_rejected_and_the_others_are_read(tmp_path):
    bad_bytes = pa.array([b"good", b"\xff", None, b"x" * 3_000, b"good too"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad_bytes, "id": [1, 2, 3, 4, 5]}), tmp_path / "x.parquet")
    pieces, rejects = read(tmp_path / "x.parquet", max_record_bytes=2_000)
    assert [(p.id, p.text) for p in pieces] == [("1", "good"), ("5", "good too")]
    assert [(r.reason, r.source) for r in rejects] == [
        ("invalid_utf8", "x.parquet:2"),
        ("empty_text", "x.parquet:3"),
        ("too_long", "x.parquet:4"),
    ]


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"K\xe4fer", "invalid_utf8", "is not UTF-8 at position 1"),
        (b"", "empty_text", "holds no text"),
        (b" \n", "empty_text", "holds no text"),
        (b"x" * 9_000, "too_long", "9,000 bytes"),
    ],
)
def test_a_bad_text_file_is_rejected_and_the_others_are_read(tmp_path, data, reason, detail):
    for name, content in (("a.txt", b"good"), ("b.txt", data), ("c.txt", b"good too")):
        (tmp_path / name).write_bytes(content)
    reject = only_reject(tmp_path, max_record_bytes=1_000)
    assert (reject.reason, reject.source) == (reason, "b.txt:1")
    assert detail in reject.detail


def test_in_is_out_plus_rejected(tmp_path):
    makers = [
        lambda n: json.dumps({"id": n, "text": f"text {n}"}),
        lambda n: json.dumps({"id": n, "text": f"Sentence {n} goes on. " * 200}),
        lambda n: "{broken",
        lambda n: json.dumps({"id": n}),
        lambda n: json.dumps({"id": n, "text": "x" * 60_000}),
    ]
    choice = random.Random(0)
    lines = [choice.choice(makers)(n) for n in range(500)]
    pieces, rejects = read(jsonl(tmp_path / "x.jsonl", *lines), max_record_bytes=50_000)
    places = [f"{p.file}:{p.line}" for p in pieces] + [r.source for r in rejects]
    assert sorted(set(places)) == sorted(f"x.jsonl:{n}" for n in range(1, 501))
    assert len({p.line for p in pieces}) + len(rejects) == 500


@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv.gz", "x.parquet"])
def test_a_passage_of_2_mb_is_split_when_it_is_allowed(tmp_path, name):
    text = "The otter swims on its back, and it sleeps there too. " * 37_000
    path = write(tmp_path / name, [{"id": "long", "title": "T", "text": text}])
    pieces, rejects = read(path, max_record_bytes=3_000_000)
    assert rejects == []
    assert " ".join(p.text for p in pieces).split() == text.split()
    assert [p.id for p in pieces] == [f"long#{n}" for n in range(len(pieces))]
    assert {(p.record_id, p.record_key) for p in pieces} == {("long", passage_key("T", text))}
    assert all(p.key == passage_key(p.title, p.text) for p in pieces)


def test_a_huge_line_is_never_held_in_memory(tmp_path):
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.writelines(itertools.repeat(b"x" * 1_000_000, 60))
        file.write(b'\n{"text": "good"}')
    tracemalloc.start()
    pieces, rejects = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [r.reason for r in rejects] == ["too_long"]
    assert [p.line for p in pieces] == [2]
    assert peak < 10_000_000


def test_a_text_that_a_small_parquet_file_repeats_is_in_memory_once(tmp_path):
    text, none = "x" * 4_000_000, pa.array([[]] * 61, pa.list_(pa.string()))
    texts = pa.array(["good", *itertools.repeat(text, 60)])
    tables = {kind: pa.table({"text": texts.cast(kind), "acl": none}) for kind in ("string", "large_string", "binary")}
    tables["list"] = pa.table({"text": ["good", "a"], "acl": [[], [text] * 60]})
    for kind, table in tables.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(table, path, dictionary_pagesize_limit=2**27)
        assert path.stat().st_size < 1_000_000
    # Arrow counts its peak from a process's beginning on.
    script = (
        "import sys, pyarrow as pa; from prag_core.config import CorpusConfig; from prag_core.data.corpus import *;"
        "from prag_core.data.listing import list_files;"
        "config = CorpusConfig(path=sys.argv[1], columns={'access': 'acl'});"
        "found = [one for file in list_files(config).files for one in read_records(file, config)];"
        "print(len(found), sum(getattr(one, 'reason', '') == 'too_long' for one in found));"
        "print(pa.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    counts, peak = done.stdout.splitlines()
    assert counts == "185 121"  # of the list, one record; bytes are no text
    assert int(peak) < 100_000_000  # of 240 MB


def test_the_tags_of_a_parquet_row_count_for_its_size(tmp_path):
    tags = [["a"], ["b"] * 2_000, ["c" * 2_000], None]
    pq.write_table(pa.table({"text": ["1", "2", "3", "4"], "acl": tags}), tmp_path / "x.parquet")
    pieces, rejects = read(tmp_path / "x.parquet", columns={"access": "acl"}, max_record_bytes=1_500)
    assert [(piece.text, piece.access) for piece in pieces] == [("1", ("a",)), ("4", ())]
    assert [(reject.reason, reject.source) for reject in rejects] == [
        ("too_long", "x.parquet:2"),
        ("too_long", "x.parquet:3"),
    ]


TENSOR = pa.fixed_shape_tensor(pa.int32(), [2])


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.struct({"a\x1b": pa.string()}), TENSOR])
def test_a_parquet_column_that_cannot_be_texts_is_named_and_not_read(tmp_path, kind):
    pq.write_table(pa.table({"id": ["1"], "text": pa.nulls(1, kind)}), tmp_path / "x.parquet")
    with pytest.raises(
        InputError, match=r"x\.parquet: its column 'text' holds (list|struct|fixed).*, which is no text"
    ) as caught:
        read(tmp_path / "x.parquet")
    assert "\x1b" not in str(caught.value)


def test_a_parquet_column_whose_name_is_not_utf8_names_the_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "wxyz": ["b"]}), tmp_path / "x.parquet", store_schema=False)
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"wxyz", b"wx\xff\xfe"))
    with pytest.raises(InputError, match=r"x\.parquet: cannot be read"):
        read(tmp_path / "x.parquet")


def test_many_marks_are_only_refused_on_one_letter(tmp_path):
    texts = ["a" + "\u0301" * 100, "e\u0301" * 500, "กิ่ง" * 500, "─" * 500, "😀" * 500]
    pieces, rejects = read(jsonl(tmp_path / "x.jsonl", *(json.dumps({"text": text}) for text in texts)))
    assert ([piece.text for piece in pieces], rejects) == (texts, [])


def test_reading_is_lazy(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *GOOD)
    with path.open("ab") as file:
        file.writelines(json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(200_000))
    (file,) = list_files(config_of(path)).files
    start = time.perf_counter()
    assert [p.id for p in itertools.islice(read_records(file, config_of(path)), 2)] == ["g1", "g2"]
    assert time.perf_counter() - start < 0.2


# Splitting

SENTENCES = st.lists(
    st.lists(st.text("abcXYZ,é", min_size=1, max_size=8), min_size=1, max_size=70).map(" ".join), max_size=30
)
STOPS = st.sampled_from([". ", "! ", '?" ', "… ", ".\n\n", " ", ".) "])


@given(SENTENCES, STOPS, st.integers(20, 100))
def test_splitting_keeps_all_words_in_order_and_within_the_limit(sentences, stop, max_words):
    text = stop.join(sentences)
    pieces = split_text(text, max_words)
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece.split()) <= max_words for piece in pieces)
    assert text.strip() == "" or all(piece.strip() for piece in pieces)
    assert len(text.split()) > max_words or pieces == [text]


@given(st.text("あ漢字、。「」ア a.", max_size=500), st.integers(20, 60))
def test_splitting_any_script_loses_no_character(text, max_words):
    pieces = split_text(text, max_words)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert text.strip() == "" or all(pieces)


def test_pieces_end_with_sentences_and_are_even():
    text = " ".join(f"Sentence number {n} has exactly seven words." for n in range(31))  # 217 words
    pieces = split_text(text, 200)
    assert [len(p.split()) for p in pieces] == [112, 105]
    assert all(p.endswith("words.") for p in pieces)


def test_a_sentence_over_the_limit_is_split_between_words():
    pieces = split_text("Short one. " + "Word " * 50 + "end. Short two.", 20)
    assert all(len(p.split()) <= 20 for p in pieces)
    assert [len(p.split()) for p in pieces] == [19, 17, 19]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a b c d e f g h Mr. Smith met J. R. R. Tolkien in St. Ives. Then he left at No. 5.", "Ives."),
        ('A b c d e f g h i "Who?" he asked, and she said: "Nobody!" Then all was still.', '"Nobody!"'),
        ("a b c d e f g h i j k of version 3.11 and example.org of 1.5 kg. Then x y z?", "kg."),
    ],
)
def test_where_sentences_end(text, first):
    assert split_text(text, len(text.split()) - 1)[0].endswith(first)


def test_japanese_without_spaces_is_split_at_its_full_stops():
    text = "吾輩は「猫」である。名前はまだ無い。" * 300
    pieces = split_text(text, 200)
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("。") and len(piece) <= 300 for piece in pieces)
    assert max(map(len, pieces)) - min(map(len, pieces)) < 100


@pytest.mark.parametrize("text", [". " * 300_000, "." * 900_000, "x" * 900_000, '."' * 450_000, "。" * 300_000])
def test_splitting_takes_linear_time(text):
    start = time.perf_counter()
    pieces = split_text(text, 200)
    assert time.perf_counter() - start < 10
    assert "".join("".join(pieces).split()) == "".join(text.split())


# Ids and duplicates


def piece(id: str, text: str, file: str = "x.jsonl", line: int = 1) -> Piece:
    key = passage_key("", text)
    return Piece(key, "", text, id, id, key, file, line)


SAME_ID = [
    piece("a", "first text", "x.jsonl", 9),
    piece("a", "first  text", "x.jsonl", 10),  # the same content, spaced otherwise
    piece("a", "first text", "y.jsonl", 1),
    piece("a", "other text", "x.jsonl", 11),
    piece("a", "other text", "x.jsonl", 100),
    piece("a", "third text", "z.jsonl", 1),
]


@given(st.permutations(SAME_ID))
def test_the_first_record_of_an_id_decides_whatever_the_order(pieces):
    kept, rejects = resolve_ids(pieces)
    assert kept == SAME_ID[:3]
    assert [r.source for r in rejects] == ["x.jsonl:11", "x.jsonl:100", "z.jsonl:1"]
    assert {r.reason for r in rejects} == {"duplicate_id"}
    assert all("'a'" in r.detail and "x.jsonl:9" in r.detail for r in rejects)


@given(st.randoms(use_true_random=False))
def test_no_two_texts_share_a_name(chance):
    parts = [Piece(f"k{n}", "", "", f"a#{n}", f"a#{n}", "record", "x.jsonl", 1) for n in range(3)]
    same, other = (Piece(key, "", "t", "a#1", "a#1", key, "y.jsonl", line) for line, key in enumerate(("k1", "z"), 1))
    split = [Piece(f"s{n}", "", "t", f"a#1#{n}", "a#1", "whole", "z.jsonl", 1) for n in range(2)]
    chance.shuffle(parts)
    pieces = [same, other]
    chance.shuffle(pieces)
    kept, rejects = resolve_ids(pieces, parts)
    assert kept == [same]
    assert [(r.source, r.reason) for r in rejects] == [("y.jsonl:2", "duplicate_id")]
    assert "'a#1' is the name of a part of the record at x.jsonl:1" in rejects[0].detail
    assert resolve_ids(split, parts) == (split, [])  # its own parts have other names


@given(st.randoms(use_true_random=False))
def test_a_split_record_is_kept_or_rejected_as_a_whole(chance):
    whole = [Piece(f"k{n}", "", f"t{n}", f"a#{n}", "a", "record 1", "x.jsonl", 1) for n in range(12)]
    other = [Piece(f"l{n}", "", f"u{n}", f"a#{n}", "a", "record 2", "x.jsonl", 2) for n in range(3)]
    pieces = whole + other
    chance.shuffle(pieces)
    kept, rejects = resolve_ids(pieces)
    assert set(kept) == set(whole)
    assert [r.source for r in rejects] == ["x.jsonl:2"]


SAME_KEY = [
    piece("b", "One  text.", "x.jsonl", 1),
    piece("a", "One text.", "y.jsonl", 2),
    piece("a", "One\ntext.", "y.jsonl", 10),
    piece("c", "One text. ", "a.jsonl", 1),
]


@given(st.permutations(SAME_KEY))
def test_equal_pieces_become_one_passage_whatever_the_order(pieces):
    assert merge_pieces(pieces) == Passage(passage_key("", "One text."), "", "One text.", ("a", "b", "c"))


def test_pieces_and_rejects_travel_as_arrow(tmp_path):
    pieces, rejects = read(jsonl(tmp_path / "x.jsonl", *GOOD, "broken"))
    assert from_table(Piece, to_table(Piece, pieces)) == pieces
    assert from_table(Reject, to_table(Reject, rejects)) == rejects


TAGGED = [
    ("hr", ("hr",)),
    ("hr, board", ("board", "hr")),
    (["b", "a", "b"], ("a", "b")),
    ([], ()),
    (None, ()),
]


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_access_tags_are_read_and_go_with_each_piece(tmp_path, name):
    tags = [row for row in TAGGED if name != "c.parquet" or not isinstance(row[0], str)]
    rows = [{"id": str(n), "text": f"{n} is one. " * 30, "acl": given} for n, (given, _) in enumerate(tags)]
    pieces, rejects = read(write(tmp_path / name, rows), columns={"access": "acl"}, max_words=40)
    assert not rejects
    assert len(pieces) > len(rows)
    assert all(piece.access == tags[int(piece.record_id)][1] for piece in pieces)
    assert all(piece.access == () for piece in read(tmp_path / name)[0])


@pytest.mark.parametrize("given", [5, {"hr": 1}, [""], ["hr", " "], ["hr", 3], ["\x01"], "hr,,", " "])
def test_tags_that_cannot_be_read_never_make_a_passage_public(tmp_path, given):
    path = write(tmp_path / "c.jsonl", [{"text": "Secret.", "acl": given}, {"text": "No column."}])
    pieces, rejects = read(path, columns={"access": "acl"})
    assert not pieces
    assert [reject.reason for reject in rejects] == ["wrong_type", "missing_column"]


@pytest.mark.parametrize(
    ("tags", "merged"),
    [([("hr",), ("hr",)], ("hr",)), ([("hr",), ("board", "it")], ("board", "hr", "it")), ([("hr",), ()], ())],
)
def test_who_may_read_one_duplicate_may_read_the_passage(tags, merged):
    pieces = [Piece("k", "T", "Text.", str(n), str(n), "k", "f", n, access) for n, access in enumerate(tags)]
    assert merge_pieces(pieces).access == merge_pieces(pieces[::-1]).access == merged
