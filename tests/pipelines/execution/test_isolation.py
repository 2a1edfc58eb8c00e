"""Passages that kill, hang or starve their worker become rejects, and the other passages are not affected."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from pipelines.execution.attempts import AttemptLog, Attempts
from pipelines.execution.child_process import Child, ChildLostError, Finish, Heartbeat, Limits
from pipelines.execution.isolation import IsolatedWorker, StageRun
from pipelines.execution.outcomes import Outcome, outcome_table
from prag_core.config import RunConfig
from prag_core.config_file import load_config
from prag_core.errors import PragError, StoreError
from prag_core.identity import passage_key
from prag_core.records import Passage, Reject, from_table, to_table
from prag_core.store.objects import Store
from tests.helpers.killing import wait
from tests.helpers.passages import make_passage
from tests.helpers.training import assert_same_adapters, train_here
from tests.helpers.workspace import Workspace, stage

NOTHING = Limits(60.0, 1e12)
LIMITS = RunConfig(passage_attempts=2)


class Obedient:
    """An actor that does what a passage's text says, and records in a folder which passages it got."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        if (folder / "do-not-start").exists():
            os.abort()

    def prepare(self, table: pa.Table) -> list[Passage]:
        return from_table(Passage, table)

    def __call__(self, passages: list[Passage], heartbeat: Heartbeat) -> Iterator[pa.Table | Finish]:
        (self._folder / f"{time.time_ns()}").write_text(" ".join(p.title for p in passages))
        for passage in passages:
            match passage.text:
                case "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exit":
                    os._exit(3)
                case "hang":
                    signal.pause()
                case "crash, and hang from the third time on":
                    if len(self.seen()) < 3:
                        os.abort()
                    (self._folder.parent / "hangs").write_text(str(os.getpid()))
                    signal.pause()
                case "slow":
                    for _ in range(10):
                        time.sleep(0.2)
                        heartbeat(0.0)
                case "starve":
                    hoard = [bytearray(os.urandom(1)) * 100_000_000]
                    while True:
                        hoard.append(bytearray(hoard[0]))
                case "no memory":
                    raise MemoryError
                case "no device memory":
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
                case "bug":
                    raise KeyError("fixed soon")
                case "store away":
                    raise StoreError("the store is away", "wait")
                case "store away when it commits":
                    yield self._store_away
                    signal.pause()
            yield outcome_table([Outcome(passage.key)])

    def _store_away(self) -> pa.Table:
        raise StoreError("the store is away", "wait")

    def seen(self) -> list[list[str]]:
        return [path.read_text().split() for path in sorted(self._folder.iterdir())]


class Relay:
    """An actor whose batches wait for each other: it works on one until the next is prepared, and finishes it once it
    works on the next. Of `count` batches of a passage each the last waits for none, and may fail."""

    def __init__(self, count: int, last_fails: bool = False) -> None:
        self._count = count
        self._last_fails = last_fails
        self._prepared = self._begun = 0
        self._changed = threading.Condition()

    def prepare(self, table: pa.Table) -> Passage:
        (passage,) = from_table(Passage, table)
        with self._changed:
            self._prepared += 1
            self._changed.notify_all()
        return passage

    def __call__(self, passage: Passage, heartbeat: Heartbeat) -> Iterator[pa.Table | Finish]:
        with self._changed:
            self._begun += 1
            self._changed.notify_all()
            order = self._begun
            self._changed.wait_for(lambda: self._prepared > order or order == self._count)
        if self._last_fails and order == self._count:
            raise KeyError("fixed soon")
        yield partial(self._finish, passage, order)

    def _finish(self, passage: Passage, order: int) -> pa.Table:
        with self._changed:
            self._changed.wait_for(lambda: self._begun > order or order == self._count)
        return outcome_table([Outcome(passage.key)])


class CrashesWithTwo:
    """An actor that crashes once it holds two batches, and later on each passage that says so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prepared = threading.Semaphore(0)

    def prepare(self, table: pa.Table) -> Passage:
        (passage,) = from_table(Passage, table)
        self._prepared.release()
        return passage

    def __call__(self, passage: Passage, heartbeat: Heartbeat) -> Iterator[pa.Table]:
        first = not [*self._folder.glob("crash-*")]
        if first:
            self._prepared.acquire()
            self._prepared.acquire()
        if first or passage.text == "crash":
            (self._folder / f"crash-{time.time_ns()}").touch()
            os.abort()
        yield outcome_table([Outcome(passage.key)])


def batch(*texts: str) -> pa.Table:
    passages = [Passage(passage_key(str(i), text), str(i), text, (f"p{i}",)) for i, text in enumerate(texts)]
    return to_table(Passage, passages)


def child(folder: Path) -> Child:
    return Child(pickle.dumps((Obedient, (folder,))), [Obedient.__module__])


def isolated(
    folder: Path, limits: RunConfig = LIMITS, run: str = "run", silence_s: float = 60.0
) -> tuple[IsolatedWorker, Store]:
    store = Store(str(folder / "store"))
    work = pickle.dumps((Obedient, (folder / "seen",)))
    stage_run = StageRun(store, run, "train", "recipe", limits, silence_s)
    return IsolatedWorker(work, [Obedient.__module__], stage_run, _no_limit), store


def _no_limit() -> float:
    return 1e12


def rejects(store: Store, run: str = "") -> dict[str, Reject]:
    parts = [name for name in store.list("rejects", ".parquet") if f"/{run}" in name]
    rows = from_table(Reject, store.get_table(Reject, parts))
    return {row.source: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason", "detail", "limits"),
    [
        ("crash", "killed_worker", "SIGSEGV", NOTHING),
        ("exit", "killed_worker", "exit code 3", NOTHING),
        ("killed", "out_of_memory", "SIGKILL", NOTHING),
        ("hang", "timeout", "no sign of life for 1 s", Limits(1.0, 1e12)),
        ("starve", "out_of_memory", "more than its share of 1.0 GB", Limits(60.0, 1e9)),
        ("no memory", "out_of_memory", "MemoryError", NOTHING),
        ("no device memory", "out_of_memory", "CUBLAS_STATUS_ALLOC_FAILED", NOTHING),
        ("bug", "failed", "KeyError: 'fixed soon'", NOTHING),
    ],
)
def test_a_child_says_how_it_was_lost(tmp_path: Path, text: str, reason: str, detail: str, limits: Limits) -> None:
    one = child(tmp_path / "seen")
    assert [done.num_rows for done in one.call(batch("fine"), limits)] == [1]
    with pytest.raises(ChildLostError) as caught:
        list(one.call(batch(text), limits))
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    assert not caught.value.starting


@pytest.mark.slow
def test_a_batch_is_prepared_and_finished_beside_another_one() -> None:
    table = batch("fine", "fine", "fine", "fine")
    one = Child(pickle.dumps((Relay, (4,))), [Relay.__module__], lanes=2)
    # Without the overlap each batch would wait for the next one for ever.
    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda i: list(one.call(table.slice(i, 1), Limits(30.0, 1e12))), range(4))
        keys = [from_table(Outcome, outcomes[0])[0].key for outcomes in answers]
    assert keys == table["key"].to_pylist()


@pytest.mark.slow
def test_what_is_being_finished_survives_an_error_of_the_next_batch() -> None:
    table = batch("fine", "fine")
    one = Child(pickle.dumps((Relay, (2, True))), [Relay.__module__], lanes=2)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(lambda i=i: list(one.call(table.slice(i, 1), NOTHING))) for i in range(2)]
        failures = [call.exception() for call in calls]
    assert sorted(str(failure) for failure in failures) == ["None", "failed: KeyError: 'fixed soon'"]


def test_attempts_are_stored(store: Store) -> None:
    log, later = (AttemptLog(store, run, "train", "recipe") for run in ("run", "later"))
    log.record_losses({"a": 1, "b": 2})
    log.record_reject("b", 3, "timeout")
    assert log.read(["a", "b", "c"]) == {"a": Attempts(1), "b": Attempts(3, "run", "timeout")}
    # Another run goes on counting, but starts again at zero for what this run gave up.
    assert later.read(["a", "b", "c"]) == {"a": Attempts(1)}
    store.put("runs/attempts/train/recipe/a.json", b"{")
    assert later.read(["a", "b", "c"]) == {}
    log.clear(["a", "b", "c"])
    assert store.list("runs", "") == []


@pytest.mark.slow
def test_a_slow_child_with_heartbeats_is_not_taken_for_one_that_hangs(tmp_path: Path) -> None:
    answers = list(child(tmp_path / "seen").call(batch("slow"), Limits(1.5, 1e12)))
    assert [done.num_rows for done in answers] == [1]


@pytest.mark.slow
def test_a_pipe_that_breaks_is_the_end_of_the_child(tmp_path: Path) -> None:
    one = child(tmp_path / "seen")
    answers = one.call(batch("fine", "hang"), NOTHING)
    assert next(answers).num_rows == 1
    # If a killed process leaves unread data in the pipe, its parent gets an error and not the end of the pipe.
    os.kill(one._process.pid, signal.SIGSTOP)
    one._lanes[0].connection.send_bytes(b"unread")
    one._process.kill()
    with pytest.raises(ChildLostError, match=r"out_of_memory: .*SIGKILL"):
        list(answers)


def test_a_child_that_cannot_be_started_is_reported(tmp_path: Path) -> None:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
    try:
        with pytest.raises(ChildLostError, match=r"cannot be started: .*Too many open files") as caught:
            child(tmp_path / "seen")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    assert caught.value.starting


@pytest.mark.slow
def test_the_culprit_is_found_and_rejected_alone(tmp_path: Path) -> None:
    worker, store = isolated(tmp_path)
    table = batch(*("fine" if i != 3 else "crash" for i in range(20)))
    outcomes = from_table(Outcome, worker(table))
    assert sorted(o.key for o in outcomes) == sorted(table["key"].to_pylist())
    assert [o.rejected for o in outcomes if o.rejected] == ["killed_worker"]
    (reject,) = rejects(store).values()
    assert (reject.source, reject.stage, reject.recipe) == ("p3", "train", "recipe")
    assert "SIGSEGV" in reject.detail
    # Three were done before the culprit. The rest is tried in parts of three, and the culprit's part one by one: there
    # it is alone, in its third worker.
    assert reject.attempts == 3
    given = Obedient(tmp_path / "seen").seen()
    assert [len(names) for names in given] == [20, 3, 1, 1, 1, 3, 3, 3, 3, 2]
    assert given[1:3] == [["3", "4", "5"], ["3"]]


@pytest.mark.slow
def test_a_loss_with_two_batches_charges_neither_and_each_is_tried_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    work = pickle.dumps((CrashesWithTwo, (tmp_path,)))
    stage_run = StageRun(store, "run", "train", "recipe", LIMITS, 60.0)
    worker = IsolatedWorker(work, [CrashesWithTwo.__module__], stage_run, _no_limit, lanes=2)
    table = batch("crash", "fine")
    with ThreadPoolExecutor(2) as threads:
        answers = [*threads.map(lambda i: from_table(Outcome, worker(table.slice(i, 1))), range(2))]
    assert [outcome.rejected for outcomes in answers for outcome in outcomes] == ["killed_worker", ""]
    (reject,) = rejects(store).values()
    # The third worker that it lost: the first loss, with both, was charged to none.
    assert (reject.source, reject.attempts) == ("p0", 2)
    assert len([*tmp_path.glob("crash-*")]) == 3
    assert store.list("runs/attempts", ".json") == [f"runs/attempts/train/recipe/{table['key'][0].as_py()}.json"]


@pytest.mark.slow
def test_a_batch_of_one_passage_gets_all_its_attempts(tmp_path: Path) -> None:
    worker, store = isolated(tmp_path)
    assert from_table(Outcome, worker(batch("bug")))[0].rejected == "failed"
    assert rejects(store)["p0"].attempts == 2
    # The same batch again, as after a lost node, tries nothing. Another run starts again at zero.
    assert from_table(Outcome, worker(batch("bug")))[0].rejected == "failed"
    assert len(Obedient(tmp_path / "seen").seen()) == 2
    later, _ = isolated(tmp_path, RunConfig(passage_attempts=1), run="later")
    assert from_table(Outcome, later(batch("bug")))[0].rejected == "failed"
    assert rejects(store, "later")["p0"].attempts == 1
    assert from_table(Outcome, worker(batch("fine")))[0].rejected == ""
    assert Obedient(tmp_path / "seen").seen() == [["0"]] * 4


def _work_until_killed(folder: Path) -> None:
    worker, _ = isolated(folder, RunConfig(passage_attempts=4), run="killed")
    worker(batch("crash, and hang from the third time on", "fine"))


@pytest.mark.slow
def test_attempts_survive_the_death_of_the_process_that_counts_them(tmp_path: Path) -> None:
    # 1. Two workers are lost, the third one hangs, and the process that counts is killed.
    watcher = multiprocessing.get_context("spawn").Process(target=_work_until_killed, args=(tmp_path,))
    watcher.start()
    wait(lambda: (tmp_path / "hangs").exists() and (tmp_path / "hangs").read_text(), "no third attempt")
    watcher.kill()
    watcher.join()
    hanging = int((tmp_path / "hangs").read_text())
    wait(lambda: not psutil.pid_exists(hanging), "a worker that hangs outlives the process that watches it")
    # 2. The next run tries the passage alone, twice: it has four attempts in all. The other passage is done.
    worker, store = isolated(tmp_path, RunConfig(passage_attempts=4), run="next", silence_s=1.0)
    table = batch("crash, and hang from the third time on", "fine")
    outcomes = {o.key: o.rejected for o in from_table(Outcome, worker(table))}
    assert outcomes == {table["key"][0].as_py(): "timeout", table["key"][1].as_py(): ""}
    assert rejects(store)["p0"].attempts == 4
    assert Obedient(tmp_path / "seen").seen() == [["0", "1"], ["0"], ["0"], ["0"], ["0"], ["1"]]
    # The attempts at the passage that is done are removed.
    assert store.list("runs/attempts", ".json") == [f"runs/attempts/train/recipe/{table['key'][0].as_py()}.json"]


@pytest.mark.slow
def test_an_error_that_the_passage_did_not_cause_is_no_reject(tmp_path: Path) -> None:
    worker, store = isolated(tmp_path)
    with pytest.raises(StoreError, match="the store is away"):
        worker(batch("fine", "store away"))
    assert worker(batch("fine")).num_rows == 1
    assert rejects(store) == {}
    with pytest.raises(StoreError, match="the store is away"):
        worker(batch("fine", "store away when it commits"))
    assert rejects(store) == {}
    assert store.list("runs/attempts", ".json") == []
    # A worker that cannot even start is no passage's fault either.
    (tmp_path / "seen" / "do-not-start").write_text("")
    broken, store = isolated(tmp_path)
    with pytest.raises(PragError, match=r"dies as it starts: killed_worker: .* SIGABRT"):
        broken(batch("fine"))
    assert rejects(store) == {}


# A chat template that starves, hangs or crashes the process that renders it for a text with a certain word. The
# crash: Python 3.11 hashes a tuple by recursion in C, and these tuples are nested too deeply for its stack.
POISON = """\
{% set text = messages[0]['content'] %}{% set ns = namespace(x=('a',), y='abcdefghij') %}
{% if 'Starve' in text %}{% for i in range(99999) %}{% set ns.x = (ns.x, ns.y * 20000000) %}{% endfor %}
{% endif %}
{% if 'Hang' in text %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}
{% if 'Crash' in text %}{% for i in range(99999) %}{% set ns.x = ((((((((ns.x,),),),),),),),) %}{% endfor %}
{% set d = {ns.x: 1} %}{% endif %}
"""


def poison(model: Path) -> None:
    """Change the tiny model of a folder so that a few passages can kill it."""
    import torch
    from safetensors.torch import load_file, save_file

    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    template = model / "chat_template.jinja"
    template.write_text(POISON + template.read_text())
    assert "chat_template" not in tokenizer
    # The embedding of the letter ~ is NaN. The output layer must not share it, or every text would give NaN.
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    token = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def poisonous(number: int, word: str) -> Passage:
    harmless = make_passage(number, words=4)
    text = f"{harmless.text} {word}."
    return Passage(passage_key(harmless.title, text), harmless.title, text, harmless.sources)


@pytest.mark.slow
def test_sixty_passages_four_of_them_poison(tmp_path: Path, ray_here: str) -> None:
    words = {5: "Crash", 20: "Starve", 31: "Hang", 47: "~"}
    passages = [poisonous(n, words[n]) if n in words else make_passage(n, words=4) for n in range(60)]
    chosen = {
        "train.recipe": "paper",  # the text of a passage is in its prompts
        "model.dtype": "float32",
        "storage.adapter_dtype": "float32",
        "storage.shard_mb": 0.1,
        "run.augment_batch": 32,
        "run.tokens_per_step": 8192,
    }
    chosen |= {"run.passage_attempts": 2, "run.passage_timeout_s": 5, "run.worker_memory_gb": 1.5}
    settings = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    work = Workspace(tmp_path, passages)
    poison(tmp_path / "tiny")
    poisoned = json.loads(work.run("run", "-c", "config.yaml", *settings, "--json"))
    assert poisoned["adapters"] == 56
    assert poisoned["rejected"] == {
        "train/killed_worker": 1,
        "train/out_of_memory": 1,
        "train/timeout": 1,
        "train/loss_not_finite": 1,
    }
    assert stage(poisoned, "train")["balanced"]
    store = Store(str(tmp_path / "store"))
    found = rejects(store)
    assert {int(source[1:]): reject.reason for source, reject in found.items()} == {
        5: "killed_worker",
        20: "out_of_memory",
        31: "timeout",
        47: "loss_not_finite",
    }
    # Each was in a whole batch that died, perhaps in a part of it, and at last alone.
    assert all(found[f"p{n}"].attempts in (2, 3) for n in (5, 20, 31))
    assert found["p47"].attempts == 1
    # The others have the adapters that the same actor trains without any loss.
    harmless = [p for p in passages if int(p.sources[0][1:]) not in words]
    overrides = [f"{name}={value}" for name, value in chosen.items()]
    overrides += [f"store={tmp_path / 'clean'}", f"model.name={tmp_path / 'tiny'}"]
    config = load_config(tmp_path / "config.yaml", overrides)
    assert_same_adapters(store, train_here(config, harmless), harmless)
