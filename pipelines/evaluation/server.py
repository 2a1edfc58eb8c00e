"""The evaluation of a running server: the same questions and the same report, over its HTTP API.

A request to a server cannot choose adapters or passages, so there are no controls and no oracle.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from rich.console import Console

from pipelines.execution.progress import stage_progress
from prag_core.data.gold import record_id
from prag_core.data.questions import Question
from prag_core.errors import ConfigError, GenerationError
from prag_core.evaluation.plan import Column, EvaluationPlan, EvaluationReply, columns
from prag_core.evaluation.summary import STEPS, Evaluation

_BUSY = (429, 503)
_TRIES = 6


def evaluate_server(
    url: str,
    questions: Sequence[Question],
    plan: EvaluationPlan,
    console: Console,
    *,
    key: str = "",
    max_tokens: int | None = None,
    concurrency: int = 8,
    timeout_s: float = 120.0,
    transport: httpx.BaseTransport | None = None,
) -> Evaluation:
    """Ask a server every question in every mode, k, merge rule and strength of the plan.

    Gold passages are recognized by the ids of the question set. A busy server is asked again, at most six times. A
    question that it refuses counts as failed, with the server's message as the reason.

    `url` is such as `http://127.0.0.1:8000`. `max_tokens` None leaves the server's own setting. `concurrency` questions
    are asked at the same time, and an answer may take `timeout_s`. `transport` replaces the network in tests.

    Raises:
        ConfigError: when the plan has controls or an oracle.
        GenerationError: when the server cannot be reached, refuses the key, or changes its snapshot meanwhile.
    """
    if plan.controls or plan.retrieval != "bm25":
        raise ConfigError("a running server has no controls and no oracle", "leave --url out to evaluate a snapshot")
    wanted = columns(plan)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    todo = [(column, i) for column in wanted for i in range(len(questions))]
    answers: dict[tuple[str, int], dict[str, Any]] = {}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport) as client,
        ThreadPoolExecutor(concurrency) as pool,
        stage_progress(console, "ask", len(todo)) as advance,
    ):

        def ask(item: tuple[Column, int]) -> dict[str, Any]:
            column, i = item
            body: dict[str, Any] = {
                "question": questions[i].question,
                "mode": column.mode,
                "top_k": column.top_k,
                "weights": column.weights,
            }
            # `auto` answers as its server is set: only `combine` has another strength than 1.
            if column.mode == "combine":
                body["strength"] = column.strength
            return _answer(client, body if max_tokens is None else {**body, "max_tokens": max_tokens})

        for (column, i), answer in zip(todo, pool.map(ask, todo), strict=True):
            answers[column.name, i] = answer
            advance(len(answers), 0)
    snapshots = sorted({answer["snapshot"] for answer in answers.values() if "snapshot" in answer})
    if not snapshots:
        said = next((answer["error"] for answer in answers.values()), "there was no question")
        raise GenerationError(f"{url} answered nothing: {said}", "make the server answer one question first")
    if len(snapshots) > 1:
        what = f"answered from the snapshots {', '.join(snapshots)}"
        raise GenerationError(f"{url} {what}", "evaluate again while the server keeps one snapshot")
    found = [_retrieved([answers[c.name, i] for c in wanted], question) for i, question in enumerate(questions)]
    return Evaluation(
        origin={"server": url, "snapshot": {"id": snapshots[0]}},
        plan=plan,
        questions=tuple(questions),
        left_out={},
        columns=tuple(wanted),
        gold=tuple(tuple(gold.id for gold in question.gold if gold.id) for question in questions),
        retrieved=tuple(names for names, _ in found),
        retrieve_ms=tuple(ms for _, ms in found),
        request_ids={c.name: [[_request_id(c.name, i)] for i in range(len(questions))] for c in wanted},
        replies={_request_id(*place): _reply(_request_id(*place), answer) for place, answer in answers.items()},
    )


def _answer(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Return the server's answer, or `{"error": …}` with its message when it refuses the question."""
    for attempt in range(_TRIES):
        try:
            response = client.post("/v1/answer", json=body)
        except httpx.HTTPError as error:
            what = f"{client.base_url}: {type(error).__name__}: {error}"
            raise GenerationError(what, "start the server, or correct --url") from None
        if response.status_code in _BUSY and attempt + 1 < _TRIES:
            time.sleep(min(30.0, _seconds(response.headers.get("Retry-After"), 2.0**attempt)))
            continue
        break
    if response.status_code in (401, 403):
        raise GenerationError(f"{client.base_url} refuses the key", "set PRAG_API_KEY to one that it takes")
    if response.status_code == 404:
        raise GenerationError(f"{client.base_url} has no /v1/answer", "correct --url: it must end before /v1")
    if response.has_redirect_location:
        raise GenerationError(f"{client.base_url} redirects to {response.headers['Location']}", "name that with --url")
    if response.is_success:
        return _read_answer(client, response)
    return {"error": f"{response.status_code}: {response.text[:300]}"}


def _read_answer(client: httpx.Client, response: httpx.Response) -> dict[str, Any]:
    """Return the answer in a response, or `{"error": …}` if it says that there is none.

    Raises:
        GenerationError: when it is not in the form of `/v1/answer`.
    """
    try:
        answered: dict[str, Any] = response.json()
        reply = _reply("", answered)
        _retrieved([answered], Question("", "", ()))
        whole = all(isinstance(text, str) for text in (reply.text, answered["snapshot"], *answered["timings_ms"]))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        whole = False
    if not whole:
        what = f"{client.base_url}/v1/answer gave {response.text[:200]!r}, which is no answer"
        raise GenerationError(what, "correct --url: it must be that of `prag serve`")
    return {"error": "the server gave no reason"} if answered.get("finish") == "error" else answered


def _seconds(text: str | None, default: float) -> float:
    try:
        seconds = float(text or default)
    except ValueError:  # Retry-After may also be a date
        return default
    return seconds if seconds >= 0 else default


def _request_id(column: str, position: int) -> str:
    return f"{column}-{position}"


def _retrieved(answers: Iterable[dict[str, Any]], question: Question) -> tuple[tuple[str, ...], float]:
    """Return the longest list of passages among a question's answers, and the mean time of its searches in ms.

    Gold passages are named by their id in the question set, others by their key.
    """
    gold = {gold.id for gold in question.gold}
    best: tuple[str, ...] = ()
    search_ms: list[float] = []
    for answer in answers:
        passages = answer.get("passages", [])
        if passages:
            search_ms.append(answer["timings_ms"].get("retrieve", 0.0))
        if len(passages) > len(best):
            best = tuple(_name_of(passage, gold) for passage in passages)
    return best, sum(search_ms) / len(search_ms) if search_ms else 0.0


def _name_of(passage: dict[str, Any], gold: set[str]) -> str:
    names = {*passage["ids"], *map(record_id, passage["ids"])}
    key: str = passage["key"]
    return min(names & gold, default=key)


def _reply(id: str, answer: dict[str, Any]) -> EvaluationReply:
    if "error" in answer:
        return EvaluationReply(id, failed=answer["error"])
    ms = {step: answer["timings_ms"].get(step, 0.0) for step in STEPS}
    fallbacks = tuple(f"{p['key']}: fallback" for p in answer["passages"] if p["fallback"])
    return EvaluationReply(
        id=id,
        text=answer["answer"],
        reasoning="",
        prompt_tokens=answer["tokens"]["prompt"],
        new_tokens=answer["tokens"]["new"],
        fetch_ms=ms["fetch"],
        prompt_ms=ms["prompt"],
        inject_ms=ms["inject"],
        prefill_ms=ms["prefill"],
        decode_ms=ms["decode"],
        notes=fallbacks,
    )
