"""The augmenting actor: what it has made is stored as it comes, and a task keeps its requests in flight."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.execution.outcomes import Outcome
from pipelines.settings import make_context
from pipelines.stages.augment import AugmentPassages, augment_task_size
from prag_core.augmentation.filter import is_same_fact
from prag_core.augmentation.formats import write_augmentations
from prag_core.config_file import parse_config
from prag_core.errors import GenerationError
from prag_core.identity import passage_key
from prag_core.records import Augmentation, Passage, QAPair, from_table, to_table
from prag_core.store.objects import Store
from tests.helpers.passages import make_passage

PASSAGES = [make_passage(n) for n in range(40)]


@contextmanager
def endpoint(status: Callable[[int], int]) -> Iterator[tuple[str, list[int]]]:
    """Run a server that answers with one pair; `status` says with which code it answers the nth request."""
    lock, asked, running = threading.Lock(), [0], [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = body["messages"][0]["content"].rpartition("Quorl ")[2].split()[0]
            with lock:
                asked[0] += 1
                code = status(asked[0])
                running.append(running[-1] + 1)
            reply = f"Q: What is Quorl {number}? | A: w{number}x1"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            data = json.dumps({"choices": [choice]} if code == 200 else {"error": {"message": "no"}}).encode()
            with lock:
                running.append(running[-1] - 1)
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def actor(folder: Path, model: Path, url: str, augment: Any = None, **run: Any) -> tuple[AugmentPassages, Store]:
    config = parse_config(
        {
            "store": str(folder / "store"),
            "corpus": {"path": "unused"},
            "model": {"name": str(model)},
            "augment": {
                "generator": "openai",
                "endpoint": {"url": url, "retries": 0},
                "concurrency": 4,
                "pairs": 1,
                "cloze": False,
                **(augment or {}),
            },
            "run": {"augment_batch": 8, **run},
        }
    )
    context = make_context(config, "run")
    return AugmentPassages(context), context.store


def stored(store: Store) -> list[str]:
    rows = store.get_table(Augmentation, store.list("augmentations", ".parquet"))
    return sorted(row.key for row in from_table(Augmentation, rows))


def test_outcomes_come_as_they_are_stored(tmp_path: Path, tiny_model_folder: Path) -> None:
    with endpoint(lambda _: 200) as (url, asked):
        augmenter, store = actor(tmp_path, tiny_model_folder, url)
        beats: list[int] = []
        done: list[str] = []
        for table in augmenter(augmenter.prepare(to_table(Passage, PASSAGES)), lambda share: beats.append(1)):
            outcomes = from_table(Outcome, table)
            done += [outcome.key for outcome in outcomes]
            assert stored(store) == sorted(done), "what is reported is stored"
            assert len(outcomes) >= 8 or len(done) == 40
            assert {(outcome.rejected, outcome.pairs) for outcome in outcomes} == {("", 1)}
    assert sorted(done) == sorted(passage.key for passage in PASSAGES)
    assert asked == [40]
    assert len(beats) == 40
    assert len(store.list("augmentations", ".parquet")) <= 5


def test_what_was_made_before_the_endpoint_failed_is_stored(tmp_path: Path, tiny_model_folder: Path) -> None:
    with endpoint(lambda n: 200 if n <= 20 else 401) as (url, asked):
        augmenter, store = actor(tmp_path, tiny_model_folder, url)
        done: list[str] = []

        def work() -> None:
            for table in augmenter(augmenter.prepare(to_table(Passage, PASSAGES)), lambda share: None):
                done.extend(outcome.key for outcome in from_table(Outcome, table))

        with pytest.raises(GenerationError, match="OPENAI_API_KEY"):
            work()
    assert stored(store) == sorted(done)
    assert 8 <= len(done) <= 20
    assert asked[0] <= 28
    assert store.list("rejects", ".parquet") == []


def test_a_long_pause_is_not_waited_for_a_whole_batch(tmp_path: Path, tiny_model_folder: Path) -> None:
    with endpoint(lambda _: 200) as (url, _):
        augmenter, _ = actor(tmp_path, tiny_model_folder, url, commit_every_s=0)
        tables = list(augmenter(augmenter.prepare(to_table(Passage, PASSAGES[:6])), lambda share: None))
    assert len(tables) >= 2


ROUTE = "The Vellan Canal joins Mora to the port of Sild. It was dug between 1842 and 1849 under Edda Roskvist."


@pytest.mark.slow
def test_the_packaged_writer_completes_imports_whatever_the_base_model_is(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    """The file has one pair about the first passage, and lacks the second one, which is left to a run."""
    passages = [
        Passage(passage_key("Vellan Canal", text), "Vellan Canal", text, (f"p{n}",))
        for n, text in enumerate((ROUTE, f"{ROUTE} It is 31 kilometres long."))
    ]
    own = QAPair("Which port does the Vellan Canal reach?", "Sild", ROUTE)
    given = Augmentation(passages[0].key, (), (own,), "imported", attempts=0)
    file = tmp_path / "made.jsonl"
    write_augmentations(passages[:1], {given.key: given}, file, "jsonl")
    config = parse_config(
        {
            "store": str(tmp_path / "store"),
            "corpus": {"path": "unused"},
            "model": {"name": str(tiny_model_folder)},
            "augment": {"import_file": str(file)},
        }
    )
    context = make_context(config, "run")
    augmenter = AugmentPassages(context, only_imports=True)
    # No passage pays for loading the model with its time.
    assert augmenter._generator is not None
    tables = augmenter(augmenter.prepare(to_table(Passage, passages)), lambda share: None)
    outcomes = {one.key: one for table in tables for one in from_table(Outcome, table)}
    first, second = (outcomes[passage.key] for passage in passages)
    parts = context.store.list("augmentations", ".parquet")
    stored = {one.key: one for one in from_table(Augmentation, context.store.get_table(Augmentation, parts))}
    pairs = stored[passages[0].key].pairs
    assert first.pairs == len(pairs)
    assert pairs[0].answer == "Sild"
    # What the import leaves out is asked about by the writer, before cloze questions are.
    written = [pair for pair in pairs if pair.question.startswith(("Who", "When", "In what", "In which"))]
    assert {pair.answer for pair in written} & {"Edda Roskvist", "1842 and 1849", "1842", "1849"}
    assert sum(is_same_fact(pair.answer, "Sild") for pair in pairs) == 1
    assert (second.rejected, second.pairs) == ("not_imported", 0)


@pytest.mark.parametrize(
    ("settings", "total", "size"),
    [
        ({"generator": "transformers"}, 1_000, 64),
        ({"generator": "openai"}, 100_000, 256),
        ({"generator": "openai", "concurrency": 64}, 100_000, 1024),
        ({"generator": "openai", "concurrency": 64}, 300, 300),
        ({"generator": "openai", "concurrency": 64}, 10, 256),
        ({"generator": "vllm"}, 100_000, 4096),
    ],
)
def test_a_task_holds_several_times_the_requests_in_flight(
    tmp_path: Path, tiny_model_folder: Path, settings: dict[str, Any], total: int, size: int
) -> None:
    model = {"name": str(tiny_model_folder)}
    config = parse_config({"store": str(tmp_path), "corpus": {"path": "x"}, "model": model, "augment": settings})
    assert augment_task_size(total, make_context(config)) == size
