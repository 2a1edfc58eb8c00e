"""The client of a running server: what it sends, how it reads answers, and what it does when it is turned away."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest
from rich.console import Console

from pipelines.evaluation import server as client
from prag_core.data.questions import Gold, Question
from prag_core.errors import ConfigError, GenerationError
from prag_core.evaluation.plan import EvaluationPlan
from prag_core.evaluation.summary import Evaluation, summarize

QUESTIONS = [
    Question("q1", "Where?", ("Vend",), gold=(Gold(id="p1"),)),
    Question("q2", "Who?", ("Mira",), gold=(Gold(id="p2"),)),
]
PLAN = EvaluationPlan(modes=("closed", "prag"), top_k=(2, 1))


def passage(id: str, key: str, fallback: bool = False) -> dict:
    used = ["prompt"] if fallback else ["weights"]
    return {
        "id": id,
        "ids": [id],
        "key": key,
        "title": "",
        "score": 2.0,
        "used": used,
        "weight": 1.0,
        "fallback": fallback,
    }


def answered(body: dict, snapshot: str = "s1") -> dict:
    passages = [passage("p9", "k9"), passage("p1#1", "k1", fallback=True)][: body["top_k"]]
    return {
        "answer": "Vend" if body["mode"] == "prag" else "",
        "mode": body["mode"],
        "finish": "stop",
        "passages": [] if body["mode"] == "closed" else passages,
        "snapshot": snapshot,
        "timings_ms": {
            "retrieve": 2.0,
            "fetch": 1.0,
            "prompt": 0.5,
            "wait": 9.0,
            "inject": 1.0,
            "prefill": 20.0,
            "decode": 30.0,
        },
        "tokens": {"prompt": 40, "new": 3},
    }


def changed(request: httpx.Request, **fields: object) -> dict:
    return {**answered(json.loads(request.content)), **fields}


def evaluate(handler: Callable[[httpx.Request], httpx.Response], plan: EvaluationPlan = PLAN, **options) -> Evaluation:
    transport = httpx.MockTransport(handler)
    console = Console(quiet=True)
    return client.evaluate_server(
        "http://server", QUESTIONS, plan, console, transport=transport, concurrency=1, **options
    )


def test_what_is_sent_and_what_becomes_of_it() -> None:
    sent = []

    def serve(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, request.headers.get("Authorization"), json.loads(request.content)))
        return httpx.Response(200, json=answered(sent[-1][2]))

    evaluation = evaluate(serve, key="secret", max_tokens=7)
    assert {(path, key) for path, key, _ in sent} == {("/v1/answer", "Bearer secret")}
    where = {"question": "Where?", "weights": "score", "max_tokens": 7}
    asked = [body for _, _, body in sent if body["question"] == "Where?"]
    assert asked == [
        {**where, "mode": "closed", "top_k": 2},
        {**where, "mode": "prag", "top_k": 2},
        {**where, "mode": "prag", "top_k": 1},
    ]
    report = summarize(evaluation, {"name": "x"}, "")
    assert (report["server"], report["snapshot"]) == ("http://server", {"id": "s1"})
    assert {name: column["f1"] for name, column in report["columns"].items()} == {
        "closed": 0.0,
        "prag": 0.5,
        "prag_k1": 0.5,
    }
    assert report["columns"]["prag"]["without_adapter"] == 2
    assert report["columns"]["prag"]["milliseconds"]["total"] == 2.0 + 1.0 + 0.5 + 1.0 + 20.0 + 30.0
    # The second passage is a piece of the record that is gold for the first question.
    assert evaluation.retrieved == (("k9", "p1"), ("k9", "k1"))
    assert report["retrieval"]["recall"] == {"1": 0.0, "2": 0.5, "3": 0.5, "5": 0.5}


def test_auto_is_asked_as_it_is_served() -> None:
    sent = []

    def serve(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=answered(sent[-1]))

    plan = EvaluationPlan(modes=("prag", "combine", "auto"), strengths=(0.5,))
    evaluate(serve, plan=plan)
    # At a server, `auto` may answer with `prag`, whose strength is 1.
    assert {body["mode"]: body.get("strength") for body in sent} == {"prag": None, "combine": 0.5, "auto": None}


def test_a_busy_server_is_asked_again_and_a_refusal_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    replies = iter([httpx.Response(429, headers={"Retry-After": wait}) for wait in ("7", "-5", "nan")])

    def serve(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if (busy := next(replies, None)) is not None:
            return busy
        return (
            httpx.Response(422, text="too long")
            if body["question"] == "Who?"
            else httpx.Response(200, json=answered(body))
        )

    evaluation = evaluate(serve)
    assert waited == [7.0, 2.0, 4.0]
    report = summarize(evaluation, {"name": "x"}, "")
    assert report["columns"]["prag"]["failed"] == 1
    assert evaluation.replies["prag-1"].failed == "422: too long"


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (lambda request: httpx.Response(401), "refuses the key"),
        (lambda request: httpx.Response(404), "has no /v1/answer"),
        (lambda request: httpx.Response(500, text="oh"), "answered nothing: 500: oh"),
        (lambda request: httpx.Response(307, headers={"Location": "http://b/"}), "redirects to http://b/"),
        (lambda request: httpx.Response(200, text="<html>"), "'<html>', which is no answer"),
        (lambda request: httpx.Response(200, json=[]), "no answer"),
        (lambda request: httpx.Response(200, json={"answer": "a", "snapshot": "s"}), "no answer"),
        (lambda request: httpx.Response(200, json=changed(request, answer=None)), "no answer"),
        (lambda request: httpx.Response(200, json=changed(request, passages=None)), "no answer"),
        (lambda request: httpx.Response(200, json=changed(request, answer="", finish="error")), "answered nothing"),
    ],
)
def test_a_server_that_gives_nothing(handler, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        evaluate(handler)


def test_a_server_that_is_not_there() -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(GenerationError, match="ConnectError: refused"):
        evaluate(serve)


def test_answers_of_two_snapshots_are_no_evaluation() -> None:
    names = iter("abababababab")

    def serve(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=answered(json.loads(request.content), next(names)))

    with pytest.raises(GenerationError, match="from the snapshots a, b"):
        evaluate(serve)


def test_a_server_takes_no_controls() -> None:
    with pytest.raises(ConfigError, match="no controls"):
        evaluate(lambda request: httpx.Response(500), EvaluationPlan(controls=("wrong",)))
