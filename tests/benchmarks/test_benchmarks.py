"""The benchmarks run: once, small, on this machine; what they measure is nobody's test."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prag_core.testing import write_tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def last_line(name: str, *arguments: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_quality_draws_questions_and_their_gold_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("squad", "popqa"):
        rows = [
            {"id": f"{name}{n}", "question": f"{n}?", "answers": ["x"], "gold_ids": [f"{name}-p{n}"]} for n in range(9)
        ]
        (tmp_path / f"questions_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = ["other", *(f"{name}-p{n}" for name in ("squad", "popqa") for n in range(9))]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"id": id, "text": f"text of {id}"}) + "\n" for id in ids)
    drawn = importlib.import_module("quality").draw(tmp_path, 4, tmp_path)
    questions, corpus = ([json.loads(line) for line in path.read_text().splitlines()] for path in drawn)
    assert [row["type"] for row in questions] == ["squad"] * 4 + ["popqa"] * 4
    assert len({row["id"] for row in questions}) == 8
    assert {row["id"] for row in corpus} == {id for row in questions for id in row["gold_ids"]}


@pytest.mark.slow
def test_knowledge(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    data = tmp_path / "data"
    data.mkdir()
    texts = [f"Hill {n} lies in Vend. It is {n}00 metres high." for n in range(4)]
    replies = [f"Q: How high is Hill {n}? | A: {n}00 metres\nQ: Where does it lie? | A: the moon" for n in range(4)]
    rows = [
        {"id": f"p{n}", "title": f"Hill {n}", "text": texts[n], "rewrite": texts[n], "qa_raw": [replies[n]]}
        for n in range(4)
    ]
    (data / "augmentations_qwen15.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [
        {
            "id": "a",
            "question": "What height has Hill 1?",
            "answers": ["100 metres"],
            "gold_ids": ["p1"],
            "set": "squad",
        },
        {"id": "b", "question": "Where is Hill 2?", "answers": ["Vend"], "gold_ids": ["p2"], "set": "squad"},
        {"id": "c", "question": "Where is Hill 3?", "answers": ["Vend"], "gold_ids": ["p3"], "set": "hotpotqa"},
    ]
    (data / "augmented_questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    settings = ["--half", "all", "--controls", "wrong", "--seeds", "1", "--work", str(tmp_path / "work")]
    found = last_line("knowledge.py", "--data", str(data), "--model", f"tiny={tmp_path / 'tiny'}", *settings)
    assert (found["coverage"]["pairs"], found["coverage"]["questions"]) == (1.0, 0.5)
    assert found["tiny"]["n"] == 2
    assert {"closed", "wrong", "wrong_rag", "prag", "prag3", "rag", "combine", "combine3"} <= set(found["tiny"]["f1"])
    assert found["tiny"]["seconds_a_passage"] > 0
    assert found["tiny"]["tokens"] > 0
    assert {kind: row["n"] for kind, row in found["tiny"]["covered"].items()} == {"covered": 1, "not covered": 1}


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    sizes = ["--passages", "2", "--throughput", "2,4", "--repeats", "1", "--pad-to", "1500"]
    found = last_line("train.py", "--model", str(tmp_path / "tiny"), *sizes)
    assert found["x_vs_paper"] > 1
    assert set(found["passages_per_s"]) == {"2", "4"}
    assert 0 <= found["padding"] < 0.5
    assert 0 < found["gemm_share_fp32"] < 1
    # Each part is found by the name of a profiler event, which a rename would change.
    named = ("AdamW", "attention", "products with the adapters' factors", "products with the layers' frozen weights")
    assert {*named, "the loss, with its products with the output layer"} < set(found["time_shares"])


@pytest.mark.slow
def test_precision(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    found = last_line("precision.py", "--model", str(tmp_path / "tiny"), "--passages", "2")
    assert 0 < found["dw_median"] <= found["dw_worst"]
    assert set(found["f1"]) == {"fp32", "bf16"}


@pytest.mark.slow
def test_train_gpu_on_the_cpu() -> None:
    sizes = ["--passages", "4", "--peft-passages", "1", "--repeats", "1", "--tokens-per-step", "2048"]
    found = last_line("train_gpu.py", "--smoke", *sizes)
    assert found["passages_per_s"] > 0
    assert found["in_flight"] == 4


def test_a_training_step_makes_no_wait_and_one_copy() -> None:
    found = last_line("plan_gpu.py", "--smoke", "--rows", "4", "--tokens", "16")
    assert set(found["models"]) == {"1b", "1.5b", "8b"}
    for model in found["models"].values():
        assert (model["syncs"], model["copies"], model["end_syncs"]) == (0, 1, 1)
        # Two layers; each of the small operators of a norm or an adapter would be some 60 more.
        assert 0 < model["kernels"] < 300
        assert model["passages_per_s"] > 0


@pytest.mark.slow
def test_store(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    sizes = ["--adapters", "6", "--trained", "2", "--fetches", "5", "--rows", "20500", "--missing", "600"]
    found = last_line("store.py", "--model", str(tmp_path / "tiny"), *sizes)
    assert found["bytes_per_adapter"]["fp32"] > found["bytes_per_adapter"]["bf16"] > found["bytes_per_adapter"]["int8"]
    assert 0 < found["int8_dw_error"] < 0.02
    assert 0 < found["fetch_ms"]["s3_p50"] <= found["fetch_ms"]["s3_p95"]
    assert set(found) == {
        *("bytes_per_adapter", "int8_dw_error", "fetch_ms", "peft_dir_fetch_ms", "put_mb_s", "verify_mb_s"),
        *("open_1m_s", "open_1m_mb", "plan_1m_s", "plan_1m_driver_mb", "machine"),
    }


def test_augment() -> None:
    found = last_line("augment.py", "--smoke", "--slots", "3")
    assert set(found) == {"x_vs_generate", "tokens_per_s", "prompts", "slots", "dtype", "machine"}
    assert found["slots"] == 3
    assert found["prompts"] == 2  # a rewrite and the pairs of one passage
    assert found["tokens_per_s"]["ours"] > 0 < found["tokens_per_s"]["generate"]


@pytest.mark.slow
def test_serve() -> None:
    found = last_line("serve.py", "--smoke")
    assert set(found["latency_ms"]) == {"closed", "rag", "prag", "combine"}
    assert set(found["tok_s"]) == {"1", "4", "16"}
    assert found["x_update"] > 1
    assert isinstance(found["overload_ok"], bool)
    assert min(found["prag_vs_rag"], found["mixed_vs_base"], found["x_concurrency16"], found["rss_mb"]) > 0


@pytest.mark.slow
def test_retrieval() -> None:
    found = last_line("retrieval.py", "--passages", "500", "--questions", "60")
    assert set(found) == {"in_replica", "own_deployment", "hop_ms", "machine"}
    for way in ("in_replica", "own_deployment"):
        assert min(found[way].values()) > 0, way
