"""Measure the pipeline's own cost, with work that only takes time: `python benchmarks/scale.py`.

1. Rates: a trainer sleeps 0.2 s a passage in the real training stage: survey, joins, batches, child processes,
   tokenizing (the example corpus, over and over), the trainer's checks, shards with adapters of the small model's
   size, ledger. It runs on 1, 2, 4 and 8 actors. The rate is measured between the first and the last outcome, because
   starting workers on two cores takes as long as a short run. The time before the first outcome is printed too.
2. The same at a GPU's pace: 18 ms a passage on one actor, in tasks of as many passages as fill a shard of
   Llama-3.2-1B's adapters. `busy_share_at_gpu_pace` is the share of the time in which the GPU would compute.
3. Planning (corpus files to a survey of what is missing) of 10,000, 100,000 and a million made-up rows, each in its
   own process: seconds, the driver's memory, and the bytes that go through shuffles.
4. The survey of a million passages that are almost all done, with which every resumed run begins.
5. The Lucene index of a hundred thousand made-up passages of a hundred words, from the stored corpus to the archive:
   a new index, against a previous one that is updated after some of the passages were replaced.

`overhead_share` is the share of a passage's time beyond its 0.2 s: the loss at the rate of one actor, and the passage's
share of planning a million. `--only` runs one of the parts; `--rows` and `--passages` make it smaller. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from measure import machine, peak_mb

from pipelines.settings import RunContext
from pipelines.stages.train import TrainAdapters

if TYPE_CHECKING:
    from prag_core.llm.layout import LoraLayout
    from prag_core.llm.lora import TrainedAdapter
    from prag_core.store.objects import Store
    from prag_core.training.examples import TrainingJob
    from prag_core.training.trainer import OnStep

WORK_S = 0.2
# An estimate for Llama-3.2-1B on an H100: 56 passages of 1,010 tokens a second.
GPU_WORK_S = 0.018
GPU_TASK = 65
ACTORS = (1, 2, 4, 8)
TASKS_AN_ACTOR = 8  # as in the training stage, when a task is less than a shard
ROWS = {"10k": 10_000, "100k": 100_000, "1m": 1_000_000}
FILES = 20
PARTS = ("rates", "gpu", "plan", "scan", "index")
CHANGED = (0.01, 0.1, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="run only this part")
    parser.add_argument("--passages", type=int, default=400, help="passages for each actor of the sleeping trainer")
    parser.add_argument("--actors", type=int, nargs="*", default=ACTORS, help="how many sleeping trainers")
    parser.add_argument("--gpu-tasks", type=int, default=16, help=f"tasks of {GPU_TASK} passages at a GPU's pace")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="the corpora to plan")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, argument, folder = arguments.child.split(" ")
        print(
            json.dumps(
                {"rates": rate, "gpu": gpu_rate, "plan": plan, "scan": scan, "index": index}[what](
                    int(argument), Path(folder)
                )
            )
        )
        return
    print(machine())
    parts = [arguments.only] if arguments.only else PARTS
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prag-scale-") as scratch:
        if "rates" in parts:
            rates = {}
            for actors in arguments.actors:
                result = in_process("rates", actors * arguments.passages, Path(scratch), actors)
                rates[str(actors)] = result["rate"]
                print(
                    f"{actors} actors: {result['rate']:.2f} passages/s of {actors / WORK_S:.0f}; "
                    f"{result['survey_s']:.1f} s survey, first outcome after {result['first_s']:.1f} s, "
                    f"{result['seconds']:.1f} s in all",
                    flush=True,
                )
            found["passages_per_s_fake"] = {name: round(value, 2) for name, value in rates.items()}
            if {"1", "8"} <= {*rates}:
                found["efficiency_8"] = round(rates["8"] / rates["1"] / 8, 3)
        if "gpu" in parts:
            result = in_process("gpu", arguments.gpu_tasks, Path(scratch))
            found["busy_share_at_gpu_pace"] = round(result["rate"] * GPU_WORK_S, 3)
            print(f"at a GPU's pace: {result['rate']:.2f} passages/s of {1 / GPU_WORK_S:.1f}", flush=True)
        if "plan" in parts:
            plans = {}
            for name in arguments.rows:
                plans[name] = in_process("plan", ROWS[name], Path(scratch))
                print(f"{name} rows planned: {plans[name]}", flush=True)
            found["driver_mb"] = {name: round(plan["driver_mb"]) for name, plan in plans.items()}
            found["plan_s"] = {name: round(plan["seconds"], 1) for name, plan in plans.items()}
            found["shuffle_gb"] = round(plans[arguments.rows[-1]]["shuffle_gb"], 3)
        if "scan" in parts:
            result = in_process("scan", ROWS["1m"], Path(scratch))
            print(f"a million passages surveyed: {result}", flush=True)
            found["resume_scan_s_1m"] = round(result["seconds"], 1)
        if "index" in parts:
            name = "10k" if arguments.rows == ["10k"] else "100k"
            found[f"index_{name}_s"] = in_process("index", ROWS[name], Path(scratch))
            print(f"{name} passages indexed: {found[f'index_{name}_s']}", flush=True)
    if "1" in found.get("passages_per_s_fake", {}) and "1m" in found.get("plan_s", {}):
        each = 1 / found["passages_per_s_fake"]["1"] + found["plan_s"]["1m"] / ROWS["1m"]
        found["overhead_share"] = round(1 - WORK_S / each, 4)
    print(json.dumps({**found, "machine": machine()}))


def in_process(what: str, number: int, scratch: Path, actors: int = 0) -> dict[str, Any]:
    """Measure in a new process, so that its memory is measured alone."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        argument = number * 100 + actors if what == "rates" else number
        command = [sys.executable, __file__, "--child", f"{what} {argument} {folder}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---- 1, 2. a trainer that sleeps


class SleepingTrainer:
    """Has the time of a GPU's trainer, and leaves to the host what that leaves to it."""

    def __init__(self, layout: LoraLayout, work_s: float) -> None:
        import torch

        self._work_s = work_s
        self._factors = {name: torch.randn(shape) for name, shape in layout.tensor_shapes.items()}

    def train(self, jobs: Sequence[TrainingJob], *, tokens_per_step: int, on_step: OnStep) -> Iterator[TrainedAdapter]:
        from prag_core.llm.lora import TrainedAdapter
        from prag_core.training.trainer import check_distinct, make_stacks

        seen: set[str] = set()
        for stack in make_stacks(jobs, tokens_per_step):
            time.sleep(self._work_s * len(stack))
            on_step(1, 1, len(stack))
            trained = []
            for row, job in enumerate(stack):
                factors = {name: factor.clone() for name, factor in self._factors.items()}
                factors["up_proj.B"][0, 0, 0] = len(seen) + row
                trained.append(TrainedAdapter(job.key, factors, 20, job.tokens, 3.0, 0.5, self._work_s))
            yield from check_distinct(trained, seen)


class Sleeper(TrainAdapters):
    """The training stage's actor with a trainer that sleeps."""

    def __init__(self, context: RunContext, work_s: float) -> None:
        self._work_s = work_s
        super().__init__(context)

    def _load(self, context: RunContext) -> tuple[Any, Any]:
        from prag_core.llm.checkpoint import load_tokenizer, resolve_model

        tokenizer = load_tokenizer(resolve_model(context.config.model.name))
        return SleepingTrainer(context.layout, self._work_s), tokenizer


def recipe() -> Any:
    from store import recipe_of_million

    return recipe_of_million()


def rate(argument: int, folder: Path) -> dict[str, Any]:
    passages, actors = divmod(argument, 100)
    return train_asleep(folder, passages, actors, passages // (actors * TASKS_AN_ACTOR), WORK_S)


def gpu_rate(tasks: int, folder: Path) -> dict[str, Any]:
    return train_asleep(folder, tasks * GPU_TASK, 1, GPU_TASK, GPU_WORK_S)


def train_asleep(folder: Path, passages: int, actors: int, batch: int, work_s: float) -> dict[str, Any]:
    """Train made-up passages in tasks of `batch` with actors that sleep; return the rate and the times."""
    from cluster.resources import PROFILES
    from cluster.session import ray_session
    from pipelines.execution.isolation import StageRun, run_actors
    from pipelines.execution.outcomes import outcome_blocks
    from pipelines.execution.survey import survey, with_augmentations
    from pipelines.execution.tables import map_blocks, read_parts
    from pipelines.stages.train import LANES, with_length
    from prag_core.config_file import parse_config
    from prag_core.llm.layout import LoraLayout
    from prag_core.records import Passage, schema
    from prag_core.store.objects import Store

    store = Store(str(folder / "store"))
    write_example_corpus(store, passages)
    shapes = ((576, 1536), (576, 1536), (1536, 576))  # the small model's
    layout = LoraLayout(2, 16.0, tuple(range(30)), ("gate_proj", "up_proj", "down_proj"), shapes)
    config = parse_config({"store": store.url, "corpus": {"path": "none"}, "augment": {"generator": "none"}})
    profile = PROFILES["laptop"]
    pool = replace(profile.train, min_size=actors, max_size=actors, threads=1)
    profile = replace(profile, train=pool, tokens_per_step=32_768, logical_cpus=actors + 2)
    context = RunContext(config, store, profile, recipe(), layout, "run")
    with ray_session(profile):
        begun = time.perf_counter()
        corpus = read_parts(store, "corpus/example", schema(Passage).names, profile.partitions)
        found = survey(store, corpus, passages, recipe(), profile)
        surveyed = time.perf_counter()
        missing = with_augmentations(store, found, "to_train", corpus, recipe().augment.fingerprint, profile)
        missing = map_blocks(missing, with_length).sort("length")
        stage_run = StageRun(store, "run", "train", recipe().fingerprint, config.run, config.run.passage_timeout_s)
        preload = ["prag_core.training.trainer"]
        outcomes = run_actors(Sleeper, (context, work_s), missing, batch, profile.train, stage_run, preload, LANES)
        times: list[tuple[float, int]] = []
        done = 0
        for block in outcome_blocks(outcomes):
            if any(outcome.rejected for outcome in block):
                raise RuntimeError("the sleeping trainer rejects nothing")
            done += len(block)
            times.append((time.perf_counter(), done))
        seconds = time.perf_counter() - begun
    if done != passages:
        raise RuntimeError(f"{done} of {passages} passages were done")
    # The rate is measured from when all actors work until the first one has nothing more to do.
    middle = [moment for moment in times if moment[1] >= actors * batch and moment[1] <= passages - actors * batch]
    (first_s, first), (last_s, last) = middle[0], middle[-1]
    return {
        "rate": (last - first) / (last_s - first_s),
        "survey_s": surveyed - begun,
        "first_s": times[0][0] - surveyed,
        "seconds": seconds,
    }


def write_example_corpus(store: Store, passages: int) -> None:
    """Store the passages of the example corpus with their augmentations, over and over under other titles."""
    from prag_core.augmentation.formats import read_augmentations
    from prag_core.identity import passage_key
    from prag_core.packaged import local_path
    from prag_core.records import Passage, passage_table
    from prag_core.store.tables import put_augmentations

    corpus = Path(local_path("package://pipelines/examples/atlas/passages.jsonl")).read_text().splitlines()
    texts = [json.loads(line) for line in corpus]
    by_name = read_augmentations("package://pipelines/examples/atlas/augmentations.jsonl").by_name
    made, augmentations = [], []
    for n in range(passages):
        row = texts[n % len(texts)]
        title = f"{row['title']} {n}"
        key = passage_key(title, row["text"])
        made.append(Passage(key, title, row["text"], (f"p{n}",)))
        augmentations.append(replace(by_name[row["id"]], key=key))
    store.put_table("corpus/example", passage_table(made))
    put_augmentations(store, recipe().augment.fingerprint, augmentations)


# ---- 3. planning


def plan(rows: int, folder: Path) -> dict[str, Any]:
    import ray
    import ray.data

    from cluster.resources import PROFILES
    from cluster.session import ray_session
    from pipelines.execution.survey import survey
    from pipelines.stages import ingest
    from prag_core.config import CorpusConfig
    from prag_core.store.objects import Store

    write_corpus(folder / "corpus", rows)
    profile, store = PROFILES["laptop"].tuned(partitions=max(2, rows // 62_500)), Store(str(folder / "store"))
    with ray_session(profile):
        scales = ray.remote(Scales).options(num_cpus=0).remote()
        weigh_shuffles(scales)
        begun = time.perf_counter()
        corpus = ingest.ingest(CorpusConfig(path=str(folder / "corpus")), profile)
        ingested = time.perf_counter()
        counts = survey(store, corpus.passages, corpus.count, recipe(), profile).counts
        seconds = time.perf_counter() - begun
        shuffled = ray.get(scales.total.remote())
    if counts != {"to_augment": rows}:
        raise RuntimeError(f"{counts} of {rows} rows")
    return {
        "seconds": seconds,
        "ingest_s": ingested - begun,
        "driver_mb": peak_mb(),
        "shuffle_gb": shuffled / 1e9,
    }


class Scales:
    """Counts the bytes that go through shuffles."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, size: int) -> None:
        self._total += size

    def total(self) -> int:
        return self._total


def weigh_shuffles(scales: Any) -> None:
    """Make each shuffle by key count the bytes that go into it."""
    import ray.data

    repartition = ray.data.Dataset.repartition

    def weighed(self: Any, *arguments: Any, **settings: Any) -> Any:
        if settings.get("keys"):
            self = self.map_batches(weigh, batch_size=None, batch_format="pyarrow", fn_args=(scales,))
        return repartition(self, *arguments, **settings)

    ray.data.Dataset.repartition = weighed


def weigh(table: pa.Table, scales: Any) -> pa.Table:
    scales.add.remote(table.nbytes)
    return table


def write_corpus(folder: Path, rows: int) -> None:
    """Write made-up passages of about twenty words."""
    folder.mkdir()
    for file in range(FILES):
        with (folder / f"{file:02}.jsonl").open("w") as stream:
            for n in range(file, rows, FILES):
                text = " ".join(f"w{n * 31 % 9973 + i}" for i in range(16))
                stream.write(f'{{"id": "p{n}", "title": "Passage {n}", "text": "Row {n} says {text}."}}\n')


# ---- 4. the survey of a resumed run


def scan(rows: int, folder: Path) -> dict[str, Any]:
    from store import plan_million, write_million

    write_million(str(folder / "store"), rows, 1000)
    return dict(plan_million(argparse.Namespace(store=str(folder / "store"), rows=rows)))


# ---- 5. a new index against an updated one


def index(rows: int, folder: Path) -> dict[str, Any]:
    from prag_core.config import IndexConfig
    from prag_core.retrieval.build import IndexBuild, make_index
    from prag_core.retrieval.jvm import prepare_jvm
    from prag_core.store.objects import Store

    prepare_jvm()
    store, seconds = Store(str(folder / "store")), {}
    for share in (0.0, *CHANGED):
        begin = round(share * rows)
        store_made_up(store, str(begin), begin, rows)
        begun = time.perf_counter()
        _, build = make_index(store, str(begin), "0" if begin else None, IndexConfig())
        seconds[f"changed_{share:.0%}" if begin else "anew"] = round(time.perf_counter() - begun, 1)
        if begin and build != IndexBuild(added=begin, removed=begin):
            raise RuntimeError(f"index {build}")
    return {**seconds, "peak_mb": peak_mb()}


def made_up(begin: int, count: int) -> Iterator[Any]:
    from prag_core.identity import passage_key
    from prag_core.records import Passage

    for n in range(begin, begin + count):
        text = " ".join(f"w{(n * 7919 + i * i * 31) % 99_991}" for i in range(100))
        yield Passage(passage_key(f"Row {n}", text), f"Row {n}", text, (f"p{n}",))


def store_made_up(store: Any, version: str, begin: int, count: int) -> None:
    from prag_core.records import passage_table

    step = 10_000
    places = range(begin, begin + count, step)
    parts = [
        store.put_table(f"corpus/{version}", passage_table(made_up(place, min(step, begin + count - place))))
        for place in places
    ]
    store.put_json(f"corpus/{version}/manifest.json", {"parts": parts})


if __name__ == "__main__":
    # Children import this file by its name, to find the sleeping trainer.
    import scale

    scale.main()
