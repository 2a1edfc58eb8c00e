"""Which files of a folder are read, and that each other one is counted with its reason."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import fsspec
import pytest

from prag_core.data.files import shown
from prag_core.data.listing import list_files
from prag_core.errors import InputError
from tests.helpers.corpora import ROWS, config_of, jsonl, read, write
from tests.helpers.http_files import serve_folder


def test_a_folder_is_read_in_order_without_hidden_and_unknown_files(tmp_path):
    for name in (
        "b.txt",
        "a.md",
        "sub/a.md",
        ".hidden.txt",
        "_SUCCESS",
        "_tmp/x.txt",
        "readme.pdf",
        "sub/.git/x.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("" if name == "_SUCCESS" else f"text of {name}")
    files = list_files(config_of(tmp_path)).files
    assert [file.name for file in files] == [str(tmp_path / name) for name in ("a.md", "b.txt", "sub/a.md")]
    pieces, _ = read(tmp_path)
    assert [p.id for p in pieces] == ["a.md", "b.txt", "sub/a.md"]  # below the folder, so both a.md stay apart


def test_a_glob(tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "other.jsonl", ".part-3.jsonl"):
        write(tmp_path / name)
    assert [f.label for f in list_files(config_of(tmp_path / "*part-*")).files] == ["part-1.jsonl", "part-2.jsonl"]
    assert {p.file for p in read(tmp_path / "**/part-?.jsonl")[0]} == {"part-1.jsonl", "part-2.jsonl"}


def test_ids_made_of_file_names_do_not_change_when_the_corpus_moves(tmp_path):
    ids = []
    for folder in ("here", "there/deep"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        jsonl(tmp_path / folder / "sub" / "x.jsonl", '{"text": "A"}')
        ids += [read(tmp_path / folder)[0][0].id, read(tmp_path / folder / "*" / "x.jsonl")[0][0].id]
    assert ids == ["sub/x.jsonl:1"] * 4


def test_any_fsspec_url():
    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus-test/x.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode()))
    fs.pipe("/corpus-test/y.txt", b"hello")
    try:
        assert [p.id for p in read("memory://corpus-test")[0]] == ["a", "y.txt"]
        assert [p.id for p in read("memory://corpus-test/*.gz")[0]] == ["a"]
        (file,) = list_files(config_of("memory://corpus-test/y.txt")).files
        assert file.url == "memory:///corpus-test/y.txt"
    finally:
        fs.rm("/corpus-test", recursive=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("no-*.jsonl", "no such file"),
        ("empty-folder", "no such file or folder, or nothing in it"),
        ("unknown-folder", "no file to read\n  left out: no known format"),
        ("unknown-folder/x.pdf", "no known ending"),
        ("empty.jsonl", "is empty"),
        ("nosuch://x", "cannot be listed"),
        ("file://", "cannot be listed"),
    ],
)
def test_a_path_that_cannot_be_used_is_an_input_error(tmp_path, path, message):
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "unknown-folder").mkdir()
    (tmp_path / "unknown-folder" / "x.pdf").write_text("x")
    (tmp_path / "empty.jsonl").touch()
    path = path if "://" in path else str(tmp_path / path)
    with pytest.raises(InputError, match=message) as caught:
        list_files(config_of(path))
    assert path in caught.value.message
    assert caught.value.remedy


# What is left out


def left_out(path: Path | str, **settings: object) -> dict[str, tuple[int, str]]:
    """Return the number of files that are left out, and the first of them, by reason."""
    found = list_files(config_of(path, **settings)).left_out
    return {item.reason: (item.count, item.first) for item in found}


def test_links_are_read_as_what_they_lead_to(tmp_path: Path) -> None:
    """A snapshot of a model hub's cache holds nothing but links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    (blobs / "deep").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    jsonl(blobs / "0a1b", '{"id": "a", "text": "A"}')
    jsonl(blobs / "deep" / "c.jsonl", '{"id": "c", "text": "C"}')
    jsonl(snapshot / "own.jsonl", '{"id": "own", "text": "own"}')
    (snapshot / "a.jsonl").symlink_to("../blobs/0a1b")
    (snapshot / "sub" / "b.jsonl").symlink_to(snapshot / "a.jsonl")
    (snapshot / "folder").symlink_to(blobs / "deep", target_is_directory=True)
    (tmp_path / "link.jsonl").symlink_to(blobs / "0a1b")
    (tmp_path / "to-snapshot").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "to-snapshot", snapshot / "**" / "*.jsonl"):
        pieces, _ = read(path)
        assert [(p.id, p.file) for p in pieces] == [
            ("a", "a.jsonl"),
            ("c", "folder/c.jsonl"),
            ("own", "own.jsonl"),
            ("a", "sub/b.jsonl"),
        ]
        assert left_out(path) == {}
    assert [p.file for p in read(tmp_path / "link.jsonl")[0]] == ["link.jsonl"]
    assert [p.id for p in read(tmp_path / "*" / "folder" / "*.jsonl")[0]] == ["c", "c"]


def test_whatever_is_left_out_is_counted_with_its_reason(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", '{"text": "A"}')
    for name in (".hidden.jsonl", "_SUCCESS", "readme.pdf", "data.csv", "x.jsonl.bak"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jsonl").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    jsonl(tmp_path / "folder.jsonl" / "part-0.jsonl", '{"text": "B"}')
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    (tmp_path / "itself.jsonl").symlink_to("itself.jsonl")
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "folder.jsonl" / "back").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(tmp_path)  # the path of a socket must be short
        bound.bind("socket.jsonl")
        assert left_out(tmp_path) == {
            "broken_link": (2, "broken.jsonl"),
            "circle": (3, "folder.jsonl/back"),
            "hidden": (3, ".git/x.jsonl"),
            "not_a_file": (2, "pipe.jsonl"),
            "unknown_ending": (3, "data.csv"),
        }
        assert [p.file for p in read(tmp_path)[0]] == ["a.jsonl", "folder.jsonl/part-0.jsonl"]
        # A glob asks for files: what it names and does not read is counted, and nothing else.
        assert left_out(tmp_path / "*.jsonl") == {
            "broken_link": (2, "broken.jsonl"),
            "folder": (1, "folder.jsonl"),
            "hidden": (1, ".hidden.jsonl"),
            "not_a_file": (2, "pipe.jsonl"),
        }
        assert left_out(tmp_path / "**") == {
            "broken_link": (2, "broken.jsonl"),
            "circle": (3, "folder.jsonl/back"),
            "hidden": (3, ".git/x.jsonl"),
            "not_a_file": (2, "pipe.jsonl"),
            "unknown_ending": (3, "data.csv"),
        }


def test_a_message_says_what_was_left_out_when_nothing_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(InputError) as caught:
        list_files(config_of(tmp_path))
    assert "left out: links that lead nowhere: 1, such as a.jsonl\n" in caught.value.message
    assert caught.value.message.endswith("such as b.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", '{"text": "A"}')
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match=r"cannot be listed: .*closed"):
        list_files(config_of(tmp_path))


def test_the_marker_of_a_folder_is_no_empty_file() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/marked/sub/x.jsonl", b'{"id": "x", "text": "X"}')
    fs.pipe("/marked/sub_$folder$", b"")
    try:
        assert [p.id for p in read("memory://marked", format="jsonl")[0]] == ["x"]
        assert left_out("memory://marked", format="jsonl") == {"folder_marker": (1, "sub_$folder$")}
        fs.pipe("/marked/empty", b"")
        with pytest.raises(InputError, match="marked/empty: is empty"):
            list_files(config_of("memory://marked", format="jsonl"))
    finally:
        fs.rm("/marked", recursive=True)


# Names


STRANGE = [
    *("log::2.jsonl", "a[1].jsonl", "what?.jsonl", "x*.jsonl", "%41.jsonl", "a#b.jsonl", "http:x.jsonl", "~x.jsonl"),
    *(
        "file::x.jsonl",
        "zip::x.jsonl",
        "a b.jsonl",
        "two\nlines.jsonl",
        "back\\slash.jsonl",
        "ü.jsonl",
        "u\u0308.jsonl",
    ),
]


def test_a_name_is_never_read_as_a_pattern_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("log", "2.jsonl", "a1.jsonl", "whatx.jsonl", "xy.jsonl", "A.jsonl", "x.jsonl"):  # what they could mean
        jsonl(tmp_path / name, '{"id": "wrong", "text": "another file"}')
    folder = tmp_path / "data [x]::y"
    folder.mkdir()
    for name in STRANGE:
        for path in (folder, tmp_path):
            jsonl(path / name, json.dumps({"id": name, "text": name}))
    monkeypatch.chdir(tmp_path)
    for name in STRANGE:
        for path in (name, f"./{name}", tmp_path / name, f"file://{tmp_path}/{name}"):
            (piece,), rejects = read(path)
            assert (piece.text, piece.file, rejects) == (name.strip(), shown(name), [])
    pieces, rejects = read(folder)
    assert sorted(p.text for p in pieces) == sorted(STRANGE)
    assert {p.file for p in pieces} == set(map(shown, STRANGE))
    assert rejects == []


def test_a_name_that_is_not_utf8_is_read_and_spelled_out(tmp_path: Path) -> None:
    for name, content in ((b"caf\xe9.txt", b"Coffee."), (b"caf\xe9.jsonl", b'{"text": "Tea."}')):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content)
    pieces, rejects = read(tmp_path)
    assert [(p.id, p.title, p.text) for p in pieces] == [
        ("caf\\xe9.jsonl:1", "", "Tea."),
        ("caf\\xe9.txt", "caf\\xe9", "Coffee."),
    ]
    assert rejects == []
    with Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).open("w"):
        pass
    with pytest.raises(InputError, match="is empty") as caught:
        list_files(config_of(tmp_path))
    assert "\\xff.jsonl" in str(caught.value).encode().decode()  # such a message can be printed


def test_a_name_that_commands_a_terminal_is_spelled_out(tmp_path: Path) -> None:
    """Names are printed and logged: a line end would begin a message of its own, other signs would colour or erase."""
    jsonl(tmp_path / "a\n\x1b[2J\u202e.jsonl", '{"text": "A"}', "{")
    (tmp_path / "b\r\u2028.bin").write_text("x")
    (tmp_path / "c\x9b.txt").write_text("C")
    pieces, (reject,) = read(tmp_path)
    assert [piece.id for piece in pieces] == ["a\\n\\x1b[2J\\u202e.jsonl:1", "c\\x9b.txt"]
    assert reject.source == "a\\n\\x1b[2J\\u202e.jsonl:2"
    listing = list_files(config_of(tmp_path))
    assert [item.first for item in listing.left_out] == ["b\\r\\u2028.bin"]
    assert all(file.url.isprintable() for file in listing.files)


def test_what_follows_the_path_of_a_url_is_no_part_of_an_id(tmp_path: Path) -> None:
    jsonl(tmp_path / "a b.jsonl", '{"text": "A"}')
    jsonl(tmp_path / "log::2.jsonl", '{"text": "colons"}')
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text"))
    with serve_folder(tmp_path) as url:
        assert [p.id for p in read(f"{url}/a%20b.jsonl?signature=secret*1")[0]] == ["a b.jsonl:1"]
        assert [p.id for p in read(f"{url}/log::2.jsonl")[0]] == ["log::2.jsonl:1"]
        assert [p.id for p in read(f"{url}/x.txt.gz?signature=secret")[0]] == ["x.txt"]
        with pytest.raises(InputError, match=r"none\.jsonl: no such file") as caught:
            list_files(config_of(f"{url}/none.jsonl?signature=secret"))
        assert "secret" not in str(caught.value)


def test_two_files_that_are_spelled_alike_are_refused(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", b"caf\\xe9.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("Coffee.")
    with pytest.raises(InputError, match=r"two files are both called caf\\xe9\.txt"):
        list_files(config_of(tmp_path))


def test_a_surrogate_that_stands_for_no_byte_can_be_shown() -> None:
    with pytest.raises(InputError, match=r"\\ud800.jsonl: no such file|\\ud800.jsonl: cannot be listed"):
        list_files(config_of("\ud800.jsonl"))


def test_a_folder_on_a_web_server_is_read_by_a_glob(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "ü b.txt").write_text("text")
    with serve_folder(tmp_path) as url:
        assert [(p.id, p.title) for p in read(f"{url}/texts/*.txt")[0]] == [("ü b.txt", "ü b")]
        for folder in (f"{url}/texts/", f"{url}/texts"):  # what the server sends for it is a page of links
            with pytest.raises(InputError, match="is a folder on an HTTP server"):
                list_files(config_of(folder, format="text"))
