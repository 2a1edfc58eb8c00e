"""Compare the service with the bare model, `rag`, and the paper's way: `python benchmarks/serve.py`.

The corpus is 256 invented passages of a hundred words. Each has an adapter of the recipe's shape with random factors,
since only time is measured. The shard writer stores them on a real S3 server of this machine, and Lucene indexes the
passages. A question names three passages, drawn by Zipf's law. All answers have the same number of tokens.

1. One user: the latency of each mode with warm caches, and the time to inject adapters and to fetch them cold.
2. The paper's way on the same model: three PEFT adapters loaded, merged by `add_weighted_adapter` (cat), removed.
3. 1, 4 and 16 users at once: tokens a second, and the same with the bare model.
4. Ten times as many users as slots: the latency of accepted requests, and whether the others are refused.
5. A decoding step by its parts, with 1 and 16 rows, without and with adapters (`benchmarks/decode_step.py`).

The last line is JSON. `prag serve` and `prag ask` answer by the same code, but HTTP and Ray are not measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_step import step_parts
from measure import machine, peak_mb
from peft import PeftModel

from prag_core.config import Config, augment_recipe, train_recipe
from prag_core.config_file import parse_config
from prag_core.errors import OverloadedError
from prag_core.identity import fingerprint, passage_key
from prag_core.inference.adapter_cache import AdapterCache
from prag_core.inference.loaded_snapshot import open_snapshot
from prag_core.inference.request import Request
from prag_core.inference.service import Service
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, TrainedAdapter, find_targets, flatten_adapter
from prag_core.llm.peft import export_peft, peft_base
from prag_core.llm.threads import compute_elsewhere, compute_here
from prag_core.recipe import Recipe
from prag_core.records import MODES, Answer, Mode, Passage
from prag_core.retrieval.archive import archive_index
from prag_core.retrieval.lucene import build_index
from prag_core.store.adapters import AdapterStore
from prag_core.store.objects import open_store
from prag_core.store.snapshot import Snapshot, created_now, current_id, load_snapshot, publish
from prag_core.testing import write_tiny_model

ROOT = Path(__file__).parent.parent
K = 3
WORDS = 100
SHARD_ROWS = 64
# Small enough that the adapted model still generates text.
FACTOR_STD = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of an answer, to measure latency")
    parser.add_argument("--rate-tokens", type=int, default=32, help="tokens of an answer, to measure tokens/s")
    parser.add_argument("--questions", type=int, default=8, help="questions of one user for each mode")
    parser.add_argument("--rounds", type=int, default=3, help="answers for each of several users at once")
    parser.add_argument("--smoke", action="store_true", help="a short run with few adapters and a tiny random model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PRAG_CACHE"] = scratch if arguments.smoke else os.environ.get("PRAG_CACHE", "")
        print(json.dumps(measure(arguments, Path(scratch))))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sys.path.append(str(ROOT))
    from tests.helpers.s3 import S3Server

    model: dict[str, str] = {}
    if arguments.smoke:
        arguments.adapters, arguments.questions, arguments.rounds = 12, 2, 1
        model = {"name": str(write_tiny_model(folder / "tiny")), "dtype": "float32"}
    with S3Server(folder / "s3", "prag-bench", secrets.token_hex(16)) as server:
        os.environ.update(server.environment)
        config = parse_config(
            {
                "store": f"s3://{server.bucket}/serve",
                "corpus": {"path": "none.jsonl"},
                "model": model,
                "augment": {"generator": "none"},
                "answer": {"max_new_tokens": arguments.new_tokens},
                "train": {"recipe": "recall"},
            }
        )
        compute_elsewhere()  # the service's decoding thread is the one that computes
        base = load_base_model(config.model)
        dtype = str(base.model.dtype).removeprefix("torch.")
        print(f"{machine(base.device)}, {dtype}")
        print(f"{arguments.adapters} adapters; answers of {arguments.new_tokens} and {arguments.rate_tokens} tokens")
        samples, layout = publish_all(base, config, arguments.adapters, folder)
        bench = Bench(base, config, arguments)
        try:
            result = asyncio.run(bench.run())
        finally:
            bench.service.close()
        compute_here()  # now it is this thread, on all cores
        flat = [flatten_adapter(layout, factors, dtype=base.model.dtype) for factors in samples]
        result["step"] = step_parts(base, train_recipe(config.train), flat)
        paper_ms = paper_update_ms(base, layout, samples, folder)
    update_ms = result["inject_ms_warm"] + result["fetch_ms_cold"]
    result["paper_update_ms"] = round(paper_ms, 1)
    result["x_update"] = round(paper_ms / update_ms, 1)
    result["rss_mb"] = round(peak_mb())
    result["machine"] = f"{machine(base.device)}, {dtype}"
    print(f"the paper's update: {paper_ms:.0f} ms; ours: {update_ms:.1f} ms")
    return result


def publish_all(base: BaseModel, config: Config, count: int, folder: Path) -> tuple[list[Factors], LoraLayout]:
    """Store and publish passages with random adapters; return three of these."""
    store = open_store(config)
    train = train_recipe(config.train)
    recipe = Recipe(base.fingerprint, augment_recipe(config.augment, "none", train), train)
    layout, _ = find_targets(base.model, train)
    adapters = AdapterStore(store, recipe, layout, config.storage.adapter_dtype)
    adapters.describe()
    generator = torch.Generator().manual_seed(0)
    passages = make_passages(count)
    samples: list[Factors] = []
    for begin in range(0, count, SHARD_ROWS):
        chosen = []
        for passage in passages[begin : begin + SHARD_ROWS]:
            factors = {
                name: FACTOR_STD * torch.randn(shape, generator=generator)
                for name, shape in layout.tensor_shapes.items()
            }
            samples += [factors] * (len(samples) < K)
            chosen.append((TrainedAdapter(passage.key, factors, 1, 1, 1.0, 1.0, 1.0), "random"))
        adapters.commit(chosen)
    build_index(passages, folder / "lucene", config.index)
    # A machine keeps unpacked indexes by the version of their corpus.
    version = fingerprint([passage.key for passage in passages])
    index = archive_index(folder / "lucene", store, version, count, config.index)
    publish(
        store,
        created_now(
            Snapshot(
                corpus_version=version,
                index=index.id,
                recipe=recipe.fingerprint,
                base_model=base.fingerprint,
                ledger_parts=tuple(adapters.ledger_parts()),
                passages=count,
                adapters=count,
            )
        ),
    )
    return samples, layout


def make_passages(count: int) -> list[Passage]:
    """Return passages of a hundred words each, cut from the example corpus, with new titles."""
    lines = (ROOT / "pipelines" / "examples" / "atlas" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    passages = []
    for n in range(count):
        begin = 17 * n % (len(words) - WORDS)
        text = " ".join(words[begin : begin + WORDS])
        passages.append(Passage(passage_key(name_of(n), text), name_of(n), text, (str(n),)))
    return passages


def name_of(number: int) -> str:
    return f"Zorvan{number}"


class Bench:
    """Measures a service whose users ask about passages in Zipf's proportions."""

    def __init__(self, base: BaseModel, config: Config, arguments: argparse.Namespace) -> None:
        self.base, self.config, self.arguments = base, config, arguments
        self.random = random.Random(0)
        self.popularity = [1 / (rank + 1) for rank in range(arguments.adapters)]
        settings = config.serve
        # No disk cache, so that cold adapters come from S3.
        self.cache = AdapterCache(
            settings.cache_bytes,
            dtype=base.model.dtype,
            page_locked=base.device.type == "cuda",
            threads=settings.fetch_threads,
        )
        store = open_store(config)
        self.opened = open_snapshot(base, config, store, load_snapshot(store))
        self.service = Service(base, lambda id: self.opened, lambda: current_id(store), self.cache, settings)

    def question(self, mode: Mode, numbers: Sequence[int] | None = None) -> Request:
        chosen = list(numbers or [])
        while len(chosen) < K:
            drawn = self.random.choices(range(self.arguments.adapters), self.popularity)[0]
            chosen += [drawn] * (drawn not in chosen)
        names = ", ".join(name_of(n) for n in chosen)
        return Request(f"What do the texts say about {names}?", mode, K, ignore_eos=True)

    async def run(self) -> dict[str, Any]:
        slots = self.config.serve.slots
        # 1. Cold: three adapters that nobody asked for before, with each question.
        cold = []
        for first in range(0, min(self.arguments.adapters - K, 150), K):
            answer = await self.service.answer(self.question("prag", range(first, first + K)))
            expect(answer, in_weights=K)
            cold.append(answer.milliseconds["fetch"])
        for first in range(0, self.arguments.adapters - K + 1, K):  # warm the other adapters up without decoding
            keys = [hit.passage.key for n in range(first, first + K) for hit in self.hits(n)]
            lease = self.cache.lease(self.opened.source, keys)
            await asyncio.wait([asyncio.wrap_future(future) for future in lease.futures])
            lease.release()
        # 2. One user, the modes in turns.
        alone: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        inject = []
        for _ in range(self.arguments.questions):
            request = self.question("prag")
            for mode in MODES:
                begun = time.perf_counter()
                answer = await self.service.answer(Request(request.question, mode, K, ignore_eos=True))
                alone[mode].append((time.perf_counter() - begun) * 1e3)
                expect(answer, in_weights=K * (mode in ("prag", "combine")))
                if mode == "prag":
                    inject.append(answer.milliseconds["inject"])
        latency = {mode: round(statistics.median(alone[mode])) for mode in MODES}
        print(f"one user, ms: {latency}")
        cold_p95 = float(np.quantile(cold, 0.95))
        print(
            f"ms: inject {statistics.median(inject):.2f}, fetch cold {statistics.median(cold):.1f}, at the 95th "
            f"percentile of {len(cold)} {cold_p95:.1f}"
        )
        # 3. Several users at once. The bare model is measured between the two runs of the mixed batch.
        rates = {users: await self.rate(users, "prag") for users in (1, 4)}
        mixed, bare = [], []
        for _ in range(2):
            mixed.append(await self.rate(slots, "prag"))
            bare.append(await self.rate(slots, "closed"))
        rates[slots] = statistics.mean(mixed)
        print(f"tokens/s: {rates}; bare model with {slots} users {statistics.mean(bare):.1f}")
        # 4. Overload.
        full = await self.latencies(slots, self.arguments.rounds)
        accepted, refused = await self.overload(10 * slots, max(full))
        print(
            f"{slots} users: median {statistics.median(full):.2f} s; {10 * slots} users: {len(accepted)} answers, "
            f"median {statistics.median(accepted):.2f} s, slowest {max(accepted):.2f} s; {refused} turned away"
        )
        decode = {mode: await self.decode_ms(mode) for mode in ("closed", "prag")}
        print(f"one decoding step of {slots} rows, ms: {decode}")
        return {
            "latency_ms": latency,
            "prag_vs_rag": round(latency["prag"] / latency["rag"], 3),
            "inject_ms_warm": round(statistics.median(inject), 2),
            "fetch_ms_cold": round(statistics.median(cold), 2),
            "fetch_ms_cold_p95": round(cold_p95, 2),
            "tok_s": {str(users): round(rate, 1) for users, rate in rates.items()},
            "x_concurrency16": round(rates[slots] / rates[1], 2),
            "mixed_vs_base": round(statistics.mean(mixed) / statistics.mean(bare), 3),
            "mixed_vs_base_step": round(decode["closed"] / decode["prag"], 3),
            "overload_ok": refused > 0 and statistics.median(accepted) <= 2 * statistics.median(full),
            "overload_x_latency": round(statistics.median(accepted) / statistics.median(full), 2),
        }

    def hits(self, number: int) -> Sequence[Any]:
        return self.opened.processor.search(Request(name_of(number), "prag", 1)).hits

    async def rate(self, users: int, mode: Mode) -> float:
        """Return the tokens a second for this number of users, who each ask again when they have an answer."""
        begun = time.perf_counter()
        rounds = self.arguments.rounds * (2 if users == 1 else 1)
        await self.latencies(users, rounds, mode, self.arguments.rate_tokens)
        return users * rounds * self.arguments.rate_tokens / (time.perf_counter() - begun)

    async def latencies(
        self, users: int, rounds: int, mode: Mode = "prag", new_tokens: int | None = None
    ) -> list[float]:
        async def user() -> list[float]:
            seconds = []
            for _ in range(rounds):
                begun = time.perf_counter()
                answer = await self.service.answer(replace(self.question(mode), max_new_tokens=new_tokens))
                expect(answer, in_weights=K * (mode == "prag"))
                seconds.append(time.perf_counter() - begun)
            return seconds

        return [second for seconds in await asyncio.gather(*(user() for _ in range(users))) for second in seconds]

    async def overload(self, users: int, round_s: float) -> tuple[list[float], int]:
        """Let many users ask again and again, even when they are refused; return the latencies of the accepted."""
        end = time.perf_counter() + 4 * round_s
        accepted: list[float] = []
        refused = 0

        async def user() -> None:
            nonlocal refused
            while (begun := time.perf_counter()) < end:
                try:
                    await self.service.answer(self.question("prag"))
                    accepted.append(time.perf_counter() - begun)
                except OverloadedError:
                    refused += 1
                    await asyncio.sleep(round_s / 10)  # so that ten times as many requests come as can be served

        await asyncio.gather(*(user() for _ in range(users)))
        return accepted, refused

    async def decode_ms(self, mode: Mode) -> float:
        """Return the milliseconds of one decoding step with all slots in use and no prompt to read."""
        before = self.service.stats().steps
        requests = [
            Request(self.question(mode).question, mode, K, max_new_tokens=40, ignore_eos=True)
            for _ in range(self.config.serve.slots)
        ]
        seconds: list[float] = []

        async def watch() -> None:
            last = before
            while True:
                stats = self.service.stats()
                # The last steps have fewer rows, and the first ones read prompts.
                if stats.running == len(requests) and stats.waiting == 0 and stats.steps != last:
                    seconds.append(stats.step_s)
                    last = stats.steps
                await asyncio.sleep(0.002)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*map(self.service.answer, requests))
        watching.cancel()
        return round(statistics.median(seconds) * 1e3, 2)


def expect(answer: Answer, in_weights: int) -> None:
    found = sum(passage.in_weights for passage in answer.passages)
    if found != in_weights:
        raise RuntimeError(f"{answer.mode}: {found} passages in the weights, not {in_weights}: {answer.passages}")


def paper_update_ms(base: BaseModel, layout: LoraLayout, samples: Sequence[Factors], folder: Path) -> float:
    """Return the median milliseconds to change PEFT's model for one question and back, without generating."""
    for n, factors in enumerate(samples):
        export_peft(layout, factors, folder / f"peft{n}", peft_base(base.name))
    tokens = torch.tensor([[1, 2, 3]])

    def once() -> float:
        spent = math.fsum(seconds for seconds in update())
        return spent * 1e3

    def update() -> list[float]:
        begun = time.perf_counter()
        names = [f"a{n}" for n in range(K)]
        model = PeftModel.from_pretrained(base.model, str(folder / "peft0"), adapter_name=names[0])
        for n in range(1, K):
            model.load_adapter(str(folder / f"peft{n}"), adapter_name=names[n])
        model.add_weighted_adapter(names, [1.0] * K, "sum", combination_type="cat")
        model.set_adapter("sum")
        before = time.perf_counter() - begun
        with torch.inference_mode():
            model(input_ids=tokens)  # stands for generating, and is not counted
        begun = time.perf_counter()
        model.delete_adapter("sum")
        for name in names:
            model.delete_adapter(name)
        model.unload()
        return [before, time.perf_counter() - begun]

    return median_of(once, 5)


def median_of(run: Callable[[], float], times: int) -> float:
    run()
    return statistics.median(run() for _ in range(times))


if __name__ == "__main__":
    main()
