"""Canary questions: a snapshot must answer some known questions well enough before it is put into service."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import ray

from cluster.resources import Actors
from prag_core.config import Config
from prag_core.data.questions import Question
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import Store


def ask_canaries(
    config: Config, store: Store, snapshots: Sequence[str], canaries: Sequence[Question], actors: Actors
) -> list[float]:
    """Return the mean F1 of each stored snapshot's answers; the configuration's section `answer` says how to answer.

    The questions are asked in a process of their own, because a JVM must not live in the driver, with the resources
    of one of `actors`.
    """
    environment = {"env_vars": index_kind(config.index).PROCESS_ENV}
    ask = ray.remote(_ask).options(num_cpus=actors.cpus, num_gpus=actors.gpus, max_retries=1, runtime_env=environment)
    scores: list[float] = ray.get(ask.remote(config, store, list(snapshots), list(canaries), actors.gpus))
    return scores


def _ask(
    config: Config, store: Store, snapshots: Sequence[str], canaries: Sequence[Question], gpus: float
) -> list[float]:
    # One snapshot after the other: one model in memory at a time.
    return [_mean_f1(config, store, snapshot, canaries, gpus) for snapshot in snapshots]


def _mean_f1(config: Config, store: Store, snapshot: str, canaries: Sequence[Question], gpus: float) -> float:
    from prag_core.evaluation.metrics import f1
    from prag_core.inference.engine import open_engine
    from prag_core.inference.request import Request

    engine = open_engine(store, config, snapshot, gpus=gpus)
    answer = config.answer
    answers = engine.answer_batch([Request(c.question, answer.mode, answer.top_k, answer.weights) for c in canaries])
    return fmean(f1(a.text, c.answers) for a, c in zip(answers, canaries, strict=True))
