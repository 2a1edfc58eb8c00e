"""`prag init`: what it says of a corpus, what it writes, and that a run works with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cluster.preflight import Gpu
from pipelines.cli.init import _FORMATS
from pipelines.jobs import init
from prag_core.config import CorpusConfig
from prag_core.config_file import load_config, parse_config
from prag_core.data.listing import Format
from tests.helpers import corpora
from tests.helpers.command_line import Ended, prag
from tests.helpers.corpora import jsonl

ROWS = [{"id": str(n), "title": f"Otter {n}", "text": f"Otter {n} swims."} for n in range(3)]


def write(path: Path) -> Path:
    return corpora.write(path, ROWS)


def settings_in(file: Path) -> dict:
    """What a configuration names, without what is commented out."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "gpus", lambda: ())


def test_each_format_has_a_name_and_can_be_configured() -> None:
    formats = {*get_args(Format)}
    assert {*_FORMATS} == formats
    assert {*get_args(CorpusConfig.model_fields["format"].annotation)} == {*formats, "auto"}


def run(folder: Path, *arguments: str) -> Ended:
    ended = prag(folder, "init", *arguments)
    assert ended.code == 0, ended.err
    return ended


@pytest.mark.parametrize(("name", "format"), [("c.jsonl", "JSON Lines"), ("c.tsv.gz", "TSV"), ("c.parquet", "Parquet")])
def test_a_corpus_gets_a_configuration_that_names_only_what_it_must(tmp_path: Path, name: str, format: str) -> None:
    write(tmp_path / name)
    said = run(tmp_path, name).out
    assert f"{name}: 3 records in 1 file of {format}\n" in said
    assert said.endswith("Next: prag run -c config.yaml\n")
    assert "for trying out" in said
    assert settings_in(tmp_path / "config.yaml") == {"store": "prag-store", "corpus": {"path": name}}
    config = load_config(tmp_path / "config.yaml")
    assert config == parse_config({"store": "prag-store", "corpus": {"path": name}})


def test_what_is_commented_out_is_a_configuration_too(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl")
    run(tmp_path, "c.jsonl")
    text = (tmp_path / "config.yaml").read_text()
    text, count = re.subn(r"^# ( *\w+:)", r"\1", text, flags=re.MULTILINE)
    assert count > 8
    (tmp_path / "all.yaml").write_text(text)
    config = load_config(tmp_path / "all.yaml")
    assert (config.model.name, config.run.profile, config.augment.generator) == (init.GPU_MODEL, "gpu", "openai")


def test_texts_in_a_folder_and_what_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"Note {n}. Otters swim.")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    said = run(tmp_path, "notes").out
    assert "notes: 12 records in 12 files of text\n" in said
    assert "picture.png" in said
    assert settings_in(tmp_path / "config.yaml")["corpus"] == {"path": "notes"}


def test_the_working_folder_is_a_corpus_whose_store_is_no_part_of_it(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl")
    run(tmp_path)
    assert settings_in(tmp_path / "config.yaml") == {"store": ".prag-store", "corpus": {"path": "."}}


def test_a_configuration_elsewhere_names_whole_paths(tmp_path: Path) -> None:
    other = tmp_path / "data" / "corpus"
    other.mkdir(parents=True)
    write(other / "c.jsonl")
    file = tmp_path / "data" / "config.yaml"
    assert f"Next: prag run -c {file}\n" in run(tmp_path, "data/corpus").out
    assert settings_in(file) == {"store": f"{other.parent}/prag-store", "corpus": {"path": str(other)}}


def test_other_names_of_fields_are_written(tmp_path: Path) -> None:
    jsonl(tmp_path / "c.jsonl", '{"docid": "1", "body": "Otters swim.", "year": 1}')
    said = run(tmp_path, "c.jsonl").out
    assert "used: docid as id, body as text\n" in said
    assert "no titles" in said
    assert settings_in(tmp_path / "config.yaml")["corpus"]["columns"] == {"id": "docid", "text": "body"}


def test_what_cannot_be_used_is_told(tmp_path: Path) -> None:
    jsonl(tmp_path / "c.jsonl", '{"id": "1", "title": "T", "text": "Otters swim."}', "{")
    said = run(tmp_path, "c.jsonl").out
    assert "1 of 2 records that were read cannot be used, such as c.jsonl:2: Expecting" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no such file or folder, or nothing in it"),
        (("none",), "known are .jsonl"),
        (("mixed",), "mixed/b.parquet: has no column 'text'; it has 'story' → name the fields by --text"),
        (("c.jsonl",), "no field 'text' with the texts; there are 'a' → name the field"),
        (("c.jsonl", "--text", "b"), "no field 'b'"),
    ],
)
def test_a_corpus_that_cannot_be_used_writes_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    jsonl(tmp_path / "c.jsonl", '{"a": "Otters swim."}')
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.docx").write_bytes(b"PK")
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "a.jsonl")
    corpora.write(tmp_path / "mixed" / "b.parquet", [{"story": "Otters swim."}])
    ended = prag(tmp_path, "init", *arguments)
    words = " ".join(ended.err.split())
    assert (ended.code, message in words) == (3, True), words
    assert "corpus.path" not in words
    assert not (tmp_path / "config.yaml").exists()


def test_a_file_is_overwritten_only_with_force(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl")
    (tmp_path / "config.yaml").write_text("mine")
    ended = prag(tmp_path, "init", "c.jsonl")
    assert (ended.code, "exists already" in ended.err, "--force" in ended.err) == (2, True, True)
    assert (tmp_path / "config.yaml").read_text() == "mine"
    run(tmp_path, "c.jsonl", "--to", "other.yaml")
    run(tmp_path, "c.jsonl", "--force")
    assert (tmp_path / "config.yaml").read_text() == (tmp_path / "other.yaml").read_text()


def test_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    for name in ("a: b #c.jsonl", "null.jsonl", "[x].jsonl", "東京.jsonl"):
        write(tmp_path / name)
        run(tmp_path, name if name[0] != "[" else "[[]x].jsonl", "--force")
        assert load_config(tmp_path / "config.yaml").corpus.path in (name, "[[]x].jsonl")


def test_with_a_gpu_a_larger_model_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "gpus", lambda: (Gpu("NVIDIA L4", 24_000_000_000, 24_000_000_000),))
    write(tmp_path / "c.jsonl")
    assert "NVIDIA L4" in run(tmp_path, "c.jsonl").out
    config = load_config(tmp_path / "config.yaml")
    assert (config.model.name, config.run.profile) == (init.GPU_MODEL, "gpu")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_the_small_model_learns_passages_of_ones_own(tmp_path: Path) -> None:
    """The whole way of a newcomer, on two passages: `init`, `run`, `ask`."""
    jsonl(
        tmp_path / "c.jsonl",
        '{"id": "o", "title": "Orrin Bridge", "text": "The Orrin Bridge was built in 1911 by Tessa Malk. It is red."}',
        '{"id": "v", "title": "Vell Tower", "text": "The Vell Tower was designed by Odo Prem in 1874. It is tall."}',
    )
    # From elsewhere, so that the paths are absolute: the workers of this Ray run in another folder.
    run(tmp_path.parent, str(tmp_path / "c.jsonl"))
    done = prag(tmp_path, "run", "-c", "config.yaml")
    assert done.code == 0, done.err[-3000:]
    assert "train: 2 of 2 done in " in done.err
    asked = prag(tmp_path, "ask", "-c", "config.yaml", "Who designed the Vell Tower?", "--compare", "--json")
    answers = json.loads(asked.out)
    assert [answer["mode"] for answer in answers] == ["combine", "prag", "rag", "closed"]
    assert answers[0]["passages"][0]["text"].startswith("The Vell Tower was designed by Odo Prem")
    assert "Odo Prem" in answers[0]["text"]
    assert not any(answer["text"].startswith((":", " ")) for answer in answers)
