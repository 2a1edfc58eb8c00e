"""The kinds of index: their names, their ids, and another kind beside Lucene."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prag_core.config import INDEX_KINDS, LANGUAGES, IndexConfig
from prag_core.config_file import load_config
from prag_core.errors import ConfigError, RetrievalError
from prag_core.maintenance.verify import check_object
from prag_core.records import passage_table
from prag_core.retrieval.archive import find_index, open_index, read_record
from prag_core.retrieval.build import IndexBuild, make_index
from prag_core.retrieval.kinds import IndexKind, index_id, index_kind
from prag_core.store.objects import Store
from tests.helpers import word_index
from tests.helpers.passages import make_passage


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> IndexConfig:
    """A configuration of a kind that is one module and one line in the table of kinds."""
    monkeypatch.setitem(INDEX_KINDS, "words", "tests.helpers.word_index")
    return IndexConfig(kind="words")


def put_corpus(store: Store, version: str, numbers: range) -> None:
    part = store.put_table(f"corpus/{version}", passage_table([make_passage(n) for n in numbers]))
    store.put_json(f"corpus/{version}/manifest.json", {"parts": [part]})


@pytest.mark.parametrize("name", sorted(INDEX_KINDS))
def test_each_kind_provides_all_that_is_asked_of_it(name: str) -> None:
    assert isinstance(index_kind(IndexConfig(kind=name)), IndexKind)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("index.kind=lucen", r"index\.kind = 'lucen': no such index kind\n  → did you mean lucene\?"),
        ("index.language=xx", r"index\.language = 'xx': no such language\n  → .*ar, bn, da, de, en.*zh"),
        ("index.language=German", r"index\.language = 'German': no such language"),
    ],
)
def test_an_unknown_kind_or_language_is_refused_with_the_known_ones(tmp_path: Path, setting: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text("store: s\ncorpus: {path: c.jsonl}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.yaml", [setting])


def test_an_id_names_content_and_not_how_it_is_searched(words: IndexConfig) -> None:
    # Stored indexes are found by this id; it changes with the rule of the kind.
    assert index_id("v1", IndexConfig()) == "398f46327b4f1db6"
    assert index_id("v1", IndexConfig()) == index_id("v1", IndexConfig(k1=1.2, b=0.75))
    others = [index_id("v2", IndexConfig()), index_id("v1", words)]
    others += [index_id("v1", IndexConfig(language=name)) for name in LANGUAGES]
    assert len(set(others)) == len(LANGUAGES) + 2


def test_another_kind_is_built_updated_verified_and_searched(words: IndexConfig, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    put_corpus(store, "old", range(40))
    put_corpus(store, "new", range(1, 41))
    stored, build = make_index(store, "old", None, words)
    assert build.anew
    assert (stored.kind, stored.pyserini, stored.documents) == ("words", "words 1", 40)
    stored, build = make_index(store, "new", "old", words)
    assert build == IndexBuild(added=1, removed=1)
    assert store.list(f"indexes/{stored.id}", ".zst") == [f"indexes/{stored.id}/words.tar.zst"]
    assert find_index(store, stored.id) == stored
    assert check_object(store, f"indexes/{stored.id}/index.json", full=True) == []
    opened = open_index(store, stored.id, tmp_path / "cache", words)
    assert [hit.passage for hit in opened.search("w40x1 w40x2", 3)] == [make_passage(40)]
    assert opened.search("w0x1", 3) == []


def test_an_index_of_another_kind_or_language_is_not_opened(words: IndexConfig, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    put_corpus(store, "v1", range(3))
    id = make_index(store, "v1", None, words)[0].id
    with pytest.raises(
        RetrievalError, match=r"built with index\.kind = 'words'; index\.kind is 'lucene' now"
    ) as caught:
        open_index(store, id, tmp_path / "cache", IndexConfig())
    assert "set index.kind to 'words', or run `prag run`" in caught.value.remedy
    german = words.model_copy(update={"language": "de"})
    with pytest.raises(RetrievalError, match=r"built with index\.language = 'en'; index\.language is 'de' now"):
        open_index(store, id, tmp_path / "cache", german)
    # A record without a language, as earlier releases wrote them, counts as English.
    record = store.get_json(f"indexes/{id}/index.json")
    del record["language"], record["seal"]
    store.put_json(f"indexes/{id}/index.json", record)
    assert read_record(store, id) == replace(read_record(store, id), language="en")
    assert open_index(store, id, tmp_path / "cache", words).search("hill", 3)


def test_an_index_of_another_rule_is_not_opened_and_a_run_builds_another(
    words: IndexConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    put_corpus(store, "v1", range(3))
    old = make_index(store, "v1", None, words)[0]
    record = store.get_json(f"indexes/{old.id}/index.json")
    del record["rule"], record["seal"]
    store.put_json(f"indexes/{old.id}/index.json", record)  # as earlier releases wrote it
    with pytest.raises(RetrievalError, match=r"another version of this software \(rule unknown, now 1\)") as caught:
        open_index(store, old.id, tmp_path / "cache", words)
    assert "run `prag run` to build and publish another index" in caught.value.remedy
    monkeypatch.setattr(word_index, "INDEX_RULE", 2)
    new, build = make_index(store, "v1", "v1", words)
    assert (new.id != old.id, new.rule, build.failed) == (True, 2, False)
    assert build.anew
    assert open_index(store, new.id, tmp_path / "cache", words).search("hill", 3)
