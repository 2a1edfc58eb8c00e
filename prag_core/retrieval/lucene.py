"""Lucene index and search (Pyserini's Anserini).

The only file that knows the Java machine. It talks to the Java classes that Pyserini carries and not to
`pyserini.search`, whose import loads every dense encoder it knows (half a gigabyte, and an OpenAI client that
wants a key) for a BM25 search that needs none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from prag_core.config import IndexConfig
from prag_core.errors import RetrievalError
from prag_core.identity import fingerprint
from prag_core.records import Hit, Passage
from prag_core.retrieval import local_cache as index_folders
from prag_core.retrieval.jvm import java_classes, prepare_jvm

# Raise it when the analyzer, the stored fields or Lucene's major version change: all indexes are then built anew.
INDEX_RULE = 2
INDEXING_BUFFER_MB = 256.0
# No text has more terms than characters, so this also bounds the clauses of a query.
MAX_QUESTION_CHARS = 10_000


class Retriever(Protocol):
    """Finds the passages that bear on a question."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        """Return at most `top_k` hits that score `min_score` or more, best first; ties in the order of keys."""
        ...


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
    with java_classes(f"{directory}: the index cannot be written", "check the space and the rights there") as java:
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
            with java_classes(f"{directory}: not a complete Lucene index", self._remedy) as java:
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
        with java_classes(f"{self._directory}: the search failed", self._remedy):
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
        with java_classes(f"{self._directory}: cannot be closed", ""):
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
