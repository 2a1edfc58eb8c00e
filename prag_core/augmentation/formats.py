"""Reads and writes files of augmentations: our JSON Lines, and the JSON that the paper's authors publish."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prag_core.augmentation.paper import to_pair
from prag_core.config import StorageConfig
from prag_core.data.files import read_text, shown, without_query
from prag_core.data.parsing import is_storable, json_lines, parse_json
from prag_core.data.readers import BadRecordError
from prag_core.errors import InputError
from prag_core.identity import passage_key
from prag_core.prompts import passage_text
from prag_core.records import Augmentation, Passage, QAPair, Reject

# The name of the augmenting model when we write the paper's form.
_MODEL = "prag"


@dataclass(frozen=True)
class ImportedAugmentations:
    """The content of an import file: augmentations by the name of their passages, and rejects for unusable records.

    A name is a passage's key, one of its source ids, or the key of its text alone. `places` says by name where in the
    file the augmentation is.
    """

    by_name: Mapping[str, Augmentation]
    rejects: tuple[Reject, ...]
    places: Mapping[str, str]

    def find(self, passage: Passage) -> Augmentation | None:
        """Return the passage's augmentation, found by its key, its ids or its text; None when there is none."""
        found = next((self.by_name[name] for name in names_of(passage) if name in self.by_name), None)
        return replace(found, key=passage.key) if found else None


def names_of(passage: Passage) -> list[str]:
    """Return the names that a passage may have in a file of augmentations; the first one that is there counts."""
    texts = (passage.text, passage_text(passage), f"{passage.title} {passage.text}")
    return [passage.key, *passage.sources, *(passage_key("", text) for text in texts)]


def read_augmentations(path: str, storage: StorageConfig | None = None) -> ImportedAugmentations:
    """Read a file of augmentations (any fsspec URL, gzipped or not) into memory. `storage` says how to reach servers.

    Our form is JSON Lines, one passage a line: `id` or `key`, `rewrites` (a list of texts) and `qa` (a list of
    `question`, `answer`, `full_answer`). A line with a `key` belongs to the passage with that key, whatever its `id`.
    The paper's form is one JSON list of records, each with `augment`: a list of `passage`, `<model>_rewrite` and
    `<model>_qa`. The first record of a passage counts. In our form a second one is a reject; in the paper's form
    passages are repeated for each question.

    Raises:
        InputError: when the file as a whole cannot be read, or is empty.
    """
    text = read_text(path, "set augment.import_file to a file of augmentations", storage)
    file = shown(without_query(path))
    by_name: dict[str, Augmentation] = {}
    places: dict[str, str] = {}
    rejects: list[Reject] = []
    paper = text.lstrip().startswith("[")
    for place, item in _paper_records(text, file) if paper else json_lines(text):
        try:
            if isinstance(item, BadRecordError):
                raise item
            if isinstance(item, ValueError):
                raise BadRecordError("invalid_json", str(item))
            if not is_storable(json.dumps(item, ensure_ascii=False)):
                raise BadRecordError("invalid_utf8", "a text holds a lone surrogate, which is no character")
            names, augmentation = _from_paper(item) if paper else _from_line(item)
            if not augmentation.pairs:
                detail = f"refused: {', '.join(augmentation.refused) or 'it has no pairs'}"
                raise BadRecordError("no_usable_pair", detail)
            if not paper and any(name in by_name for name in names):
                raise BadRecordError("duplicate_id", f"{names[0]!r} came before; the first one is kept")
        except BadRecordError as bad:
            rejects.append(Reject("augment", bad.reason, bad.detail, f"{file}:{place}"))
        else:
            for name in names:
                by_name.setdefault(name, augmentation)
                places.setdefault(name, f"{file}:{place}")
    if not by_name and not rejects:
        raise InputError(
            f"{file}: holds no augmentations", "set augment.import_file to a file with some, or leave it out"
        )
    return ImportedAugmentations(by_name, tuple(rejects), places)


def paper_passages(path: str, storage: StorageConfig | None = None) -> list[str]:
    """Return the texts of the passages in a file of the paper's form, each once, in the order of the file.

    Raises:
        InputError: when the file cannot be read, is of another form, or holds no passage.
    """
    text = read_text(path, "set augment.import_file to a file of augmentations", storage)
    file = shown(without_query(path))
    if not text.lstrip().startswith("["):
        raise InputError(f"{file}: is not in the paper's form", "only that form has passages: a JSON list of records")
    items = (item for _, item in _paper_records(text, file) if isinstance(item, dict))
    passages = dict.fromkeys(item["passage"] for item in items if isinstance(item.get("passage"), str))
    if not passages:
        raise InputError(f"{file}: has no passages", "its records must have 'augment', with 'passage' in each item")
    return list(passages)


def _paper_records(text: str, path: str) -> Iterator[tuple[str, Any]]:
    try:
        records = parse_json(text)
    except ValueError as error:
        remedy = "fix the file, or write one object a line"
        raise InputError(f"{path}: begins with [ but is not a JSON list: {error}", remedy) from None
    for number, record in enumerate(records, start=1):
        augment = record.get("augment") if isinstance(record, dict) else None
        if not isinstance(augment, list):
            yield f"record {number}", BadRecordError("missing_field", "the record has no list 'augment'")
            continue
        for place, item in enumerate(augment, start=1):
            yield f"record {number}, augment {place}", item


def _from_line(item: Any) -> tuple[tuple[str, ...], Augmentation]:
    fields = _object(item)
    given = {name: fields[name] for name in ("key", "id") if fields.get(name) is not None}
    for name, value in given.items():
        if type(value) not in (str, int):
            raise BadRecordError("wrong_type", f"{name!r} holds a {type(value).__name__}, not a string")
    names = [name for value in given.values() if (name := str(value).strip())]  # a corpus strips its ids too
    if not names:
        raise BadRecordError("missing_field", "the line has neither 'id' nor 'key'")
    rewrites = fields.get("rewrites") or []
    if not isinstance(rewrites, list) or not all(isinstance(text, str) for text in rewrites):
        raise BadRecordError("wrong_type", "'rewrites' is not a list of texts")
    # With a key, the id is not a name as well: by now that id may have another text.
    return (names[0],), _augmentation(rewrites, fields.get("qa"))


def _from_paper(item: Any) -> tuple[tuple[str, ...], Augmentation]:
    fields = _object(item)
    text = fields.get("passage")
    if not isinstance(text, str) or not text.strip():
        raise BadRecordError("missing_field", "an augmented passage has no text 'passage'")
    # Several models may have augmented the passage. The first one that made pairs counts.
    models = [name.removesuffix("_qa") for name in fields if name.endswith("_qa") and fields[name]]
    if not models:
        raise BadRecordError("missing_field", "an augmented passage has no '<model>_qa'")
    rewrite = fields.get(f"{models[0]}_rewrite")
    if not isinstance(rewrite, str | None):
        raise BadRecordError("wrong_type", f"'{models[0]}_rewrite' is not a text")
    rewrites = [rewrite] if rewrite else []
    return (passage_key("", text),), _augmentation(rewrites, fields[f"{models[0]}_qa"])


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRecordError("not_an_object", f"a JSON {type(item).__name__} is not an object")
    return item


def _augmentation(rewrites: list[str], qa: object) -> Augmentation:
    """Return the record without the items that are not pairs. The filter is not applied to imported pairs."""
    if not isinstance(qa, list):
        raise BadRecordError("wrong_type", "the pairs are not a list of objects")
    pairs = [pair for item in qa if (pair := to_pair(item)) and _is_full(pair)]
    refused = (f"bad_json={len(qa) - len(pairs)}",) if len(pairs) < len(qa) else ()
    texts = tuple(text.strip() for text in rewrites if text.strip())
    return Augmentation("", texts, tuple(pairs), "imported", refused, attempts=0)


def _is_full(pair: QAPair) -> bool:
    return all(text.strip() for text in (pair.question, pair.answer, pair.full_answer))


def write_corpus(file: str, corpus: Path, storage: StorageConfig | None = None) -> int:
    """Write the passages of a file in the paper's form as a corpus in JSON Lines; return their number."""
    texts = paper_passages(file, storage)
    lines = [json.dumps({"id": f"paper-{i}", "title": "", "text": text}) for i, text in enumerate(texts)]
    corpus.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def write_augmentations(
    passages: list[Passage], augmentations: Mapping[str, Augmentation], file: Path, form: str
) -> None:
    """Write the augmentations of `passages`, given by key, to a file in the form `jsonl` or `paper`.

    `jsonl` writes lines with both `id` and `key`. `paper` writes the first rewrite only, since its form has one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines((_to_paper if form == "paper" else _to_lines)(passages, augmentations))


def _to_lines(passages: list[Passage], augmentations: Mapping[str, Augmentation]) -> Iterator[str]:
    for passage in passages:
        found = augmentations[passage.key]
        pairs = [asdict(pair) for pair in found.pairs]
        line = {"id": passage.sources[0], "key": passage.key, "rewrites": list(found.rewrites), "qa": pairs}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _to_paper(passages: list[Passage], augmentations: Mapping[str, Augmentation]) -> Iterator[str]:
    for number, passage in enumerate(passages):
        found = augmentations[passage.key]
        text = passage_text(passage)
        item: dict[str, Any] = {"pid": 0, "passage": text}
        if found.rewrites:
            item[f"{_MODEL}_rewrite"] = found.rewrites[0]
        item[f"{_MODEL}_qa"] = [asdict(pair) for pair in found.pairs]
        record = {"test_id": number, "passages": [text], "augment": [item]}
        yield ("[\n" if number == 0 else ",\n") + json.dumps(record, ensure_ascii=False)
    yield "\n]\n" if passages else "[]\n"
