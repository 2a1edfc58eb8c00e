"""The records that flow between stages: frozen dataclasses, each with its Arrow schema.

A stage takes records and returns records. `schema`, `to_table` and `from_table` convert them to Arrow tables, the form
in which Ray Data moves them and Parquet keeps them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import pyarrow as pa

from prag_core.identity import fingerprint

Mode = Literal["closed", "rag", "prag", "combine"]
MODES: tuple[Mode, ...] = ("closed", "rag", "prag", "combine")
# What a question may ask for: a mode, or that one is chosen by what was found.
AskedMode = Literal["closed", "rag", "prag", "combine", "auto"]
ASKED_MODES: tuple[AskedMode, ...] = (*MODES, "auto")
MergeRule = Literal["sum", "mean", "score"]
# The largest factor by which the weights of a question's adapters may be multiplied.
MAX_STRENGTH = 4.0
# How many passages a question retrieves, and how the adapters of several are weighed, where nothing says otherwise. The
# best one alone answers as well as three by score, and a prompt with three is read worse (docs/results/log.md).
DEFAULT_TOP_K = 1
DEFAULT_WEIGHTS: MergeRule = "score"
# The factor of the adapters' weights in `combine`: at full strength an adapter outweighs what the model reads.
DEFAULT_COMBINE_STRENGTH = 0.5
Template = Literal["direct", "brief", "chain_of_thought"]
Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One unit of text. `key` is the hash of title and text; `sources` are all ids under which it came, sorted.

    `access` are tags, sorted: a reader must hold one of them. Without any tag the passage is public.
    """

    key: str
    title: str
    text: str
    sources: tuple[str, ...]
    access: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The hash of all fields. Passages with the same key may differ in white space, ids or tags."""
        return fingerprint(self)


@dataclass(frozen=True, slots=True)
class QAPair:
    """A question about a passage, its short answer, and a full sentence that holds the answer."""

    question: str
    answer: str
    full_answer: str


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The rewrites and question-answer pairs that a language model made of a passage.

    `origin` is `generated` or `imported`. `refused` counts the pairs that the filter rejected, as `reason=count`
    strings. `attempts` and `seconds` say how many calls of the model it took, and how long. `coverage` is the share of
    the passage's facts that its pairs ask about, see `prag_core.augmentation.coverage`.
    """

    key: str
    rewrites: tuple[str, ...]
    pairs: tuple[QAPair, ...]
    origin: str
    refused: tuple[str, ...] = ()
    attempts: int = 1
    seconds: float = 0.0
    coverage: float = 0.0

    @property
    def digest(self) -> str:
        """The hash of rewrites and pairs. Augmentations that train the same adapter have the same digest."""
        return fingerprint([self.rewrites, [dataclasses.asdict(pair) for pair in self.pairs]])


def count_refused(refused: Iterable[str]) -> Counter[str]:
    """Return the counts in `Augmentation.refused` by reason."""
    counts: Counter[str] = Counter()
    for entry in refused:
        reason, _, count = entry.partition("=")
        counts[reason] += int(count)
    return counts


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One adapter that exists: where its bytes lie, and how its training went.

    `augmentation` is the digest of the augmentation it was trained on. `offset` and `length` give its bytes within
    `shard`, and `checksum` is of those bytes. `created` is in seconds since the epoch: of several rows with one key,
    the latest counts.
    """

    key: str
    recipe: str
    augmentation: str
    shard: str
    offset: int
    length: int
    checksum: str
    dtype: str
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    created: float


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that a stage gave up on, and why. `source` is a file and line, or the passage's ids.

    `recipe` is the fingerprint of the recipe in use: a run with another recipe tries the input again.
    """

    stage: str
    reason: str
    detail: str
    source: str
    key: str = ""
    attempts: int = 1
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved passage and its BM25 score."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class UsedPassage:
    """How one retrieved passage was used for an answer: as an adapter, in the prompt, or both.

    `note` says why a passage went into the prompt although its adapter was wanted. `text` is the passage's text, so
    that an answer can be checked. `tokens`, `last_loss` and `seconds` tell of its adapter's training, if it was used.
    """

    key: str
    title: str
    sources: tuple[str, ...]
    score: float
    in_weights: bool
    in_prompt: bool
    weight: float = 0.0
    note: str = ""
    text: str = ""
    tokens: int = 0
    last_loss: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and how it came about.

    `reasoning` is all that the model wrote, if the template lets it reason before the answer in `text`. `finish` says
    why generation ended: `stop` (end of turn, line end or stop string), `length`, or `error`. With `error`, `text` is
    empty and `error` gives the reason. `milliseconds` are the times of the steps: retrieve, fetch, inject, …

    `mode` is the mode that was used; if the question asked for `auto`, `why` says why this one.
    """

    question: str
    mode: Mode
    text: str
    reasoning: str = ""
    passages: tuple[UsedPassage, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    snapshot: str = ""
    finish: Finish = "stop"
    error: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """The thresholds by which `auto` chooses a mode; see `prag_core.inference.route`.

    Args:
        closed_below: A best score below this means that no passage fits.
        prag_score: The least best score for `prag`.
        prag_next: For `prag`, the second score is at most this share of the best one. A share means the same in each
            corpus, but a difference of BM25 scores does not.
        otherwise: The mode where the best passage has an adapter but is not clearly the best.

    Raises:
        ValueError: when a number is out of range, or the mode is unknown.
    """

    closed_below: float
    prag_score: float
    prag_next: float
    otherwise: Literal["rag", "prag", "combine"]

    def __post_init__(self) -> None:
        if not 0 <= self.closed_below < math.inf or not 0 <= self.prag_score < math.inf:
            raise ValueError(f"closed_below {self.closed_below}, prag_score {self.prag_score}: must be finite, from 0")
        if not 0 <= self.prag_next <= 1:
            raise ValueError(f"prag_next {self.prag_next}: must be from 0 to 1")
        if self.otherwise not in ("rag", "prag", "combine"):
            raise ValueError(f"otherwise {self.otherwise!r}: must be rag, prag or combine")


T = TypeVar("T")

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


def _arrow_type(annotation: Any) -> pa.DataType:
    if typing.get_origin(annotation) is Literal:
        annotation = str
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if typing.get_origin(annotation) is tuple:
        return pa.list_(_arrow_type(typing.get_args(annotation)[0]))
    if dataclasses.is_dataclass(annotation):
        return pa.struct(list(schema(cast(type, annotation))))
    raise TypeError(f"no Arrow type for {annotation!r}")


@functools.cache
def schema(record: Hashable) -> pa.Schema:
    """Return the Arrow schema of a record class. Fields are str, int, float, bool, Literal, tuples, or records."""
    hints = typing.get_type_hints(record)
    fields = [pa.field(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(cast(Any, record))]
    return pa.schema(fields)


def to_table(record: type[T], rows: Iterable[T]) -> pa.Table:
    """Return `rows` as an Arrow table with the schema of `record`, also when there are none."""
    return pa.Table.from_pylist([dataclasses.asdict(cast(Any, row)) for row in rows], schema=schema(cast(Any, record)))


def passage_table(passages: Iterable[Passage]) -> pa.Table:
    """Return passages as a stored corpus keeps them: with their digests in a column, by which changes are found."""
    rows = list(passages)
    return to_table(Passage, rows).append_column("digest", pa.array([row.digest for row in rows], pa.string()))


def from_table(record: type[T], table: pa.Table) -> list[T]:
    """Return the rows of `table` as records, ignoring columns that are no fields of the record."""
    # A field that is newer than the table has its default.
    names = [f.name for f in dataclasses.fields(cast(Any, record)) if f.name in table.column_names]
    return [from_dict(record, row) for row in table.select(names).to_pylist()]


def from_dict(record: type[T], row: dict[str, Any]) -> T:
    """Return a record from the plain values that Arrow or JSON give, ignoring names that are no fields of it."""
    return record(**{name: _revive(hint, row[name]) for name, hint in _hints(cast(Any, record)).items() if name in row})


def from_document(record: type[T], document: Any) -> T:
    """Return a record from a JSON document that anybody may have written, as `from_dict` does.

    Raises:
        TypeError: when it is no object, lacks a field, or a plain field has a value of another type.
    """
    if not isinstance(document, dict):
        raise TypeError("it is no object")
    for name, hint in _hints(cast(Any, record)).items():
        if name in document and not _fits(hint, document[name]):
            raise TypeError(f"{name} = {document[name]!r} is of the wrong type")
    return from_dict(record, document)


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) in (tuple, list):
        return isinstance(value, list) and all(_fits(typing.get_args(hint)[0], item) for item in value)
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint if hint in (str, int, bool) else True


@functools.cache
def _hints(record: Hashable) -> types.MappingProxyType[str, Any]:
    hints = typing.get_type_hints(record)
    return types.MappingProxyType({f.name: hints[f.name] for f in dataclasses.fields(cast(Any, record))})


def _revive(annotation: Any, value: Any) -> Any:
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return tuple(_revive(item, v) for v in value)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return from_dict(annotation, value)
    return value
