"""Thresholds of `auto` in a real store: stored in a snapshot, kept by what comes after, and followed over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.evaluation.auto import fit_auto, store_route
from prag_core.config import Config
from prag_core.config_file import load_config
from prag_core.data.questions import Question
from prag_core.evaluation.plan import EvaluationPlan, EvaluationReply, columns
from prag_core.evaluation.summary import Evaluation
from prag_core.inference.service import open_service
from prag_core.records import MODES, Route
from prag_core.store.objects import open_store
from prag_core.store.snapshot import Snapshot, current_id, load_snapshot, publish, rollback, with_route
from tests.helpers.command_line import prag
from tests.helpers.live import publish_adapters, write_config
from tests.helpers.passages import make_passage
from tests.pipelines.serving.test_app import Api

PASSAGES = [make_passage(n, words=4) for n in range(6)]
# The time of each mode, and the F1 of its answer where the best passage is clear, and where it is not.
TIMES = {"closed": 10.0, "rag": 30.0, "prag": 12.0, "combine": 31.0}
RIGHT = {"clear": "prag", "unclear": "combine"}


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> Config:
    made = load_config(write_config(tmp_path, tiny_model_folder, str(tmp_path / "store")))
    publish_adapters(made, PASSAGES, seed=0)
    return made


def evaluated(snapshot: Snapshot, scores: dict[str, tuple[float, ...]]) -> Evaluation:
    """Two questions about each passage: one where its score is clearly the best, one where it is not."""
    kinds = [kind for _ in PASSAGES for kind in RIGHT]
    keys = [passage.key for passage in PASSAGES for _ in RIGHT]
    wanted = columns(EvaluationPlan())
    replies = {
        f"{mode}-{i}": EvaluationReply(
            f"{mode}-{i}", "right" if RIGHT[kind] == mode else "wrong", decode_ms=TIMES[mode]
        )
        for mode in MODES
        for i, kind in enumerate(kinds)
    }
    return Evaluation(
        origin={"snapshot": {"id": snapshot.id}},
        plan=EvaluationPlan(),
        questions=tuple(Question(f"q{i}", "Who?", ("right",)) for i in range(len(kinds))),
        left_out={},
        columns=tuple(wanted),
        gold=tuple((key,) for key in keys),
        retrieved=tuple((key, "other") for key in keys),
        retrieve_ms=tuple(0.0 for _ in kinds),
        request_ids={column.name: [[f"{column.name}-{i}"] for i in range(len(kinds))] for column in wanted},
        replies=replies,
        hit_scores=tuple(scores[kind] for kind in kinds),
    )


@pytest.mark.slow
def test_fitted_thresholds_are_followed_over_http(config: Config) -> None:
    store = open_store(config)
    service = open_service(config, store)
    api = Api(service, config)
    question = {"question": "What is Quorl 3?", "mode": "auto"}
    plain = api.post("/v1/answer", question).json()
    assert plain["mode"] == "combine"
    assert plain["why"].endswith("no thresholds were fitted for this snapshot")
    (passage,) = plain["passages"]
    best = passage["score"]

    # 1. Thresholds by which this question is clear.
    old = load_snapshot(store)
    fitted = fit_auto(store, evaluated(old, {"clear": (best, 0.9 * best), "unclear": (best, best)}))
    assert (fitted.auto.f1, fitted.route.otherwise) == (1.0, "combine")
    id, serving = store_route(store, evaluated(old, {"clear": (), "unclear": ()}), replace(fitted.route, prag_next=1.0))
    assert (serving, current_id(store)) == (True, id)
    assert asyncio.run(service.refresh())
    chosen = api.post("/v1/answer", question).json()
    named = api.post("/v1/answer", {**question, "mode": "prag"}).json()
    assert chosen["mode"] == "prag"
    assert chosen["why"].startswith(f"prag: the best passage scores {best:.1f}, ")
    assert named["why"] == ""
    for field in ("answer", "mode", "passages", "snapshot", "tokens"):
        assert chosen[field] == named[field]
    assert chosen["snapshot"] == id

    # 2. Whatever is asked in whichever way.
    (item,) = api.post("/v1/batch", {"requests": [question]}).json()["answers"]
    assert (item["answer"]["mode"], item["answer"]["why"]) == (chosen["mode"], chosen["why"])
    assert "auto" in api.get("/v1/about").json()["modes"]
    base = config.model.name.rpartition("/")[2]
    message = {"role": "user", "content": question["question"]}
    chat = api.post("/v1/chat/completions", {"model": f"{base}:auto", "messages": [message]}).json()
    assert chat["choices"][0]["message"]["content"] == chosen["answer"]
    assert (chat["prag"]["mode"], chat["prag"]["why"]) == (chosen["mode"], chosen["why"])
    nothing = api.post("/v1/answer", {"question": "Xyzzy?", "mode": "auto"}).json()
    assert (nothing["mode"], nothing["passages"]) == ("closed", [])
    counted = api.metrics.text()
    assert 'prag_requests_total{code="ok",mode="auto",route="answer"} 3.0' in counted
    assert 'prag_auto_answers_total{mode="prag"} 3.0' in counted
    assert 'prag_auto_answers_total{mode="combine"} 1.0' in counted
    service.close()

    # 3. The command line.
    folder = Path(config.store).parent
    ended = prag(folder, "ask", "-c", "config.yaml", "--mode", "auto", "--json", question["question"])
    (answer,) = json.loads(ended.out)
    assert (answer["mode"], answer["why"], answer["text"]) == (chosen["mode"], chosen["why"], chosen["answer"])
    ended = prag(folder, "ask", "-c", "config.yaml", "--mode", "auto", question["question"])
    assert "auto chose prag: the best passage scores" in " ".join(ended.out.split())
    shown = prag(folder, "snapshots", "show", "-c", "config.yaml").out
    assert "prag_next 1.0" in shown
    assert "otherwise combine" in shown


def test_only_the_ledger_says_what_has_an_adapter(config: Config) -> None:
    store = open_store(config)
    found = evaluated(load_snapshot(store), {"clear": (9.0, 1.0), "unclear": (9.0, 8.5)})
    assert fit_auto(store, found).chosen["rag"] == 0.0
    unknown = replace(found, retrieved=tuple(("00" * 16, key) for key, _ in found.retrieved))
    # What has no adapter is read. That `rag` is fast here keeps it within the time.
    slow = {
        id: replace(reply, decode_ms=20.0) if id.startswith("rag") else reply for id, reply in found.replies.items()
    }
    assert fit_auto(store, replace(unknown, replies=slow)).chosen["rag"] == 1.0


def test_thresholds_of_a_snapshot_that_is_not_in_service_wait_for_it(config: Config) -> None:
    store = open_store(config)
    old = load_snapshot(store)
    route = Route(closed_below=1.0, prag_score=2.0, prag_next=0.5, otherwise="rag")
    newer = with_route(old, replace(route, otherwise="prag"))
    publish(store, newer)
    found = evaluated(old, {"clear": (9.0, 1.0), "unclear": (9.0, 8.5)})
    id, serving = store_route(store, found, route)
    assert (serving, current_id(store)) == (False, newer.id)
    assert rollback(store, id).route == route
    # The same thresholds again are no new snapshot.
    assert store_route(store, evaluated(load_snapshot(store), {"clear": (), "unclear": ()}), route) == (id, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--modes", "rag,combine"), "--modes lacks closed, prag"),
        (("--retrieval", "oracle"), "needs the scores of a search"),
        (("--url", "http://127.0.0.1:9"), "needs the scores of a search"),
        (("--top-k", "3,1"), "answer.top_k = 1, but the first --top-k is 3"),
        (("--strength", "1"), "answer.combine_strength = 0.5, but the first --strength is 1"),
        (("--weights", "sum"), "answer.weights = score, but the first --weights is sum"),
    ],
)
def test_an_evaluation_that_is_not_as_in_service_is_refused_at_once(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    write_config(tmp_path, tmp_path / "tiny", str(tmp_path / "store"))
    ended = prag(tmp_path, "evaluate", "-c", "config.yaml", "--fit-auto", *arguments)
    assert ended.code != 0
    assert said in " ".join(ended.err.split())
    assert not (tmp_path / "store").exists()
