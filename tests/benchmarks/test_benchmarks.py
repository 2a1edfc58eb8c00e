"""The benchmarks run: once, small, on this machine; what they measure is nobody's test."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prag_core.testing import write_tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *arguments: str, limit_s: float = 300, **environment: str) -> list[str]:
    """Return the lines that a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def last_line(name: str, *arguments: str, limit_s: float = 300, **environment: str) -> dict:
    return json.loads(run(name, *arguments, limit_s=limit_s, **environment)[-1])


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


@pytest.mark.long  # a minute, for code that changes rarely
def test_knowledge(tmp_path: Path, ray_here: str) -> None:
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
    settings += ["--model", f"tiny={tmp_path / 'tiny'}"]
    found = last_line("knowledge.py", "--data", str(data), *settings, RAY_ADDRESS=ray_here)
    assert (found["coverage"]["pairs"], found["coverage"]["questions"]) == (1.0, 0.5)
    assert found["tiny"]["n"] == 2
    assert {"closed", "wrong", "wrong_rag", "prag", "prag3", "rag", "combine", "combine3"} <= set(found["tiny"]["f1"])
    assert found["tiny"]["seconds_a_passage"] > 0
    assert found["tiny"]["tokens"] > 0
    assert {kind: row["n"] for kind, row in found["tiny"]["covered"].items()} == {
        "covered": 1,
        "covered by an added pair": 1,
    }


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    sizes = ["--passages", "1", "--throughput", "1,2", "--repeats", "1", "--pad-to", "800"]
    found = last_line("train.py", "--model", str(tmp_path / "tiny"), *sizes)
    assert found["x_vs_paper"] > 1
    assert set(found["passages_per_s"]) == {"1", "2"}
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


# Python imports this before anything else.
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def bare_machine(folder: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return an environment in which Python, and its children, find these packages with what they require, and ours."""
    present, wanted = set(), list(packages)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in present:
            with contextlib.suppress(PackageNotFoundError):  # needed on another system only
                wanted += [
                    r.name for r in map(Requirement, requires(name) or ()) if not r.marker or r.marker.evaluate()
                ]
                present.add(name)
    ours = {"prag_core", "pipelines", "cluster"}
    absent = [
        module
        for module, owners in packages_distributions().items()
        if module not in ours and not present & set(map(canonicalize_name, owners))
    ]
    assert {"ray", "pyserini", "jnius", "s3fs", "fastapi", "polars"} <= set(absent)
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"ABSENT = frozenset({absent!r})\n{BARE}")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(BENCHMARKS.parent)])}


def numbers(figures: object) -> Iterator[float]:
    if isinstance(figures, dict | list):
        for value in figures.values() if isinstance(figures, dict) else figures:
            yield from numbers(value)
    elif isinstance(figures, int | float):
        yield figures


# What must be in the line of each part, or in each of its rows.
GPU_PARTS = {
    "card": {"bf16_tflop_s", "fp32_tflop_s", "copy_gb_s", "from_host_gb_s", "kernel_us", "launch_us"},
    "trainer": {"dw_fp64", "dw_fp32"},
    "checkpointing": {"dw_fp64", "dw_fp32"},
    "short_memory": {"dw_fp64", "dw_fp32", "stacks"},
    "decoder": {"same_rows", "rows_changed_by_adapters"},
    "child": {"loss_difference", "first_s", "next_s"},
    "training": {"passages_per_s", "peft_passages_per_s", "x_vs_peft", "matrix_rate_share", "padding", "peak_gb"},
    "profile": {"step_s", "steps_share", "busy_share", "shares", "kernels_per_step", "top"},
    "stacks": {"passages_per_s", "tokens_per_s", "peak_gb"},
    "variants": {"passages_per_s", "tokens_per_s", "peak_gb"},
    "decoding": {"step_ms", "tokens_per_s", "peak_gb"},
    "prefill": {"chunk_ms", "tokens_per_s", "peak_gb"},
    "training_8b": {"passages_per_s", "peft_passages_per_s", "x_vs_peft", "matrix_rate_share", "padding", "peak_gb"},
    "decoding_8b": {"step_ms", "tokens_per_s", "peak_gb"},
}
GPU_CHECKS = {"trainer", "checkpointing", "short_memory", "decoder", "child"}


@pytest.mark.slow
def test_gpu_runs_each_part_on_a_bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    wheels = importlib.import_module("gpu").WHEELS
    bare = bare_machine(tmp_path / "site", ["torch", "peft", "pyarrow", *wheels])
    lines = {line.pop("part"): line for line in map(json.loads, run("gpu.py", "--smoke", **bare))}
    assert list(lines) == list(GPU_PARTS)
    for part, line in lines.items():
        assert line.get("ok") is (True if part in GPU_CHECKS else None), line
        rows = [row for row in line.values() if isinstance(row, dict) and part not in GPU_CHECKS | {"card", "profile"}]
        for figures in rows or [line]:
            assert GPU_PARTS[part] <= figures.keys(), (part, figures)
        # Two ways to compute the same may not differ at all.
        least = 0.0 if part in GPU_CHECKS else 1e-9
        assert all(math.isfinite(number) and number >= least for number in numbers(line)), (part, line)
    # Each share is found by the name of a profiler event, which a rename would change.
    assert {"AdamW", "the loss, with its products with the output layer"} < set(lines["profile"]["shares"])
    assert {"1 rows, 0 adapters", "64 rows, 3 adapters"} < set(lines["decoding"])


def gpu_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", *arguments])
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("gpu").main()
    return exit.value.code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_gpu_skips_what_it_has_no_time_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    code, lines = gpu_lines(monkeypatch, capsys, "--minutes", "0", "--parts", "prefill,card")
    assert code == 0
    assert [line["part"] for line in lines] == ["card", "prefill"]
    assert all("needs" in line["skipped"] for line in lines)


def test_gpu_goes_on_after_a_part_or_a_row_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)

    def broken(bench: object) -> dict:
        raise RuntimeError("no kernel image")

    def rows(bench: Any) -> dict:
        return bench.rows({"bad": lambda: broken(bench), "good": lambda: {"ms": 1.23456}}, needs_s=1)

    monkeypatch.setattr(importlib.import_module("gpu"), "PARTS", ((broken, 1), (rows, 1)))
    code, lines = gpu_lines(monkeypatch, capsys)
    assert code == 1
    assert lines[0]["error"] == "RuntimeError: no kernel image"
    assert lines[1]["bad"] == {"error": "RuntimeError: no kernel image"}
    assert lines[1]["good"] == {"ms": 1.235}


def test_a_training_step_makes_no_wait_and_one_copy() -> None:
    found = last_line("plan_gpu.py", "--smoke", "--rows", "4", "--tokens", "16")
    assert set(found["models"]) == {"1b", "1.5b", "8b"}
    for model in found["models"].values():
        assert (model["syncs"], model["copies"], model["end_syncs"]) == (0, 1, 1)
        # Two layers; each of the small operators of a norm or an adapter would be some 60 more.
        assert 0 < model["kernels"] < 300
        assert model["passages_per_s"] > 0


@pytest.mark.long  # half a minute and more, for code that changes rarely
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


@pytest.mark.long  # half a minute and more, for code that changes rarely
def test_scale() -> None:
    found = last_line("scale.py", "--only", "gpu", "--gpu-tasks", "4")
    assert 0 < found["busy_share_at_gpu_pace"] <= 1.05


def test_augment() -> None:
    found = last_line("augment.py", "--smoke", "--slots", "3")
    assert found["slots"] == 3
    assert found["strategy"] == "lines"  # the tiny model has no writer
    assert found["prompts"] == 1
    assert min(found["tokens_per_s"].values()) > 0
    assert min(found["x_vs_generate"], found["x_vs_padded"], found["passages_per_s"]) > 0


@pytest.mark.slow
def test_serve() -> None:
    found = last_line("serve.py", "--smoke")
    assert set(found["latency_ms"]) == {"closed", "rag", "prag", "combine"}
    assert set(found["tok_s"]) == {"1", "4", "16"}
    assert found["x_update"] > 1
    assert isinstance(found["overload_ok"], bool)
    assert list(found["step"]) == [f"{rows} rows, k = {k}" for rows in (1, 16) for k in (0, 3)]
    for parts in found["step"].values():
        assert min(parts.pop("ms"), parts.pop("plain_ms")) > 0
        assert sum(parts.values()) == pytest.approx(1.0, abs=0.02)
    assert min(found["prag_vs_rag"], found["mixed_vs_base"], found["x_concurrency16"], found["rss_mb"]) > 0


@pytest.mark.long  # half a minute and more, for code that changes rarely
def test_retrieval() -> None:
    found = last_line("retrieval.py", "--passages", "500", "--questions", "60")
    assert set(found) == {"in_replica", "own_deployment", "hop_ms", "machine"}
    for way in ("in_replica", "own_deployment"):
        assert min(found[way].values()) > 0, way


# Speaks vLLM's protocol as far as the benchmark asks it: it answers each prompt with as many "x" as tokens are wanted.
FAKE_VLLM = f"""#!{sys.executable} -I
import http.server, json, pathlib, sys
assert sys.argv[1] == "serve"
port = int(sys.argv[sys.argv.index("--port") + 1])
loaded = {{"base"}}

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def answer(self, data, kind="application/json", code=200):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer(b"{{}}")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            config = json.loads((pathlib.Path(body["lora_path"]) / "adapter_config.json").read_text())
            assert config["r"] == 8
            loaded.add(body["lora_name"])
            return self.answer(b"done", "text/plain")
        if body["model"] not in loaded or not all(isinstance(id, int) for id in body["prompt"]):
            return self.answer(b"{{}}", code=404)
        tokens = ["x"] * body["max_tokens"]
        if body.get("stream"):
            events = [b"data: " + json.dumps({{"choices": [{{"text": t}}]}}).encode() + b"\\n\\n" for t in tokens]
            return self.answer(b"".join([*events, b"data: [DONE]\\n\\n"]), "text/event-stream")
        top = [{{"x": -0.25, "y": -1.5}}] * len(tokens)
        choice = {{"token_ids": [5] * len(tokens), "logprobs": {{"tokens": tokens, "top_logprobs": top}}}}
        self.answer(json.dumps({{"choices": [choice]}}).encode())

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.slow
def test_peers(tmp_path: Path) -> None:
    """Against a script in place of vLLM, which no environment with this project can hold."""
    write_tiny_model(tmp_path / "tiny")
    command = tmp_path / "vllm"
    command.write_text(FAKE_VLLM)
    command.chmod(0o755)
    few = ["--adapters", "18", "--users", "1", "2", "--new-tokens", "4", "--rounds", "1", "--answers", "1"]
    found = last_line("peers.py", "--vllm", str(command), "--model", str(tmp_path / "tiny"), *few)
    sides = {"ours", "vllm", "ours_k1", "vllm_k1", "ours_bare", "vllm_bare", "vllm_bare_lora_enabled"}
    assert set(found["tok_s"]) == set(found["ttft_ms"]) == sides
    assert all(rate > 0 for rates in found["tok_s"].values() for rate in rates.values())
    assert found["x_update"] > 0
    # A random model does not write one token four times, and the margins of the script's tokens are known.
    assert found["equal_answers"] == 0.0
    assert set(found["margins_where_they_differ"]) == {1.25}


SOAK_SNAPSHOTS = {"one": (0.0, {1: "bcdf", 2: "ghjk"}), "two": (100.0, {1: "lmnp"})}


@pytest.mark.parametrize(
    ("number", "begun", "snapshot", "says", "passage", "wrong"),
    [
        (1, 10.0, "one", "bcdf", {"fallback": False}, None),
        (1, 110.0, "one", "bcdf", {"fallback": False}, None),  # the replica does not know of the next one yet
        (1, 210.0, "two", "lmnp", {"fallback": False}, None),
        (2, 210.0, "two", "x", None, None),
        (1, 52.0, "one", "x", {"fallback": True}, None),  # the store was away
        (1, 210.0, "two", "bcdf", {"fallback": False}, "'bcdf' from two, not 'lmnp'"),
        (1, 210.0, "one", "bcdf", {"fallback": False}, "110 s after the next snapshot"),
        (1, 10.0, "one", "ghjk", {"fallback": False}, "'ghjk' from one, not 'bcdf'"),
        (1, 10.0, "one", "x", {"fallback": True}, "without its adapter"),
        (2, 210.0, "two", "x", {"fallback": False}, "which does not have the passage"),
        (2, 210.0, "two", "ghjk", None, "which does not have the passage"),
        (1, 210.0, "three", "lmnp", {"fallback": False}, "which nobody published"),
    ],
)
def test_soak_tells_wrong_answers(
    number: int,
    begun: float,
    snapshot: str,
    says: str,
    passage: dict | None,
    wrong: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    soak = importlib.import_module("soak")
    published = {id: soak.Publication(*known) for id, known in SOAK_SNAPSHOTS.items()}
    answer = {"snapshot": snapshot, "answer": says, "passages": [passage] if passage else []}
    found = soak.wrong_answers([soak.Asked(number, begun, begun + 1, answer)], published, [(50.0, 53.0)])
    assert len(found) == (wrong is not None)
    assert wrong is None or wrong in found[0]


@pytest.mark.long  # its load makes tests beside it several times as slow
@pytest.mark.timeout(900)
def test_soak() -> None:
    """Two days with all kills: each promise holds, or the command fails."""
    # A replica grows by a tenth after so short a first day, and hardly from then on.
    found = last_line(
        "soak.py", "--days", "2", "--minutes", "0.5", "--documents", "60", "--memory", "1.25", limit_s=840
    )
    assert min(found["killed"].values()) > 0
    assert set(found["killed"]) == {"worker", "replica", "driver", "s3"}
    assert found["snapshots"] >= 4  # the first, one a night, and that which forgets
    assert found["answers"] > 50
    assert 1 <= found["storage"] <= 1.2
