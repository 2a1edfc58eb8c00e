"""Measure training on a GPU, on a random model of the shape of Llama-3.2-1B: `python benchmarks/train_gpu.py`.

Passages are random tokens in five examples, of the lengths that 100-word passages have; the speed does not depend on
their content. Without a GPU, `--smoke` runs all of it once with a tiny model on the CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from measure import machine, matrix_rate, padding, peak_gb, peft_seconds, stacked_seconds
from transformers import LlamaConfig, LlamaForCausalLM

from prag_core.llm.base_model import BaseModel
from prag_core.recipe import RECIPES
from prag_core.training.examples import TrainingExample, TrainingJob
from prag_core.training.trainer import make_stacks

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
RECIPE = RECIPES["paper"]
# Tokens of the five examples of a passage of 100 words: passage, rewrite, passage, rewrite, and without.
LENGTHS = (240, 230, 240, 230, 70)


def random_model(shape: dict[str, int], device: str) -> BaseModel:
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.requires_grad_(False)
    return BaseModel("random", "random", model.eval(), None)


def random_jobs(count: int, vocabulary: int) -> list[TrainingJob]:
    generator = torch.Generator().manual_seed(0)
    jobs = []
    for number in range(count):
        scale = float(torch.empty(1).uniform_(0.6, 1.4, generator=generator))
        examples = []
        for length in LENGTHS:
            ids = torch.randint(vocabulary, (round(length * scale),), generator=generator)
            examples.append(TrainingExample(tuple(ids.tolist())))
        jobs.append(TrainingJob(str(number), tuple(examples)))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model on the CPU, to test that it runs; measures no speed"
    )
    parser.add_argument("--passages", type=int, default=512, help="passages trained at once")
    parser.add_argument("--peft-passages", type=int, default=16)
    parser.add_argument("--tokens-per-step", type=int, default=131_072, help="halved when memory is short")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs on the CPU")
    print(json.dumps(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device, shape = ("cpu", TINY) if arguments.smoke else ("cuda", LLAMA_1B)
    base = random_model(shape, device)
    jobs = random_jobs(arguments.passages, shape["vocab_size"])
    stacks = make_stacks(jobs, arguments.tokens_per_step)
    rate = matrix_rate(base.model.dtype, device, (8192, shape["hidden_size"], shape["intermediate_size"]))
    parameters = sum(p.numel() for p in base.model.parameters())
    print(machine(device))
    print(f"{parameters / 1e6:.0f} M parameters, {base.model.dtype}, matrix rate {rate / 1e12:.2f} TFLOP/s")
    stacked_seconds(base, jobs[:4], RECIPE, arguments.tokens_per_step)  # the first calls choose kernels
    ours, peft = [], []
    memory = 0.0
    for repeat in range(arguments.repeats):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ours.append(len(jobs) / stacked_seconds(base, jobs, RECIPE, arguments.tokens_per_step))
        memory = max(memory, peak_gb(device))
        few = jobs[: arguments.peft_passages]
        peft.append(len(few) / peft_seconds(base, few, RECIPE))
        print(f"repeat {repeat + 1}: ours {ours[-1]:.2f}, PEFT {peft[-1]:.2f} passages/s", flush=True)
    work = 4 * parameters * sum(job.tokens for job in jobs) / len(jobs)
    return {
        "passages_per_s": round(statistics.median(ours), 3),
        "peft_passages_per_s": round(statistics.median(peft), 3),
        "x_vs_peft": round(statistics.median(ours) / statistics.median(peft), 2),
        "gemm_share": round(statistics.median(ours) * work / rate, 3),
        "in_flight": max(map(len, stacks)),
        "padding": round(padding(jobs, stacks), 3),
        "peak_gb": round(memory, 2),
        "machine": machine(device),
    }


if __name__ == "__main__":
    main()
