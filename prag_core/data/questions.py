"""Question-answering sets in the form in which they are published, read into one record.

A set says of a question which answers are accepted and, where it can, which passages hold them (`gold`): by id,
by title, or by their text. How those are found in a corpus is the business of `GoldIndex`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prag_core.data.files import read_text
from prag_core.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
JSONL, SQUAD, HOTPOTQA, TWO_WIKI, POPQA, CWQ = "jsonl", "squad", "hotpotqa", "2wikimultihopqa", "popqa", "cwq"
FORMATS = (JSONL, SQUAD, HOTPOTQA, TWO_WIKI, POPQA, CWQ)
# Where 2WikiMultihopQA keeps other names of its answers, beside its own files.
ALIASES = "id_aliases.json"


@dataclass(frozen=True, slots=True)
class Gold:
    """A passage that supports an answer, by what the set says of it: its id, its title, its text."""

    id: str = ""
    title: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with all its accepted answers; `type` is the set's own word for its kind."""

    id: str
    question: str
    answers: tuple[str, ...]
    type: str = ""
    gold: tuple[Gold, ...] = ()
    split: str = ""


@dataclass(frozen=True)
class _Place:
    """A record's place in its file, which each complaint about it names."""

    path: str
    where: str

    def error(self, field: str, problem: str) -> InputError:
        remedy = "mend the record, or name the set's form: --dataset FORM:FILE, of " + ", ".join(FORMATS)
        return InputError(f"{self.path}: {self.where}: field {field!r}: {problem}", remedy)

    def take(self, record: Any, field: str, kind: type | tuple[type, ...]) -> Any:
        """Return a field of a record, of that kind, or raise what is wrong."""
        if not isinstance(record, dict):
            raise self.error("", f"a JSON {type(record).__name__} stands where an object is expected")
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
        return value

    def texts(self, values: Any, field: str) -> tuple[str, ...]:
        """Return a list of texts without repetitions; a single text stands for a list of one."""
        listed = [values] if isinstance(values, str) else values
        if not isinstance(listed, list) or not all(isinstance(value, str) for value in listed):
            raise self.error(field, "is no text and no list of texts")
        kept = tuple(dict.fromkeys(value.strip() for value in listed if value.strip()))
        if not kept:
            raise self.error(field, "has no text in it")
        return kept


def read_questions(path: str, form: str = "") -> list[Question]:
    """Read a set of questions from a file (any fsspec URL, gzipped or not).

    Args:
        path: The file. Beside a file of 2WikiMultihopQA, `id_aliases.json` is read too when it is there.
        form: One of `FORMATS`; found out from the content when empty.

    Raises:
        InputError: when the file cannot be read or is empty, or for the first record that lacks what its form
            requires; it names the record and the field.
    """
    if form and form not in FORMATS:
        raise InputError(f"{form!r} is no form of a question set", f"known are {', '.join(FORMATS)}")
    text = read_text(path, "name a file of questions")
    if not form and path.lower().removesuffix(".gz").endswith(".tsv"):
        form = POPQA
    if form in (JSONL, POPQA) or (not form and not _is_document(text)):
        questions = list((_popqa if form == POPQA else _jsonl)(path, text))
    else:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}", "mend the file, or name its form") from None
        questions = list(_READERS[form or _form_of(path, document)](path, document))
    if not questions:
        raise InputError(f"{path}: holds no questions", "name a file with at least one")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"{path}: the id {question.id!r} comes twice", "give each question an id of its own")
        seen.add(question.id)
    return questions


def _is_document(text: str) -> bool:
    """Whether a text is one JSON document, and not one a line."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith(("[", "{")):
        return False
    try:
        json.loads(first)
    except ValueError:
        return True
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
    raise InputError(
        f"{path}: is of no form that is known here", f"name it: --dataset FORM:FILE, of {', '.join(FORMATS)}"
    )


# ---- the forms


def _jsonl(path: str, text: str) -> Iterator[Question]:
    """Ours: `question`, `answers` or `answer`; perhaps `id`, `type`, `split`, `gold_ids` or `passage_id`, `covered`."""
    # Not splitlines: JSON strings may hold its rarer line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = _Place(path, f"line {number}")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise place.error("", f"the line is not JSON: {error}") from None
        question = place.text(record, "question")
        answers = "answers" if "answers" in record else "answer"
        kind = str(record.get("type", ""))
        if not kind and "covered" in record:
            covered = place.take(record, "covered", bool)
            kind = "fact in a QA pair" if covered else "fact only in the text"
        ids = "gold_ids" if "gold_ids" in record else "passage_id"
        gold = place.texts(record[ids], ids) if record.get(ids) else ()
        yield Question(
            id=str(record.get("id", number)),
            question=question,
            answers=place.texts(place.take(record, answers, (str, list)), answers),
            type=kind,
            gold=tuple(Gold(id=id) for id in gold),
            split=str(record.get("split", "")),
        )


def _squad(path: str, document: Any) -> Iterator[Question]:
    """SQuAD 1.1 and 2.0; questions without an answer (2.0) are left out."""
    top = _Place(path, "the document")
    for a, article in enumerate(top.take(document, "data", list)):
        place = _Place(path, f"data[{a}]")
        title = str(article.get("title", "")) if isinstance(article, dict) else ""
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


def _hotpotqa(path: str, document: Any) -> Iterator[Question]:
    """HotpotQA's `distractor` and `fullwiki` files.

    The contexts of `fullwiki` were retrieved, and may lack gold paragraphs: these are known by their titles alone.
    """
    for place, record in _records(path, document):
        yield _multi_hop(place, record, (), retrieved=True)


def _two_wiki(path: str, document: Any) -> Iterator[Question]:
    aliases = _aliases(path)
    for place, record in _records(path, document):
        yield _multi_hop(place, record, aliases.get(str(record.get("answer_id")), ()), retrieved=False)


def _multi_hop(place: _Place, record: Any, aliases: Sequence[str], *, retrieved: bool) -> Question:
    # First: the published test files have no answers, and nothing can be asked without.
    answer = place.text(record, "answer")
    contexts = {}
    for item in place.take(record, "context", list):
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[1], list)):
            raise place.error("context", "is not a list of [title, sentences]")
        # HotpotQA's sentences begin with their spaces, those of 2WikiMultihopQA don't: white space is folded later.
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


def _aliases(path: str) -> dict[str, tuple[str, ...]]:
    """Return other names of answers, by the id of the answer, from the file beside the set's own, if there."""
    folder, slash, _ = path.rpartition("/")
    beside = f"{folder}{slash}{ALIASES}"
    try:
        text = read_text(beside, "")
    except InputError as error:
        if isinstance(error.__context__, FileNotFoundError):
            return {}
        raise
    found = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = _Place(beside, f"line {number}")
            try:
                record = json.loads(line)
            except ValueError as error:
                raise place.error("", f"the line is not JSON: {error}") from None
            names = place.take(record, "aliases", list)
            found[str(place.take(record, "Q_id", str))] = place.texts(names, "aliases") if names else ()
    return found


def _popqa(path: str, text: str) -> Iterator[Question]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    for row in rows:
        place = _Place(path, f"line {rows.line_num}")
        # csv gives None for a cell that the row is too short for.
        record = {name: value for name, value in row.items() if isinstance(value, str)}
        # The published file has each object's names twice; the second list is the complete one.
        field = "possible_answers" if "possible_answers" in record else "o_aliases"
        try:
            names = json.loads(place.text(record, field))
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
    """ComplexWebQuestions as published (`ID`, `answers` with aliases) or flattened (`answer`: a list)."""
    for place, record in _records(path, document):
        if "answers" in record:
            listed = []
            for item in place.take(record, "answers", list):
                listed += [place.take(item, "answer", (str, type(None))) or "", *(item.get("aliases") or [])]
            answers = place.texts(listed, "answers")
        else:
            answers = place.texts(place.take(record, "answer", (str, list)), "answer")
        name = next((name for name in ("ID", "test_id", "id") if name in record), "ID")
        yield Question(
            id=str(place.take(record, name, (str, int))),
            question=place.text(record, "question"),
            answers=answers,
            type=str(record.get("compositionality_type", "")),
        )


def _records(path: str, document: Any) -> Iterator[tuple[_Place, Any]]:
    if not isinstance(document, list):
        raise InputError(f"{path}: is no list of records", "mend the file, or name its form")
    for number, record in enumerate(document):
        place = _Place(path, f"record {number}")
        if not isinstance(record, dict):
            raise place.error("", f"a JSON {type(record).__name__} stands where an object is expected")
        yield place, record


_READERS: dict[str, Callable[[str, Any], Iterator[Question]]] = {
    SQUAD: _squad,
    HOTPOTQA: _hotpotqa,
    TWO_WIKI: _two_wiki,
    CWQ: _cwq,
}


def normalize_answer(text: str) -> str:
    """Lower `text`, drop ASCII punctuation and English articles, fold white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
