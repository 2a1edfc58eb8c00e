"""Compare retrieval in the replica with retrieval in a separate deployment: `python benchmarks/retrieval.py`.

Lucene indexes made-up passages of a hundred words. Ray Serve deploys the same search twice: in the replica that
answers, as `prag serve` does it, and as a separate deployment that the replica calls through its handle. One process
asks both through a handle, first one question at a time, then sixteen at once. The second way adds a hop: one more
message, with the passages serialized and read again. The last line is JSON: the median milliseconds a question,
questions a second, and the peak memory of the replica's process, which holds the Java machine only if it searches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import machine, peak_mb
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.session import ray_session
from pipelines.settings import profile_of
from prag_core.config import IndexConfig
from prag_core.config_file import parse_config
from prag_core.identity import passage_key
from prag_core.inference.threads import SearchThread
from prag_core.records import Hit, Passage
from prag_core.retrieval.jvm import JVM_ENV
from prag_core.retrieval.lucene import LuceneRetriever, build_index

TOP_K = 3
USERS = 16
WORDS = 100
QUESTION_WORDS = 10
WARM_UP = 50


@serve.deployment
class Searches:
    """A deployment that searches in its own process."""

    def __init__(self, index: str) -> None:
        self._retriever = LuceneRetriever(Path(index), IndexConfig())
        self._thread = SearchThread()

    async def ask(self, question: str) -> list[Hit]:
        """Search as a replica of `prag serve` does: in one thread, beside the event loop."""
        return await asyncio.wrap_future(self._thread.submit(self._retriever.search, question, TOP_K))

    async def peak_mb(self) -> float:
        """Return the most memory that this process had."""
        return peak_mb()


@serve.deployment
class Passes:
    """A deployment that calls another one to search."""

    def __init__(self, searches: DeploymentHandle) -> None:
        self._searches = searches

    async def ask(self, question: str) -> list[Hit]:
        """Search through the handle."""
        hits: list[Hit] = await self._searches.ask.remote(question)
        return hits

    async def peak_mb(self) -> float:
        """Return the most memory that this process had."""
        return peak_mb()


def made_up(count: int) -> Iterator[Passage]:
    """Return made-up passages whose words follow Zipf's law, as in real texts."""
    draw = random.Random(0)
    for n in range(count):
        text = " ".join(f"w{int(draw.paretovariate(1))}" for _ in range(WORDS))
        yield Passage(passage_key(f"Row {n}", text), f"Row {n}", text, (f"p{n}",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument(
        "--questions", type=int, default=1000, help="questions for each way, one at a time and many at once"
    )
    arguments = parser.parse_args()
    print(machine())
    profile = profile_of(parse_config({"store": "none", "corpus": {"path": "none"}}))
    options = {"num_cpus": 0, "runtime_env": {"env_vars": JVM_ENV}}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prag-retrieval-") as scratch, ray_session(profile):
        index = str(Path(scratch, "lucene"))
        build_index(made_up(arguments.passages), Path(index), IndexConfig())
        draw = random.Random(1)
        words = [passage.text.split() for passage in made_up(min(arguments.passages, arguments.questions))]
        questions = [" ".join(draw.sample(draw.choice(words), QUESTION_WORDS)) for _ in range(arguments.questions)]
        limits: dict[str, Any] = {"ray_actor_options": options, "max_ongoing_requests": 4 * USERS}
        searches = Searches.options(**limits)  # type: ignore[attr-defined]
        passes = Passes.options(**limits)  # type: ignore[attr-defined]
        applications = {
            "in_replica": searches.bind(index),
            "own_deployment": passes.bind(searches.bind(index)),
        }
        handles = {
            name: serve.run(application, name=name, route_prefix=None) for name, application in applications.items()
        }
        for name, handle in handles.items():
            found[name] = asyncio.run(measure(handle, questions))
            print(f"{name}: {found[name]}", flush=True)
        serve.shutdown()
    found["hop_ms"] = round(found["own_deployment"]["ms_1"] - found["in_replica"]["ms_1"], 2)
    print(json.dumps({**found, "machine": machine()}))


async def measure(handle: DeploymentHandle, questions: list[str]) -> dict[str, float]:
    """Ask all questions one after the other, then again with sixteen users at once; return the times."""
    for question in questions[:WARM_UP]:
        await handle.ask.remote(question)
    took = {}
    for users in (1, USERS):
        waiting = iter(questions)
        seconds: list[float] = []

        async def user(waiting: Iterator[str], seconds: list[float]) -> None:
            for question in waiting:
                begun = time.perf_counter()
                await handle.ask.remote(question)
                seconds.append(time.perf_counter() - begun)

        begun = time.perf_counter()
        await asyncio.gather(*(user(waiting, seconds) for _ in range(users)))
        took[f"ms_{users}"] = round(1e3 * statistics.median(seconds), 2)
        took[f"per_s_{users}"] = round(len(questions) / (time.perf_counter() - begun), 1)
    return {**took, "rss_mb": round(await handle.peak_mb.remote())}


if __name__ == "__main__":
    main()
