"""The index kind `lucene`: BM25 by Lucene, through the Anserini classes that Pyserini packages.

It calls the Java classes directly. Importing `pyserini.search` would load every dense encoder that Pyserini knows
(half a gigabyte) and an OpenAI client that requires a key, and BM25 needs neither.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prag_core.config import IndexConfig
from prag_core.errors import RetrievalError
from prag_core.records import Hit, Passage
from prag_core.retrieval.jvm import JVM_ENV, MIN_JAVA, find_jdk, java_classes, prepare_jvm
from prag_core.retrieval.local_cache import explain_os_errors, hold
from prag_core.retrieval.search_text import search_text

# Raise it when an analyzer, `search_text`, the stored fields or Lucene's major version change.
INDEX_RULE = 4
SEARCH_SETTINGS = frozenset({"k1", "b"})
PROCESS_ENV = JVM_ENV
REQUIREMENT = "Java"
find_requirement = find_jdk
INDEXING_BUFFER_MB = 256.0
# A text has at most as many distinct terms as characters, so this also bounds the clauses of a query.
MAX_QUESTION_CHARS = 10_000
# Languages for which Anserini has no analyzer: their texts are split at white space.
_SPLIT_AT_SPACES = ("ha", "so", "sw", "yo")


def writer_version() -> str:
    """Return the version of the installed Pyserini."""
    return importlib.metadata.version("pyserini")


# ---- build


def build_index(passages: Iterable[Passage], directory: Path, config: IndexConfig) -> int:
    """Write a Lucene index of `passages` into `directory` and return how many it holds.

    Streams: holds one passage in memory, and writes one segment in the order given. Keys must be unique. Nothing is
    visible before the last passage is written; then the new index replaces an earlier one.

    Raises:
        RetrievalError: no Java, a folder or disk that cannot be written, or a passage without any text.
    """
    return _write(directory, "CREATE", (), passages, config)


def update_index(directory: Path, gone: Iterable[str], passages: Iterable[Passage], config: IndexConfig) -> int:
    """Remove passages from the index in `directory` by their keys, then add others; return how many it holds.

    The result equals a full build: one segment, the same scores, and no byte of what was removed. Unknown keys are
    ignored. To change a passage, remove and add it. The disk must have room for a second copy of the index; nothing
    is visible before the end.

    Raises:
        RetrievalError: see `build_index`; or there is no index.
    """
    return _write(directory, "APPEND", gone, passages, config)


def _write(directory: Path, mode: str, gone: Iterable[str], passages: Iterable[Passage], config: IndexConfig) -> int:
    prepare_jvm()
    what = f"{directory}: the index cannot be written"
    with java_classes(what, "check the free space and the permissions there") as java:
        return _write_in(java, directory, mode, gone, passages, config)


def _analyzer(java: Any, language: str) -> Any:
    if language == "en":
        return java("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
    if language in _SPLIT_AT_SPACES:
        return java("org.apache.lucene.analysis.core.WhitespaceAnalyzer")()
    if language == "th" and not java("org.apache.lucene.analysis.th.ThaiTokenizer").DBBI_AVAILABLE:
        raise RetrievalError(
            "index.language = 'th': this Java cannot split Thai into words, for it lacks the module jdk.localedata",
            f"set JAVA_HOME to a full JDK, {MIN_JAVA} or newer",
        )
    return java("io.anserini.analysis.AnalyzerMap").getLanguageSpecificAnalyzer(language)


def _write_in(
    java: Any, directory: Path, mode: str, gone: Iterable[str], passages: Iterable[Passage], config: IndexConfig
) -> int:
    options = java("io.anserini.index.IndexCollection$Args")()
    generator = java("io.anserini.index.generator.DefaultLuceneDocumentGenerator")(options)
    stored_field = java("org.apache.lucene.document.StoredField")
    document = java("io.anserini.collection.JsonCollection$Document")
    settings = java("org.apache.lucene.index.IndexWriterConfig")(_analyzer(java, config.language))
    settings.setRAMBufferSizeMB(INDEXING_BUFFER_MB)
    settings.setOpenMode(getattr(java("org.apache.lucene.index.IndexWriterConfig$OpenMode"), mode))
    path = java("java.nio.file.Paths").get(str(directory))
    writer = java("org.apache.lucene.index.IndexWriter")(
        java("org.apache.lucene.store.FSDirectory").open(path), settings
    )
    term, nothing = java("org.apache.lucene.index.Term"), java("java.util.ArrayList")()
    try:
        for key in gone:
            # Replace by no documents: of the two overloads of `deleteDocuments`, jnius takes the wrong one.
            writer.updateDocuments(term("id", key), nothing)
        for passage in passages:
            contents = f"{passage.title}\n{passage.text}"
            indexed = {"id": passage.key, "contents": search_text(contents)}
            row = generator.createDocument(document.fromString(json.dumps(indexed)))
            # Lucene returns this JSON with a hit, so a search needs no second look-up.
            fields = {
                "id": passage.key,
                "title": passage.title,
                "contents": contents,
                "sources": passage.sources,
                "access": passage.access,
            }
            row.add(stored_field("raw", json.dumps(fields)))
            writer.addDocument(row)
        writer.forceMerge(1)  # rewrites a single segment, too, if documents in it were deleted
        writer.commit()
        return int(writer.getDocStats().maxDoc)  # includes deleted documents, if any were left
    finally:
        writer.rollback()  # closes the writer; after a commit nothing is left to roll back


# ---- search


class LuceneRetriever:
    """Searches an index folder with BM25. Several threads may share it; they search one at a time.

    While it is open, no process removes its folder from the local cache.

    Raises:
        RetrievalError: no Java, no folder, or no complete Lucene index in it.
    """

    def __init__(self, directory: Path, config: IndexConfig) -> None:
        self._directory = directory
        self._remedy = f"remove {directory} and run the same command again: it fetches or rebuilds the index"
        if not directory.is_dir():
            raise RetrievalError(f"{directory}: no such index folder", "run `prag run` to build the index")
        prepare_jvm()
        with explain_os_errors(directory):
            self._held: int | None = hold(directory)
        try:
            with java_classes(f"{directory}: not a complete Lucene index", self._remedy) as java:
                java("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MAX_QUESTION_CHARS)
                self._searcher = java("io.anserini.search.SimpleSearcher")(str(directory))
                self._searcher.set_analyzer(_analyzer(java, config.language))
                self._searcher.set_bm25(config.k1, config.b)
        except BaseException:
            os.close(self._held)
            raise

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        """Return at most `top_k` hits, best first. A question without a known word has no hits.

        The question is text: the signs of Lucene's query language have no meaning.

        Scores are Anserini's: rounded to four places; equal ones are separated by 1e-6, in the order of keys. Only
        the first 10,000 characters of the question count.

        Raises:
            RetrievalError: the index cannot be read, or `close` was called.
        """
        with java_classes(f"{self._directory}: the search failed", self._remedy):
            hits = self._hits(question, top_k)
        return [hit for hit in hits if hit.score >= min_score]

    def close(self) -> None:
        """Release the index's files. A later search is an error; closing again has no effect.

        Raises:
            RetrievalError: when Lucene cannot close it.
        """
        with java_classes(f"{self._directory}: cannot be closed", ""):
            if self._held is not None:
                os.close(self._held)
                self._held = None
                self._searcher.close()

    def _hits(self, question: str, top_k: int) -> list[Hit]:
        # A Python string may hold half a surrogate pair; Java and UTF-8 may not.
        text = search_text(question[:MAX_QUESTION_CHARS].encode("utf-8", "replace").decode())[:MAX_QUESTION_CHARS]
        return [
            Hit(_passage(found.lucene_document.get("raw")), found.score) for found in self._searcher.search(text, top_k)
        ]


open_retriever = LuceneRetriever


def _passage(raw: str) -> Passage:
    fields = json.loads(raw)
    title = fields["title"]
    return Passage(
        key=fields["id"],
        title=title,
        text=fields["contents"][len(title) + 1 :],
        sources=tuple(fields["sources"]),
        access=tuple(fields.get("access", ())),  # indexes of rule 1 have no tags
    )
