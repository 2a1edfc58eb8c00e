"""An updated index finds what a full build finds, holds nothing more, and is never relied on."""

import json
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest

from prag_core.config import IndexConfig
from prag_core.identity import passage_key
from prag_core.records import Passage, passage_table, to_table
from prag_core.retrieval.archive import archive_index, fetch_index
from prag_core.retrieval.build import MOST_CHANGED, IndexBuild, find_changes, make_index
from prag_core.retrieval.kinds import index_id
from prag_core.retrieval.lucene import LuceneRetriever, build_index
from prag_core.store.objects import Store
from tests.helpers.passages import make_passage

CONFIG = IndexConfig()
WORDS = [f"{a}{b}" for a in ("quor", "vend", "tilsk", "hallen", "zanth") for b in ("a", "ing", "ers", "o", "um", "ix")]


def put_corpus(store: Store, version: str, passages: list[Passage], parts: int = 3) -> None:
    names = [store.put_table(f"corpus/{version}", passage_table(passages[part::parts])) for part in range(parts)]
    store.put_json(f"corpus/{version}/manifest.json", {"parts": names})


def invented(random: random.Random, number: int) -> Passage:
    """A passage with a word of its own among many that others have too."""
    title = " ".join(random.choices(WORDS, k=2))
    own = "".join(random.choices(string.ascii_lowercase, k=16))
    text = f"{' '.join(random.choices(WORDS, k=random.randint(3, 60)))} {own}."
    return Passage(passage_key(title, text), title, text, (f"p{number}",), ("board", "hr")[: number % 3])


def own_word(passage: Passage) -> str:
    return passage.text.split()[-1].strip(".")


def a_night_later(random: random.Random, corpus: list[Passage], number: int) -> list[Passage]:
    """The corpus with a part of it gone, changed in each of the ways there are, and added, in another order."""
    corpus = random.sample(corpus, len(corpus) - 5)
    for place, change in enumerate((
        {"sources": ("moved",)},
        {"sources": (*corpus[1].sources, "zz")},
        {"access": ("others",)},
        {"access": ()},
        {"text": corpus[4].text.replace(" ", "\n")},  # the same key
    )):  # fmt: skip
        corpus[place] = replace(corpus[place], **change)
    corpus += [invented(random, number + n) for n in range(7)]
    random.shuffle(corpus)
    return corpus


def searched(folder: Path, corpus: list[Passage]) -> list:
    questions = [*WORDS, " ".join(WORDS[::3]), " ".join(WORDS), *map(own_word, corpus), "none", ""]
    opened = LuceneRetriever(folder, CONFIG)
    found = [[opened.search(question, 3) for question in questions]]
    found.append([opened.search(question, 1000) for question in questions[:32]])
    opened.close()
    return found


def test_changes_are_found_without_reading_texts(tmp_path: Path) -> None:
    store, chance = Store(str(tmp_path)), random.Random(1)
    old = [invented(chance, n) for n in range(80)]
    new = a_night_later(chance, old, 100)
    for version, passages in (("old", old), ("new", new), ("none", [])):
        put_corpus(store, version, passages)
    changes = find_changes(store, "old", "new")
    assert sorted(changes.gone) == sorted(p.key for p in {*old} - {*new})
    for part, keys in changes.written.items():
        there = {p["key"] for p in store.get_part(part, ["key"]).to_pylist()}
        assert {*keys.to_pylist()} == {p.key for p in {*new} - {*old}} & there
    assert sum(len(keys) for keys in changes.written.values()) == len({*new} - {*old})
    was, now = {p.key for p in old}, {p.key for p in new}
    assert changes.build == IndexBuild(len(now - was), len({p.key for p in {*old} - {*new}} & now), len(was - now))
    assert (changes.passages, changes.share) == (82, len({*new} - {*old}) / 82)
    assert find_changes(store, "old", "none").build == IndexBuild(removed=80)
    assert find_changes(store, "none", "old").share == 1
    assert find_changes(store, "old", "old").share == 0


@pytest.mark.slow
def test_updates_night_after_night_equal_a_full_build(tmp_path: Path) -> None:
    store, chance = Store(str(tmp_path / "store")), random.Random(7)
    corpus = [invented(chance, n) for n in range(80)]
    put_corpus(store, "night0", corpus)
    assert make_index(store, "night0", None, CONFIG)[1].anew
    from jnius import autoclass  # importing it starts the JVM, so only after ours

    for night in (1, 2):  # the second updates an index that is an update itself
        before, corpus = corpus, a_night_later(chance, corpus, 70 + 10 * night)
        put_corpus(store, f"night{night}", corpus)
        stored, build = make_index(store, f"night{night}", f"night{night - 1}", CONFIG)
        assert (build.added, build.removed, build.anew) == (7, 5, "")
        assert build.changed >= 4  # a passage may have had no tags before
        folder = fetch_index(store, stored.id, tmp_path / "cache")
        build_index(sorted(corpus, key=lambda p: p.key), tmp_path / "anew", CONFIG)
        assert searched(folder, corpus) == searched(tmp_path / "anew", corpus)
        # Nothing removed is left: neither a deleted document nor its files.
        path = autoclass("java.nio.file.Paths").get(str(folder))
        reader = autoclass("org.apache.lucene.index.DirectoryReader").open(
            autoclass("org.apache.lucene.store.FSDirectory").open(path)
        )
        assert (reader.leaves().size(), reader.maxDoc(), reader.numDocs()) == (1, len(corpus), len(corpus))
        reader.close()
        assert len({file.name.partition("_Lucene")[0].partition(".")[0] for file in folder.iterdir()}) == 2
        data = b"".join(file.read_bytes() for file in folder.iterdir())
        kept = {p.key for p in corpus}
        gone = [own_word(p).encode() for p in before if p.key not in kept]
        assert len(gone) == 5
        assert not any(word in data for word in gone)
        assert sum(own_word(p).encode() in data for p in corpus) > 40  # not all: Lucene compresses


@pytest.mark.slow
def test_up_to_a_quarter_is_updated_and_more_is_a_full_build(tmp_path: Path) -> None:
    store, passages = Store(str(tmp_path)), [make_passage(n) for n in range(60)]
    put_corpus(store, "old", passages[:40])
    make_index(store, "old", None, CONFIG)
    most = round(40 * MOST_CHANGED)
    put_corpus(store, "quarter", passages[most : 40 + most])
    assert make_index(store, "quarter", "old", CONFIG)[1] == IndexBuild(added=most, removed=most)
    put_corpus(store, "more", passages[most + 1 : 41 + most])
    stored, build = make_index(store, "more", "old", CONFIG)
    assert (build.anew, build.failed) == ("28% of the passages differ from the corpus old", False)
    assert stored.documents == 40
    put_corpus(store, "less", passages[:30])  # of thirty, a third is too much to remove
    assert make_index(store, "less", "old", CONFIG)[1].anew
    put_corpus(store, "other", passages[:39])
    assert "with these settings" in make_index(store, "other", "more-or-less", CONFIG)[1].anew


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("altered", "lucene.tar.zst: altered"),
        ("cut short", "lucene.tar.zst: has "),
        ("another Pyserini", "version 1.0.0 wrote the index "),
        ("no digests", "corpus/old/part-"),
        ("another corpus", "holds 39 passages, not 40"),
    ],
)
def test_an_unusable_former_index_is_named_and_replaced(harm: str, said: str, tmp_path: Path) -> None:
    store, passages = Store(str(tmp_path / "store")), [make_passage(n) for n in range(41)]
    put_corpus(store, "old", passages[:40])
    id = index_id("old", CONFIG)
    if harm == "another corpus":
        build_index(passages[:39], tmp_path / "wrong" / "index", CONFIG)
        archive_index(tmp_path / "wrong" / "index", store, "old", 40, CONFIG)
    else:
        make_index(store, "old", None, CONFIG)
    archive, record = (tmp_path / "store" / "indexes" / id / name for name in ("lucene.tar.zst", "index.json"))
    data = bytearray(archive.read_bytes())
    if harm == "altered":
        data[len(data) // 2] ^= 1
        archive.write_bytes(data)
    elif harm == "cut short":
        archive.write_bytes(data[:-10])
    elif harm == "another Pyserini":
        record.write_text(json.dumps({**json.loads(record.read_text()), "pyserini": "1.0.0"}))
    elif harm == "no digests":
        part = store.put_table("corpus/old", to_table(Passage, passages[:40]))
        store.put_json("corpus/old/manifest.json", {"parts": [part]})
    put_corpus(store, "new", passages[1:])
    stored, build = make_index(store, "new", "old", CONFIG)
    assert build.failed
    assert said in build.anew
    folder = fetch_index(store, stored.id, tmp_path / "cache")
    hits = LuceneRetriever(folder, CONFIG).search("hill", 100)
    assert {hit.passage for hit in hits} == {*passages[1:]}
