"""The records that flow between stages: frozen dataclasses, each with its Arrow schema.

A stage takes records and gives records; nothing else crosses a stage boundary. `schema`, `to_table` and
`from_table` translate them to Arrow, the form in which Ray Data moves them and Parquet keeps them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import pyarrow as pa

from prag_core.identity import fingerprint

Stage = Literal["corpus", "augment", "train"]
Mode = Literal["closed", "rag", "prag", "combine"]
MODES: tuple[Mode, ...] = ("closed", "rag", "prag", "combine")
MergeRule = Literal["sum", "mean", "score"]
# The most that an adapter's weight may be multiplied by.
MAX_STRENGTH = 4.0
Template = Literal["direct", "chain_of_thought"]
Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One unit of text. `key` is its content hash; `sources` are all the ids it came under, sorted.

    `access` are the tags of which a reader must hold one, sorted; without any the passage is public.
    """

    key: str
    title: str
    text: str
    sources: tuple[str, ...]
    access: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Name all of it: two passages of one key differ if their white space, ids or tags do."""
        return fingerprint(self)


@dataclass(frozen=True, slots=True)
class QAPair:
    """A question about a passage, its short answer, and a full sentence that gives the answer."""

    question: str
    answer: str
    full_answer: str


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What a language model made of a passage: rewrites and question-answer pairs.

    `origin` says where it came from (`generated` or `imported`); `refused` counts the pairs that the filter
    turned away, as `reason=count` strings; `attempts` and `seconds` are what it took.
    """

    key: str
    rewrites: tuple[str, ...]
    pairs: tuple[QAPair, ...]
    origin: str
    refused: tuple[str, ...] = ()
    attempts: int = 1
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        """Name the content alone: two augmentations that train the same adapter have the same digest."""
        return fingerprint([self.rewrites, [dataclasses.asdict(pair) for pair in self.pairs]])


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One adapter that exists: where its bytes lie, what they are, and how its training went.

    `augmentation` is the digest of the text it was trained on: another text, another adapter. `offset` and
    `length` are the bytes of the adapter within `shard`; `checksum` is over those bytes. `created` is in seconds
    since the epoch: of two rows of one key, the later one counts.
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

    `recipe` is the fingerprint for which it was given up: another recipe tries again.
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
    """How one retrieved passage was used for an answer: in the `weights`, in the `prompt`, or both.

    `note` says why a passage that was meant for the weights went into the prompt instead.
    """

    key: str
    title: str
    sources: tuple[str, ...]
    score: float
    in_weights: bool
    in_prompt: bool
    weight: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with everything that led to it.

    `reasoning` is all that the model wrote, where the template lets it reason before `text`. `finish` says why it
    ended: `stop` (the model's end of turn, a line end, a stop text), `length`, or `error`: it is empty then, and
    `error` says why. `milliseconds` are by step: retrieve, fetch, inject, …
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


T = TypeVar("T")

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


def _arrow_type(annotation: Any) -> pa.DataType:
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if typing.get_origin(annotation) is tuple:
        return pa.list_(_arrow_type(typing.get_args(annotation)[0]))
    if dataclasses.is_dataclass(annotation):
        return pa.struct(list(schema(cast(type, annotation))))
    raise TypeError(f"no Arrow type for {annotation!r}")


@functools.cache
def schema(record: Hashable) -> pa.Schema:
    """Return the Arrow schema of a record class (str, int, float, bool, tuples of them, nested records)."""
    hints = typing.get_type_hints(record)
    fields = [pa.field(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(cast(Any, record))]
    return pa.schema(fields)


def to_table(record: type[T], rows: Iterable[T]) -> pa.Table:
    """Return `rows` as an Arrow table with the schema of `record`, also when there are none."""
    return pa.Table.from_pylist([dataclasses.asdict(cast(Any, row)) for row in rows], schema=schema(cast(Any, record)))


def passage_table(passages: Iterable[Passage]) -> pa.Table:
    """Return passages as a stored corpus keeps them: with a column `digest`, which tells what changed of them."""
    rows = list(passages)
    return to_table(Passage, rows).append_column("digest", pa.array([row.digest for row in rows], pa.string()))


def from_table(record: type[T], table: pa.Table) -> list[T]:
    """Return the rows of `table` as records; columns that the record does not know are ignored."""
    names = [f.name for f in dataclasses.fields(cast(Any, record))]
    return [from_dict(record, row) for row in table.select(names).to_pylist()]


def from_dict(record: type[T], row: dict[str, Any]) -> T:
    """Build a record from the plain values that Arrow or JSON give."""
    return record(**{name: _revive(hint, row[name]) for name, hint in _hints(cast(Any, record)).items() if name in row})


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
