"""Train adapters by the paper's loop, by the same without padding, and by ours: `python benchmarks/train.py`.

By default it trains the example corpus; `--store` uses the passages and augmentations of any store that `prag run` has
filled. All use the recipe `paper`, and of each passage as many pairs as the paper has: three. PEFT and ours are
compared in the same dtype. bf16 is measured only where the processor multiplies it natively. Elsewhere it is emulated
at a small part of the rate of fp32, and nobody would train in it. The paper's loop is in fp32, as published. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, matrix_rate, padding, peak_gb, peft_seconds, stacked_seconds, time_shares

from prag_core.augmentation.formats import read_augmentations
from prag_core.config import CorpusConfig, ModelConfig
from prag_core.data.corpus import Piece, merge_pieces, read_records
from prag_core.data.listing import list_files
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.recipe import RECIPES
from prag_core.records import Augmentation, Passage, from_table
from prag_core.store.objects import Store
from prag_core.training.examples import TrainingJob, training_examples
from prag_core.training.trainer import make_stacks

ATLAS = Path(__file__).parent.parent / "pipelines" / "examples" / "atlas"
RECIPE = RECIPES["paper"]
PAIRS = 3


def from_atlas() -> list[tuple[Passage, Augmentation]]:
    config = CorpusConfig(path=str(ATLAS / "passages.jsonl"))
    augmentations = read_augmentations(str(ATLAS / "augmentations.jsonl"))
    (file,) = list_files(config).files
    passages = [merge_pieces([p]) for p in read_records(file, config) if isinstance(p, Piece)]
    found = [(passage, augmentations.find(passage)) for passage in passages]
    return [(passage, augmentation) for passage, augmentation in found if augmentation is not None]


def from_store(url: str) -> list[tuple[Passage, Augmentation]]:
    store = Store(url)
    rows = store.get_table(Augmentation, store.list("augmentations", ".parquet"))
    augmentations = {row.key: row for row in from_table(Augmentation, rows)}
    passages = {row.key: row for row in from_table(Passage, store.get_table(Passage, store.list("corpus", ".parquet")))}
    return [(passages[key], augmentations[key]) for key in sorted(passages.keys() & augmentations.keys())]


def jobs_of(base: BaseModel, corpus: Sequence[tuple[Passage, Augmentation]], count: int) -> list[TrainingJob]:
    """Return `count` jobs; if the corpus is too small, repeat its passages under other titles and keys."""
    corpus = [(passage, replace(made, pairs=made.pairs[:PAIRS])) for passage, made in corpus]
    jobs = []
    for number in range(count):
        passage, augmentation = corpus[number % len(corpus)]
        if again := number // len(corpus):
            passage = replace(passage, title=f"{passage.title} {again + 1}")
        examples = training_examples(base.tokenizer, passage, augmentation, RECIPE)
        jobs.append(TrainingJob(f"{passage.key}-{number}", examples))
    return jobs


def profile(base: BaseModel, stack: Sequence[TrainingJob], budget: int) -> dict[str, float]:
    """Train one stack under torch's profiler; return the share of each part of the time, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        stacked_seconds(base, stack, RECIPE, budget)
    return time_shares(seen.events(), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model: a name or a folder")
    parser.add_argument("--store", help="a store with passages and augmentations; by default the example corpus")
    parser.add_argument("--passages", type=int, default=8, help="passages of the comparison with PEFT")
    parser.add_argument("--paper-passages", type=int, default=1, help="passages of the paper's padded loop; 0: none")
    parser.add_argument("--throughput", default="16,64", help="numbers of passages to train at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument(
        "--pad-to", type=int, default=3000, help="the length to which the paper's loop pads each example"
    )
    print(json.dumps(measure(parser.parse_args())))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    corpus = from_store(arguments.store) if arguments.store else from_atlas()
    best = load_base_model(ModelConfig(name=arguments.model, device="cpu"))
    budget = arguments.tokens_per_step
    shape = (budget, best.model.config.hidden_size, best.model.config.intermediate_size)
    rates = {"fp32": matrix_rate(torch.float32, "cpu", shape), "bf16": matrix_rate(torch.bfloat16, "cpu", shape)}
    parameters = sum(p.numel() for p in best.model.parameters())
    print(machine())
    print(f"matrix rate: fp32 {rates['fp32'] / 1e9:.0f}, bf16 {rates['bf16'] / 1e9:.0f} GFLOP/s")
    print(f"{len(corpus)} passages with augmentations, {parameters / 1e6:.0f} M parameters, recipe {RECIPE.name}")

    # 1. Throughput. It comes first, so that the peak memory is that of our trainer.
    throughput, pads = {}, {}
    for count in map(int, arguments.throughput.split(",")):
        jobs = jobs_of(best, corpus, count)
        pads[count] = padding(jobs, make_stacks(jobs, budget))
        throughput[count] = count / stacked_seconds(best, jobs, RECIPE, budget)
        print(f"{count} passages at once: {throughput[count]:.3f} passages/s, padding {pads[count]:.1%}", flush=True)
    memory = peak_gb("cpu")

    # 2. The parts of the time, on one full stack.
    stack = max(make_stacks(jobs, budget), key=len)
    parts = profile(best, stack, budget)
    for name, part in parts.items():
        print(f"  {part:6.1%}  {name}")

    # 3. Side by side with PEFT in the same dtype, taking turns.
    models = {"fp32": load_base_model(ModelConfig(name=arguments.model, dtype="float32", device="cpu"))}
    if best.model.dtype == torch.bfloat16:
        models["bf16"] = best
    jobs = jobs_of(best, corpus, arguments.passages)
    tokens = sum(job.tokens for job in jobs) / len(jobs)
    seconds: dict[str, list[float]] = {f"{way}_{name}": [] for name in models for way in ("peft", "ours")}
    for repeat in range(arguments.repeats):
        for name, base in models.items():
            seconds[f"peft_{name}"].append(peft_seconds(base, jobs, RECIPE) / len(jobs))
            seconds[f"ours_{name}"].append(stacked_seconds(base, jobs, RECIPE, budget) / len(jobs))
        line = ", ".join(f"{name} {values[-1]:.2f}" for name, values in seconds.items())
        print(f"repeat {repeat + 1}, {len(jobs)} passages of {tokens:.0f} tokens: {line} s each", flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    x_vs_peft = {name: round(median[f"peft_{name}"] / median[f"ours_{name}"], 2) for name in models}
    fastest = "bf16" if "bf16" in models else "fp32"

    # 4. The paper's loop as published.
    paper = None
    if arguments.paper_passages:
        first = jobs[: arguments.paper_passages]
        paper = peft_seconds(models["fp32"], first, RECIPE, arguments.pad_to) / len(first)
        print(f"the paper's loop, padded to {arguments.pad_to}: {paper:.1f} s a passage ({len(first)}, measured once)")

    work = 4 * parameters * tokens
    share = {name: work / median[f"ours_{name}"] / rates[name] for name in models}
    return {
        "dtype": fastest,
        "x_vs_paper": None if paper is None else round(paper / median[f"ours_{fastest}"], 1),
        "x_vs_peft": x_vs_peft[fastest],
        "x_vs_peft_fp32": x_vs_peft["fp32"],
        "gemm_share_bf16": round(share["bf16"], 3) if "bf16" in share else None,
        "gemm_share_fp32": round(share["fp32"], 3),
        "padding": round(pads[max(pads)], 3),
        "peak_gb": round(memory, 2),
        "time_shares": {name: round(part, 3) for name, part in parts.items()},
        "passages_per_s": {str(count): round(rate, 3) for count, rate in throughput.items()},
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
