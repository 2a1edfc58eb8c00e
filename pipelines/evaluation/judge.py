"""The optional judge of an evaluation: each answer is judged once, and the verdicts are stored beside the answers."""

from __future__ import annotations

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
    """What a judge said of an answer to a question; `id` names question, accepted answers and answer."""

    id: str
    right: float


def judge(store: Store, folder: str, evaluation: Evaluation, generator: Generator, console: Console) -> Evaluation:
    """Return the evaluation with a verdict on each answer, asking for those that are not stored.

    Raises:
        GenerationError: when the judge fails or says neither yes nor no; what was judged before is kept.
    """
    place = f"{folder}/verdicts/{fingerprint([generator.fingerprint, JUDGE_VERSION])}"
    known = {row.id: row.right for row in from_table(Verdict, store.get_table(Verdict, store.list(place, ".parquet")))}
    rows = {}
    names = {}
    for of in evaluation.asks.values():
        for question, ids in zip(evaluation.questions, of, strict=True):
            for id in ids:
                row = (question.question, question.answers, evaluation.replies[id].text)
                # Two questions of the same words may accept other answers, so the request's id is not enough.
                names[question.id, id] = fingerprint(row)
                rows[fingerprint(row)] = row
    missing = sorted(rows.keys() - known.keys())
    for begin in range(0, len(missing), _JUDGED_TOGETHER):
        console.print(f"judge: {begin}/{len(missing)}")
        part = missing[begin : begin + _JUDGED_TOGETHER]
        verdicts = judge_answers(generator, [rows[name] for name in part])
        made = [Verdict(name, right) for name, right in zip(part, verdicts, strict=True)]
        store.put_table(place, to_table(Verdict, made))
        known.update({verdict.id: verdict.right for verdict in made})
    return replace(evaluation, verdicts={place: known[name] for place, name in names.items()})
