"""Choose the paper's questions and retrieve their passages: the first step of docs/reproduce.md.

The corpus of the configuration is indexed in the folder `--to`, once: another corpus needs another folder. For each
set of questions, the folder gets:

- `SET/questions/TYPE.jsonl`: the first 300 questions of each type, and in `total.jsonl` the first 300 of the whole set,
  each with the ids of the passages that it retrieves, the best first (`gold_ids`);
- `SET/corpus.jsonl`: these passages, which are the only ones to train.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prag_core.config import Config
from prag_core.config_file import load_config
from prag_core.data.corpus import read_records
from prag_core.data.listing import list_files
from prag_core.data.question_sets import read_questions
from prag_core.data.questions import Question
from prag_core.errors import InputError, PragError
from prag_core.records import Passage, Reject
from prag_core.retrieval.kinds import Retriever, index_kind

# The sets of which the paper reports each type of question by itself.
BY_TYPE = ("2wikimultihopqa", "hotpotqa")
TOTAL = "total"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET:FILE", help="2wikimultihopqa, hotpotqa, popqa or cwq")
    parser.add_argument("-c", "--config", required=True, help="names the corpus, the index and the number of passages")
    parser.add_argument("--questions", type=int, default=300, help="how many of each type")
    parser.add_argument("--to", type=Path, default=Path("paper-data"), help="the folder to write")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a setting, as `prag` takes it")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    chosen = {}
    for named in arguments.sets:
        name, _, file = named.partition(":")
        if not file:
            raise InputError(f"{named!r}: has no file", "write SET:FILE, as in popqa:popQA.tsv")
        chosen[name] = choose(read_questions(file, name), arguments.questions, by_type=name in BY_TYPE)
    retriever = open_corpus(config, arguments.to / "index")
    for name, questions in chosen.items():
        found = retrieve(retriever, questions.values(), config.answer.top_k)
        for kind, asked in questions.items():
            rows = [
                {
                    "id": question.id,
                    "question": question.question,
                    "answers": question.answers,
                    "type": question.type,
                    "gold_ids": [passage.sources[0] for passage in found[question.id]],
                }
                for question in asked
            ]
            write(arguments.to / name / "questions" / f"{kind}.jsonl", rows)
        passages = {passage.key: passage for best in found.values() for passage in best}.values()
        rows = [{"id": p.sources[0], "title": p.title, "text": p.text} for p in passages]
        write(arguments.to / name / "corpus.jsonl", rows)
        counts = ", ".join(f"{kind} {len(asked)}" for kind, asked in questions.items())
        print(f"{name}: {len(found)} questions ({counts}), {len(passages)} passages", flush=True)
    retriever.close()


def choose(questions: Iterable[Question], limit: int, *, by_type: bool) -> dict[str, list[Question]]:
    """Return the first questions of the set, and of each type if wanted."""
    chosen: dict[str, list[Question]] = {TOTAL: []}
    for question in questions:
        for kind in (TOTAL, question.type) if by_type else (TOTAL,):
            if len(chosen.setdefault(kind, [])) < limit:
                chosen[kind].append(question)
    return chosen


def open_corpus(config: Config, folder: Path) -> Retriever:
    """Open the index of the configured corpus, which is built if it is not there.

    Raises:
        InputError: when the folder holds the index of another corpus, or one with other settings.
    """
    kind = index_kind(config.index)
    wanted = json.dumps({"corpus": config.corpus.model_dump(), "index": config.index.model_dump()}, indent=1)
    built = folder.with_name("index.json")
    if folder.exists():
        if not built.exists() or built.read_text(encoding="utf-8") != wanted:
            raise InputError(
                f"{folder}: is the index of another corpus, or of other settings: see {built.name} beside it",
                "name another folder by --to, or remove this one to build it again",
            )
    else:
        partial = folder.with_name("index.partial")
        partial.mkdir(parents=True, exist_ok=True)
        count = kind.build_index(corpus_passages(config), partial, config.index)
        built.write_text(wanted, encoding="utf-8")
        partial.rename(folder)
        print(f"{folder}: {count:,} passages", flush=True)
    return kind.open_retriever(folder, config.index)


def corpus_passages(config: Config) -> Iterator[Passage]:
    rejects = 0
    for file in list_files(config.corpus, config.storage).files:
        for number, piece in enumerate(read_records(file, config.corpus, config.storage), start=1):
            if isinstance(piece, Reject):
                rejects += 1
            else:
                yield Passage(piece.key, piece.title, piece.text, (piece.id,))
            if number % 1_000_000 == 0:
                print(f"{file.url}: {number:,} records, {rejects} of them unusable", flush=True)


def retrieve(retriever: Retriever, questions: Iterable[Sequence[Question]], top_k: int) -> dict[str, list[Passage]]:
    """Return the best passages of each question, by the question's id."""
    seen: dict[str, Passage] = {}
    found = {}
    for question in {question.id: question for asked in questions for question in asked}.values():
        # The corpus holds some passages twice, under two ids. They count once, under the first id that is found.
        hits = retriever.search(question.question, 2 * top_k)
        best = dict.fromkeys(seen.setdefault(hit.passage.key, hit.passage).key for hit in hits)
        found[question.id] = [seen[key] for key in list(best)[:top_k]]
    return found


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except PragError as error:
        sys.exit(str(error))
