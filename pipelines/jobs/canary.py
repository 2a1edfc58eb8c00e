"""Canary questions: a snapshot must answer some known questions well enough before it is put into service."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.resources import Actors
from prag_core.config import Config
from prag_core.errors import InputError
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import Store


@dataclass(frozen=True)
class Canary:
    """A question and its accepted answers."""

    question: str
    answers: tuple[str, ...]


def read_canaries(path: Path) -> list[Canary]:
    """Read JSON Lines of `question` and `answers`; other fields are ignored.

    Raises:
        InputError: when the file is missing or empty, or a line has another form.
    """
    try:
        # Not splitlines: it also splits at characters that a JSON string may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}", "name a file of questions and answers") from None
    canaries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answers = row["question"], row["answers"]
            if not (isinstance(question, str) and isinstance(answers, list) and answers):
                raise ValueError("question must be a string, and answers a list that is not empty")
            canaries.append(Canary(question, tuple(str(answer) for answer in answers)))
        except (ValueError, KeyError, TypeError) as error:
            detail = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{path}:{number}: {detail}", 'write {"question": "Who …?", "answers": ["…"]} in each line'
            ) from None
    if not canaries:
        raise InputError(f"{path}: holds no question", "write at least one")
    return canaries


def ask_canaries(
    config: Config, store: Store, snapshots: Sequence[str], canaries: Sequence[Canary], actors: Actors
) -> list[float]:
    """Return the mean F1 of each stored snapshot's answers; the configuration's section `answer` says how to answer.

    The questions are asked in a process of their own, because a JVM must not live in the driver, with the resources
    of one of `actors`.
    """
    environment = {"env_vars": index_kind(config.index).PROCESS_ENV}
    ask = ray.remote(_ask).options(num_cpus=actors.cpus, num_gpus=actors.gpus, max_retries=1, runtime_env=environment)
    scores: list[float] = ray.get(ask.remote(config, store, list(snapshots), list(canaries)))
    return scores


def _ask(config: Config, store: Store, snapshots: Sequence[str], canaries: Sequence[Canary]) -> list[float]:
    # One snapshot after the other: one model in memory at a time.
    return [_mean_f1(config, store, snapshot, canaries) for snapshot in snapshots]


def _mean_f1(config: Config, store: Store, snapshot: str, canaries: Sequence[Canary]) -> float:
    from prag_core.evaluation.metrics import f1
    from prag_core.inference.engine import open_engine
    from prag_core.inference.request import Request

    engine = open_engine(store, config, snapshot)
    answer = config.answer
    answers = engine.answer_batch([Request(c.question, answer.mode, answer.top_k, answer.weights) for c in canaries])
    return sum(f1(a.text, c.answers) for a, c in zip(answers, canaries, strict=True)) / len(canaries)
