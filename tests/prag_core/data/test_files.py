"""Files are read in the same way wherever they are and however they are packed, or the error says why not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from prag_core.augmentation.formats import read_augmentations
from prag_core.config import StorageConfig
from prag_core.data.corpus import read_first_records
from prag_core.data.listing import list_files
from prag_core.data.question_sets import read_questions
from prag_core.errors import InputError
from tests.helpers.corpora import ROWS, config_of, read, write
from tests.helpers.http_files import serve_folder
from tests.helpers.s3 import S3Server

NAMES = ["x.jsonl", "x.jsonl.gz", "x.tsv", "x.tsv.gz", "x.parquet", "x.txt", "x.txt.gz"]
# Over 6 MiB, which fsspec reads at first: a server that knows no ranges can only be read from the start.
LONG = [{"id": str(n), "title": f"Title {n}", "text": f"Record {n}. " + "word " * 190} for n in range(8_000)]
ONE_LINE = [{**row, "text": row["text"].replace("\n", " ")} for row in ROWS]


def content(name: str, folder: Path, rows: list[dict[str, str]]) -> bytes:
    if ".txt" in name:
        data = rows[0]["text"].encode()
        return gzip.compress(data) if name.endswith(".gz") else data
    return write(folder / name, rows).read_bytes()


def check(path: str, name: str, rows: list[dict[str, str]], storage: StorageConfig | None = None) -> None:
    config = config_of(path, max_words=1_000)
    pieces, rejects = read(path, storage, max_words=1_000)
    texts = [rows[0]["text"].strip()] if ".txt" in name else [row["text"].strip() for row in rows]
    assert ([p.text for p in pieces], rejects) == (texts, [])
    first = read_first_records(list_files(config, storage).files, config, storage)
    assert first == pieces[:1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    for name in NAMES:
        (folder / name).write_bytes(content(name, folder, LONG))
    with serve_folder(folder) as url:
        yield url, folder


@pytest.mark.parametrize("name", NAMES)
def test_each_format_over_http(served: tuple[str, Path], name: str) -> None:
    url, _ = served
    check(f"{url}/{name}", name, LONG)


def test_questions_and_augmentations_over_http(served: tuple[str, Path]) -> None:
    url, folder = served
    (folder / "q.jsonl").write_text('{"question": "Who?", "answer": "Orla"}')
    (folder / "q.tsv").write_text('id\tprop\tquestion\tpossible_answers\n1\tp\tWho?\t["Orla"]\n')
    pair = {"question": "Who?", "answer": "Orla", "full_answer": "Orla did."}
    (folder / "augmented.jsonl").write_text(json.dumps({"id": "a", "qa": [pair]}))
    for name in ("q.jsonl", "q.tsv", "q.tsv?signature=s"):
        assert [q.answers for q in read_questions(f"{url}/{name}")] == [("Orla",)]
    assert [*read_augmentations(f"{url}/augmented.jsonl").by_name] == ["a"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("forbidden.jsonl", "403"), ("cut.jsonl", ".+"), ("cut.parquet", ".+"), ("none.jsonl", "no such")],
)
def test_a_server_that_fails_is_said_to_fail(tmp_path: Path, name: str, said: str) -> None:
    if name != "none.jsonl":
        (tmp_path / name).write_bytes(content(name, tmp_path, LONG[:500]))
    with serve_folder(tmp_path) as url:
        with pytest.raises(InputError, match=said) as caught:
            read(f"{url}/{name}")
        assert name in caught.value.message
        with pytest.raises(InputError, match=said):
            read_questions(f"{url}/{name}")
    with pytest.raises(InputError, match=r"(?i)connect") as caught:  # the server is down
        read(f"{url}/{name}")
    assert "no such file" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_format_on_s3(tmp_path: Path, s3_server: S3Server, name: str) -> None:
    fs, folder = fsspec.filesystem("s3"), f"{s3_server.bucket}/{uuid.uuid4().hex}"
    fs.pipe(f"{folder}/{name}", content(name, tmp_path, LONG))
    fs.pipe(f"{folder}/log::2.jsonl", b'{"text": "colons"}')
    check(f"s3://{folder}/{name}", name, LONG)
    check(f"s3://{folder}/x*", name, LONG)
    assert [p.text for p in read(f"s3://{folder}/log::2.jsonl")[0]] == ["colons"]


@pytest.mark.slow
def test_markers_of_folders_on_s3(s3_server: S3Server) -> None:
    fs, folder = fsspec.filesystem("s3"), f"{s3_server.bucket}/{uuid.uuid4().hex}"
    fs.call_s3("put_object", Bucket=s3_server.bucket, Key=f"{folder.partition('/')[2]}/", Body=b"")
    fs.call_s3("put_object", Bucket=s3_server.bucket, Key=f"{folder.partition('/')[2]}/sub/", Body=b"")
    fs.pipe(f"{folder}/sub/x", b'{"text": "X"}')
    assert [p.text for p in read(f"s3://{folder}", format="jsonl")[0]] == ["X"]


@pytest.mark.slow
def test_the_corpus_is_read_from_the_configured_server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, path = fsspec.filesystem("s3"), f"{s3_server.bucket}/{uuid.uuid4().hex}.jsonl"
    fs.pipe(path, b'{"question": "Who?", "answer": "Orla", "text": "X", "id": "a"}')
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage = StorageConfig(endpoint_url=s3_server.endpoint, retries=0, timeout_s=5)
    assert [p.text for p in read(f"s3://{path}", storage)[0]] == ["X"]
    assert len(read_questions(f"s3://{path}", storage=storage)) == 1
    assert read_augmentations(f"s3://{path}", storage).rejects[0].reason == "wrong_type"
    with pytest.raises(InputError, match="cannot be listed"):
        read(f"s3://{path}", StorageConfig(retries=0, timeout_s=5))


# Packed files


def zipped(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


DATA = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
PACKED = {
    "x.jsonl.gz": gzip.compress(DATA),
    "x.jsonl.bz2": bz2.compress(DATA),
    "x.jsonl.xz": lzma.compress(DATA),
    "x.jsonl.zip": zipped(("folder/", b""), ("folder/x.jsonl", DATA)),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PACKED[name])
    with serve_folder(tmp_path) as url:
        for path in (tmp_path / name, f"{url}/{name}"):
            assert [p.id for p in read(path, format="jsonl")[0]] == ["a", "b", "c"]


def test_what_the_client_has_unpacked_is_not_unpacked_again(tmp_path: Path) -> None:
    (tmp_path / "encoded.jsonl.gz").write_bytes(PACKED["x.jsonl.gz"])
    with serve_folder(tmp_path) as url:
        for path in (f"{url}/encoded.jsonl.gz", f"simplecache::{url}/encoded.jsonl.gz"):
            assert [p.id for p in read(path)[0]] == ["a", "b", "c"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty of meaning"])
@pytest.mark.parametrize("name", PACKED)
def test_a_damaged_packed_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    data = bytearray(PACKED[name])
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "changed":
        data[len(data) // 3 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 3)
    else:
        data = bytearray(DATA)
    (tmp_path / name).write_bytes(data)
    for attempt in (
        lambda: read(tmp_path / name, format="jsonl"),
        lambda: read_questions(str(tmp_path / name)),
        lambda: read_augmentations(str(tmp_path / name)),
    ):
        with pytest.raises(InputError, match=rf"{name}: cannot be read: .+"):
            attempt()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.zip", zipped(("a.jsonl", DATA), ("b.jsonl", DATA)), "holds 2 files, and one is read"),
        ("x.zip", zipped(), "holds 0 files"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd", "cannot be unpacked"),
    ],
)
def test_an_archive_is_never_read_in_part(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path / name, format="jsonl")
    assert caught.value.remedy


def test_a_packed_file_does_not_say_how_much_memory_it_takes(tmp_path: Path) -> None:
    """The header of a small `.xz` file may ask for a window of 4 GiB, which its content then fills."""
    data = bytearray(PACKED["x.jsonl.xz"])
    end = 12 + 4 * (data[12] + 1)  # of the block's header, which ends with its checksum
    window = data.index(b"\x21\x01", 12, end) + 2
    data[window] = 40
    data[end - 4 : end] = zlib.crc32(data[12 : end - 4]).to_bytes(4, "little")
    (tmp_path / "x.jsonl.xz").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.jsonl\.xz: cannot be read: Memory usage limit exceeded"):
        read(tmp_path / "x.jsonl.xz", format="jsonl")


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_a_damaged_stream_is_not_taken_for_the_end_of_the_file(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    streams = [pack(line) for line in DATA.splitlines(keepends=True)]
    path = tmp_path / f"x.jsonl.{ending}"
    path.write_bytes(b"".join(streams) + (b"" if ending == "bz2" else b"\0" * 8))
    assert [p.id for p in read(path, format="jsonl")[0]] == ["a", "b", "c"]
    path.write_bytes(streams[0] + b"?" + streams[1][1:] + streams[2])
    with pytest.raises(InputError, match=rf"{path.name}: cannot be read: .+"):
        read(path, format="jsonl")
