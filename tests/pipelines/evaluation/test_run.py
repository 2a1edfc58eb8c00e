"""A whole evaluation on Ray, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines.evaluation.run import check_answered
from pipelines.evaluation.stored import stored_replies
from prag_core.errors import GenerationError
from prag_core.evaluation.plan import EvaluationPlan, EvaluationReply
from prag_core.records import to_table
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot
from tests.helpers.evaluations import replies
from tests.helpers.passages import make_passage
from tests.helpers.published import publish_passages


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(tmp_path: Path, ray_here: str) -> None:
    passages = [make_passage(n) for n in range(12)]
    work = publish_passages(tmp_path, passages)
    # Half of the passages leave the corpus. Their adapters stay in the ledger, and are no controls.
    work.write_corpus(passages[:6])
    work.run("run", "-c", "config.yaml")
    lines = [
        {
            "id": f"q{i}{j}",
            "question": f"What is part {'abcd'[j]} of Quorl {i}?",
            "answers": [f"thing {j}"],
            "passage_id": f"p{i}",
        }
        for i in range(6)
        for j in range(4)
    ]
    lines.append({"id": "elsewhere", "question": "Who?", "answers": ["x"], "passage_id": "p77"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", "-c", "config.yaml", "--dataset", "questions.jsonl", "--top-k", "1", "--seeds", "1"]
    command += [
        "--set",
        "answer.batch_size=8",
        "--set",
        "answer.max_new_tokens=8",
        "--controls",
        "wrong,random,task,da",
    ]

    # 1. Killed as soon as something was answered.
    process = work.start(*command, RAY_ADDRESS=ray_here)
    parts = tmp_path / "store" / "evaluations"
    deadline = time.monotonic() + 240
    while not list(parts.glob("*/replies/*.parquet")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # what its workers were writing when they noticed
    before = replies(tmp_path)
    assert 0 < len(before) < 24 * 10
    tasks = {path: path.stat().st_mtime_ns for path in parts.glob("*/tasks/*.safetensors")}
    assert len(tasks) == 2  # each question has one passage of its own: one of two sets has it not

    # 2. Again: what was answered is kept, the rest is asked once.
    out = work.run(*command)
    after = replies(tmp_path)
    assert [reply for reply in after if reply.id in {r.id for r in before}] == before
    assert len({reply.id for reply in after}) == len(after) == 24 * 10
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*/tasks/*.safetensors")} == tasks
    line = json.loads(out.strip().splitlines()[-1])
    assert line["n"] == 24
    names = ["closed", "rag", "prag", "combine", "wrong", "wrong_rag", "random", "task", "task_rag", "da_rag"]
    assert list(line["f1"]) == names
    made = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert made["dataset"]["left_out"] == {"not_in_corpus": 1}
    assert made["retrieval"]["recall"]["1"] == 1.0
    assert all(column["without_adapter"] == column["failed"] == 0 for column in made["columns"].values())
    assert made["command"].startswith("prag evaluate -c config.yaml")
    assert asdict(EvaluationPlan())["modes"] == tuple(made["plan"]["modes"])
    assert made["columns"]["da_rag"]["prompt_tokens"] > made["columns"]["rag"]["prompt_tokens"]

    # 3. Thresholds of `auto` from the same answers, with times that are the prompts' lengths on any machine.
    store = Store(str(tmp_path / "store"))
    for name in store.list("evaluations", ".parquet"):
        store.remove(name)
    timed = [
        replace(r, fetch_ms=0.0, prompt_ms=0.0, inject_ms=0.0, decode_ms=0.0, prefill_ms=1000.0 * r.prompt_tokens)
        for r in after
    ]
    (folder,) = parts.iterdir()
    store.put_table(f"evaluations/{folder.name}/replies", to_table(EvaluationReply, timed))
    old = load_snapshot(store)
    out = work.run(*command[:-2], "--fit-auto", "--modes", "closed,rag,prag,combine,auto")
    assert replies(tmp_path) == timed  # nothing was asked again
    line = json.loads(out.strip().splitlines()[-1])
    assert line["f1"]["auto"] == line["f1"]["combine"]  # the snapshot had no thresholds
    assert line["delta"]["auto_combine"] == 0.0
    fitted = load_snapshot(store)
    assert asdict(fitted.route) == line["auto"]["route"]
    assert fitted == replace(old, id=fitted.id, created=fitted.created, route=fitted.route)
    assert line["auto"]["n"] == 24
    assert line["auto"]["modes"].keys() == {"closed", "rag", "prag", "combine"}
    assert line["auto"]["modes"]["combine"]["time_share"] == 1.0
    assert f"the snapshot {fitted.id} has them and is in service" in " ".join(out.split())
    assert "auto, cross-validated in 5 folds: 24 questions" in out
    assert "auto, cross-validated, is" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_an_answer_takes_the_place_of_a_failure(tmp_path: Path) -> None:
    rows = [EvaluationReply("a", failed="too long"), EvaluationReply("a", "text"), EvaluationReply("b", failed="x")]
    for name, order in {"one": rows, "other": rows[::-1]}.items():
        store = Store(str(tmp_path / name))
        store.put_table("x/replies", to_table(EvaluationReply, order))
        found = stored_replies(store, "x")
        assert {id: (reply.text, reply.failed) for id, reply in found.items()} == {"a": ("text", ""), "b": ("", "x")}


def test_an_evaluation_without_an_answer_is_none() -> None:
    check_answered([EvaluationReply("a", failed="too long"), EvaluationReply("b", "text")])
    with pytest.raises(GenerationError, match="each of the 2 requests has failed, the first with: too long"):
        check_answered([EvaluationReply("a", failed="too long"), EvaluationReply("b", failed="x")])
