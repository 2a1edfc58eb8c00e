"""Reads question-answering sets, each in its published form, into `Question` records.

A set lists the accepted answers of a question. Some also name the passages that hold them (`gold`), by id, title or
text; `prag_core.data.gold` finds those in a corpus.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prag_core.config import StorageConfig
from prag_core.data.files import read_text, shown, without_query
from prag_core.data.parsing import is_storable, json_lines, parse_json, parse_tsv, repeated
from prag_core.data.questions import Gold, Question
from prag_core.errors import InputError

JSONL, SQUAD, HOTPOTQA, TWO_WIKI, POPQA, CWQ = "jsonl", "squad", "hotpotqa", "2wikimultihopqa", "popqa", "cwq"
FORMATS = (JSONL, SQUAD, HOTPOTQA, TWO_WIKI, POPQA, CWQ)
# The types of the example corpus's questions: whether a question-answer pair of the augmentation asks for the fact.
COVERED, UNCOVERED = "fact in a QA pair", "fact only in the text"
# 2WikiMultihopQA's file with other names of its answers, published beside its sets.
_ALIASES = "id_aliases.json"


@dataclass(frozen=True)
class _Place:
    """The place of a record in its file, which each error about the record names."""

    path: str
    where: str

    def error(self, field: str, problem: str) -> InputError:
        remedy = f"fix the record, or name the set's form as FORM:FILE; forms are {', '.join(FORMATS)}"
        named = f"field {field!r}: " if field else ""
        return InputError(f"{self.path}: {self.where}: {named}{problem}", remedy)

    def take(self, record: Any, field: str, kind: type | tuple[type, ...]) -> Any:
        """Return a field of a record; raise an InputError if it is missing or not of this kind."""
        if not isinstance(record, dict):
            raise self.error("", f"it is a JSON {type(record).__name__}, not an object")
        if field not in record:
            raise self.error(field, f"is missing; the record has {', '.join(map(repr, record)) or 'nothing'}")
        value = record[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(field, f"is a {type(value).__name__}")
        return value

    def text(self, record: Any, field: str) -> str:
        value: str = self.take(record, field, str).strip()
        if not value:
            raise self.error(field, "is empty")
        return self._stored(value, field)

    def name(self, record: dict[str, Any], field: str, default: object = "") -> str:
        """Return a field that names something as a text; without it, or if it is null, return the default."""
        if record.get(field) is None:
            return str(default)
        return self._stored(str(self.take(record, field, (str, int))), field)

    def texts(self, values: Any, field: str) -> tuple[str, ...]:
        """Return a list of texts without duplicates; a single text counts as a list of one."""
        listed = [values] if isinstance(values, str) else values
        if not isinstance(listed, list) or not all(isinstance(value, str) for value in listed):
            raise self.error(field, "is not a text or a list of texts")
        kept = tuple(dict.fromkeys(self._stored(value.strip(), field) for value in listed if value.strip()))
        if not kept:
            raise self.error(field, "has no text in it")
        return kept

    def _stored(self, value: str, field: str) -> str:
        """Return a text that can be stored: JSON can spell a lone surrogate, but UTF-8 cannot."""
        if not is_storable(value):
            raise self.error(field, "holds a lone surrogate, which is no character")
        return value


def read_questions(
    path: str, form: str = "", storage: StorageConfig | None = None, left_out: Counter[str] | None = None
) -> list[Question]:
    """Read a set of questions from a file (any fsspec URL, gzipped or not).

    Args:
        path: The file. If `id_aliases.json` lies beside a file of 2WikiMultihopQA, it is read too.
        form: One of `FORMATS`; detected from the content when empty.
        storage: How to reach servers.
        left_out: Counts the questions of the file that are left out, by reason.

    Raises:
        InputError: when the file cannot be read or has no questions, or for the first record that lacks a field of
            its form; the message names the record and the field.
    """
    if form and form not in FORMATS:
        raise InputError(f"{form!r} is not a form of question sets", f"known are {', '.join(FORMATS)}")
    skipped: Counter[str] = Counter() if left_out is None else left_out
    text = read_text(path, "name a file of questions", storage)
    name = shown(without_query(path))
    if not form and without_query(path).lower().removesuffix(".gz").endswith(".tsv"):
        form = POPQA
    if form in (JSONL, POPQA) or (not form and not _is_document(text)):
        questions = list((_popqa if form == POPQA else _jsonl)(name, text))
    else:
        try:
            document = parse_json(text)
        except ValueError as error:
            raise InputError(f"{name}: not JSON: {error}", "fix the file, or name its form as FORM:FILE") from None
        form = form or _form_of(name, document)
        if form == TWO_WIKI:
            questions = list(_two_wiki(name, document, _aliases(path, storage)))
        else:
            questions = list(_READERS[form](name, document))
        if form == SQUAD and (unanswerable := _count_questions(document) - len(questions)):
            skipped["unanswerable"] = unanswerable
    if not questions:
        what = "".join(f"; {count} are {reason}" for reason, count in skipped.items())
        raise InputError(f"{name}: holds no questions{what}", "name a file with at least one")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"{name}: two questions have the id {question.id!r}", "give each question its own id")
        seen.add(question.id)
    return questions


def _is_document(text: str) -> bool:
    """Whether a text is one JSON document, not JSON Lines."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith(("[", "{")):
        return False
    try:
        parse_json(first)
    except json.JSONDecodeError:
        return True
    except ValueError:  # complete, but refused: as a line, its error names the line
        return False
    return first.startswith("[") or (not rest.strip() and '"data"' in first)


def _form_of(path: str, document: Any) -> str:
    if isinstance(document, dict) and "data" in document:
        return SQUAD
    first = document[0] if isinstance(document, list) and document else None
    if isinstance(first, dict):
        if "evidences" in first or "answer_id" in first:
            return TWO_WIKI
        if "supporting_facts" in first or {"_id", "context"} <= first.keys():
            return HOTPOTQA
        if "question" in first and ("answers" in first or "answer" in first):
            return CWQ
    raise InputError(f"{path}: its form is not known", f"name the form as FORM:FILE; forms are {', '.join(FORMATS)}")


# ---- the forms


def _jsonl(path: str, text: str) -> Iterator[Question]:
    """Our form: `question`, `answers` or `answer`.

    Optional fields: `id`, `type`, `split`, `gold_ids` or `passage_id`, and `covered`, which gives the type.
    """
    for number, place, record in _lines(path, text):
        question = place.text(record, "question")
        answers = "answer" if "answer" in record and "answers" not in record else "answers"
        kind = place.name(record, "type")
        if not kind and "covered" in record:
            kind = COVERED if place.take(record, "covered", bool) else UNCOVERED
        ids = "gold_ids" if "gold_ids" in record else "passage_id"
        gold = place.texts(record[ids], ids) if record.get(ids) else ()
        yield Question(
            id=place.name(record, "id", number),
            question=question,
            answers=place.texts(place.take(record, answers, (str, list)), answers),
            type=kind,
            gold=tuple(Gold(id=id) for id in gold),
            split=place.name(record, "split"),
        )


def _squad(path: str, document: Any) -> Iterator[Question]:
    """SQuAD 1.1 and 2.0, without the questions of 2.0 that have no answer."""
    top = _Place(path, "the document")
    for a, article in enumerate(top.take(document, "data", list)):
        place = _Place(path, f"data[{a}]")
        title = place.name(article, "title") if isinstance(article, dict) else ""
        for p, paragraph in enumerate(place.take(article, "paragraphs", list)):
            place = _Place(path, f"data[{a}].paragraphs[{p}]")
            gold = (Gold(title=title.replace("_", " "), text=place.text(paragraph, "context")),)
            for q, item in enumerate(place.take(paragraph, "qas", list)):
                place = _Place(path, f"data[{a}].paragraphs[{p}].qas[{q}]")
                listed = place.take(item, "answers", list)
                if item.get("is_impossible") is True:
                    continue
                texts = place.texts([place.text(answer, "text") for answer in listed], "answers")
                yield Question(place.text(item, "id"), place.text(item, "question"), texts, "extractive", gold)


def _count_questions(document: Any) -> int:
    return sum(len(paragraph["qas"]) for article in document["data"] for paragraph in article["paragraphs"])


def _hotpotqa(path: str, document: Any) -> Iterator[Question]:
    """HotpotQA's `distractor` and `fullwiki` files.

    The contexts of `fullwiki` were retrieved and may lack gold paragraphs; for these only the title is known.
    """
    for place, record in _records(path, document):
        yield _multi_hop(place, record, (), retrieved=True)


def _two_wiki(path: str, document: Any, aliases: dict[str, tuple[str, ...]]) -> Iterator[Question]:
    for place, record in _records(path, document):
        yield _multi_hop(place, record, aliases.get(str(record.get("answer_id")), ()), retrieved=False)


def _multi_hop(place: _Place, record: Any, aliases: Sequence[str], *, retrieved: bool) -> Question:
    # Check the answer first: the published test files have none, so that is what their error should say.
    answer = place.text(record, "answer")
    contexts = {}
    for item in place.take(record, "context", list):
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[1], list)):
            raise place.error("context", "is not a list of [title, sentences]")
        # HotpotQA's sentences begin with a space, 2WikiMultihopQA's do not. White space is normalized later.
        contexts[str(item[0])] = " ".join(map(str, item[1]))
    titles = []
    for fact in place.take(record, "supporting_facts", list):
        if not (isinstance(fact, list) and fact and isinstance(fact[0], str)):
            raise place.error("supporting_facts", "is not a list of [title, number of the sentence]")
        if not retrieved and fact[0] not in contexts:
            raise place.error("supporting_facts", f"names {fact!r}, which 'context' lacks")
        titles.append(fact[0])
    return Question(
        id=place.text(record, "_id"),
        question=place.text(record, "question"),
        answers=place.texts([answer, *aliases], "answer"),
        type=place.text(record, "type"),
        gold=tuple(Gold(title=title, text=contexts.get(title, "")) for title in dict.fromkeys(titles)),
    )


def _aliases(path: str, storage: StorageConfig | None) -> dict[str, tuple[str, ...]]:
    """Return other names of answers by the answer's id, from the file of aliases beside the set, if there is one."""
    # Of `zip://dev.json::https://host/sets.zip?signature` the first part names the file.
    file, chain, archive = path.partition("::") if "://" in path else (path, "", "")
    folder, slash, _ = without_query(file).rpartition("/")
    beside = f"{folder}{slash}{_ALIASES}{chain}{archive}"
    try:
        text = read_text(beside, "", storage)
    except InputError as error:
        if isinstance(error.__context__, FileNotFoundError | KeyError):  # KeyError: an archive has no such file
            return {}
        remedy = f"{_ALIASES} belongs to the set, if there is one: copy the files into one folder that you can read"
        raise InputError(error.message, remedy) from error
    beside, found = shown(beside), {}
    for _, place, record in _lines(beside, text):
        names = place.take(record, "aliases", list)
        found[str(place.take(record, "Q_id", str))] = place.texts(names, "aliases") if names else ()
    return found


def _popqa(path: str, text: str) -> Iterator[Question]:
    header: list[str] = []
    # Not splitlines, which also splits at line separators that fields may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        place = _Place(path, f"line {number}")
        try:
            row = parse_tsv(line)
        except ValueError as error:
            raise place.error("", str(error)) from None
        if not row:
            continue
        if not header:
            header = row
            if twice := repeated(header):
                raise place.error(twice[0], "is there twice in the header")
            continue
        if len(row) != len(header):
            raise place.error("", f"the row has {len(row)} fields, the header has {len(header)}")
        record = dict(zip(header, row, strict=True))
        # The published file lists each object's names twice; `possible_answers` is the complete list.
        field = "possible_answers" if "possible_answers" in record else "o_aliases"
        try:
            names = parse_json(place.text(record, field))
        except ValueError:
            raise place.error(field, "is not a JSON list") from None
        obj = [record["obj"]] if record.get("obj") else []
        title = record.get("s_wiki_title", "")
        yield Question(
            id=place.text(record, "id"),
            question=place.text(record, "question"),
            answers=place.texts([*obj, *names] if isinstance(names, list) else None, field),
            type=place.text(record, "prop"),
            gold=(Gold(title=title),) if title else (),
        )


def _cwq(path: str, document: Any) -> Iterator[Question]:
    """ComplexWebQuestions as published (`ID`, `answers` with aliases), or flattened (`answer`, a list)."""
    for place, record in _records(path, document):
        if "answers" in record:
            listed = []
            for item in place.take(record, "answers", list):
                aliases = place.take(item, "aliases", (list, type(None))) if "aliases" in item else None
                listed += [place.take(item, "answer", (str, type(None))) or "", *(aliases or [])]
            answers = place.texts(listed, "answers")
        else:
            answers = place.texts(place.take(record, "answer", (str, list)), "answer")
        name = next((name for name in ("ID", "test_id", "id") if name in record), "ID")
        yield Question(
            id=str(place.take(record, name, (str, int))),
            question=place.text(record, "question"),
            answers=answers,
            type=place.name(record, "compositionality_type"),
        )


def _lines(path: str, text: str) -> Iterator[tuple[int, _Place, Any]]:
    for number, record in json_lines(text):
        place = _Place(path, f"line {number}")
        if isinstance(record, ValueError):
            raise place.error("", f"the line is not JSON: {record}")
        yield number, place, record


def _records(path: str, document: Any) -> Iterator[tuple[_Place, Any]]:
    if not isinstance(document, list):
        raise InputError(f"{path}: is not a list of records", "fix the file, or name its form as FORM:FILE")
    for number, record in enumerate(document):
        place = _Place(path, f"record {number}")
        if not isinstance(record, dict):
            raise place.error("", f"it is a JSON {type(record).__name__}, not an object")
        yield place, record


_READERS: dict[str, Callable[[str, Any], Iterator[Question]]] = {
    SQUAD: _squad,
    HOTPOTQA: _hotpotqa,
    CWQ: _cwq,
}
