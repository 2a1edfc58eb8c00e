"""The optional judge of an evaluation. Each answer is judged once; the verdicts are stored beside the answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from rich.console import Console

from prag_core.evaluation.judge import JUDGE_VERSION, judge_answers
from prag_core.evaluation.summary import Evaluation
from prag_core.identity import fingerprint
from prag_core.llm.generator import Generator
from prag_core.records import from_table, to_table
from prag_core.store.objects import Store

_JUDGED_TOGETHER = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's score of an answer, 1.0 or 0.0; `id` is the fingerprint of question, accepted answers and answer."""

    id: str
    right: float


def judge(store: Store, folder: str, evaluation: Evaluation, generator: Generator, console: Console) -> Evaluation:
    """Return the evaluation with a verdict on each answer; the judge is asked for verdicts that are not stored.

    Raises:
        GenerationError: when the judge fails or says neither yes nor no; the verdicts before it stay stored.
    """
    verdict_folder = f"{folder}/verdicts/{fingerprint([generator.fingerprint, JUDGE_VERSION])}"
    stored = store.get_table(Verdict, store.list(verdict_folder, ".parquet"))
    known = {row.id: row.right for row in from_table(Verdict, stored)}
    rows = {}
    names = {}
    for ids_by_question in evaluation.request_ids.values():
        for question, ids in zip(evaluation.questions, ids_by_question, strict=True):
            for id in ids:
                row = (question.question, question.answers, evaluation.replies[id].text)
                # Questions with the same words may accept different answers, so the request's id is not enough.
                names[question.id, id] = fingerprint(row)
                rows[fingerprint(row)] = row
    missing = sorted(rows.keys() - known.keys())

    async def ask() -> None:
        try:
            for begin in range(0, len(missing), _JUDGED_TOGETHER):
                console.print(f"judge: {begin}/{len(missing)}")
                part = missing[begin : begin + _JUDGED_TOGETHER]
                verdicts = await judge_answers(generator, [rows[name] for name in part])
                made = [Verdict(name, right) for name, right in zip(part, verdicts, strict=True)]
                store.put_table(verdict_folder, to_table(Verdict, made))
                known.update({verdict.id: verdict.right for verdict in made})
        finally:
            await generator.close()

    asyncio.run(ask())
    return replace(evaluation, verdicts={pair: known[name] for pair, name in names.items()})
