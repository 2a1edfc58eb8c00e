"""How fast is the device? Passages and tokens a second, and where the time goes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch
from measure import machine, matrix_rate, padding, peak_gb, peft_seconds, time_shares, wait_for
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gpu_parts.bench import Bench, Figures, random_adapter, random_jobs, random_prompts, train
from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import DecodeRequest
from prag_core.llm.decoder import Decoder
from prag_core.llm.lora import Injector, flatten_adapter
from prag_core.recipe import RECIPES, TrainRecipe
from prag_core.training.examples import TrainingJob
from prag_core.training.trainer import make_stacks

PAPER, RECALL = RECIPES["paper"], RECIPES["recall"]
_TOP = 15  # how many kernels of a profile are named


def card(bench: Bench) -> Figures:
    """The rates that bound all others: products, copies, and the start of a kernel."""
    device, size, count = bench.device, bench.sizes.matrix, 500
    rates = {
        f"{name}_tflop_s": matrix_rate(dtype, device, (size, size, size)) / 1e12
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    here = torch.zeros(bench.sizes.copy_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    host = torch.zeros(here.shape, dtype=torch.uint8, pin_memory=device == "cuda")
    one = torch.zeros(1, device=device)
    submitted: list[float] = []

    def launch() -> None:
        begun = time.perf_counter()
        for _ in range(count):
            one.add_(1)
        submitted.append(time.perf_counter() - begun)

    return {
        "machine": machine(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **({"memory_gb": torch.cuda.mem_get_info()[1] / 1e9} if device == "cuda" else {}),
        **rates,
        # A copy reads and writes each byte.
        "copy_gb_s": 2 * here.nbytes / bench.seconds(lambda: there.copy_(here)) / 1e9,
        "from_host_gb_s": here.nbytes / bench.seconds(lambda: here.copy_(host, non_blocking=True)) / 1e9,
        "kernel_us": bench.seconds(launch) / count * 1e6,
        "launch_us": statistics.median(submitted[1:]) / count * 1e6,
    }


def training(bench: Bench) -> Figures:
    """Our trainer and a plain PEFT loop, on the same model in the same dtype."""
    sizes = bench.sizes
    return _against_peft(bench, bench.base("1b"), sizes.passages, sizes.peft_passages, sizes.tokens_per_step)


def training_8b(bench: Bench) -> Figures:
    """The same at the shape of Llama-3-8B."""
    sizes = bench.sizes
    return _against_peft(bench, bench.base("8b"), sizes.passages_8b, sizes.peft_passages_8b, sizes.tokens_per_step_8b)


def _against_peft(bench: Bench, base: BaseModel, count: int, peft_count: int, tokens_per_step: int) -> Figures:
    jobs = random_jobs(bench.sizes.paper, count, base.model.config.vocab_size)
    few = jobs[:peft_count]
    ours = _training(bench, base, jobs, PAPER, tokens_per_step)
    peft = len(few) / bench.seconds(lambda: peft_seconds(base, few, PAPER))
    config, parameters = base.model.config, sum(p.numel() for p in base.model.parameters())
    rate = matrix_rate(base.model.dtype, bench.device, (8192, config.hidden_size, config.intermediate_size))
    return {
        **ours,
        "peft_passages_per_s": peft,
        "x_vs_peft": ours["passages_per_s"] / peft,
        # The model's own arithmetic: two operations a parameter and token forward, and two backward.
        "matrix_rate_share": ours["tokens_per_s"] * 4 * parameters / rate,
        "matrix_tflop_s": rate / 1e12,
        "padding": padding(jobs, make_stacks(jobs, tokens_per_step)),
        "parameters": parameters,
    }


def _training(
    bench: Bench,
    base: BaseModel,
    jobs: Sequence[TrainingJob],
    recipe: TrainRecipe,
    tokens_per_step: int,
    checkpoint: bool = False,
) -> Figures:
    begun: list[int] = []

    def call() -> None:
        begun.clear()
        train(base, jobs, recipe, tokens_per_step, checkpoint=checkpoint, on_step=lambda step, *_: begun.append(step))

    seconds = bench.seconds(call)
    return {
        "passages_per_s": len(jobs) / seconds,
        "tokens_per_s": sum(job.tokens for job in jobs) * recipe.epochs / seconds,
        "stacks": begun.count(1),  # more than there should be, where memory was short
        "peak_gb": peak_gb(bench.device),
    }


def profile(bench: Bench) -> Figures:
    """Where the time of one stack goes.

    `steps_share` is what the steps take; the rest makes the stack, and takes out and checks the adapters. `busy_share`
    is the time of all kernels over that of a run without the profiler.
    """
    base, device = bench.base("1b"), bench.device
    # Steps of one length can be compared.
    lengths = (max(bench.sizes.paper),) * len(bench.sizes.paper)
    jobs = random_jobs(lengths, min(64, bench.sizes.passages), base.model.config.vocab_size, spread=0.0)
    budget = len(jobs) * jobs[0].longest
    seconds = bench.seconds(lambda: train(base, jobs, PAPER, budget))
    ends: list[float] = []

    def step_ends(step: int, steps: int, adapters: int) -> None:
        wait_for(device)
        ends.append(time.perf_counter())

    train(base, jobs, PAPER, budget, on_step=step_ends)
    # The last step takes out the adapters.
    step_s = statistics.median(after - before for before, after in itertools.pairwise(ends[:-1]))
    cuda = [ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda]) as seen:
        train(base, jobs, PAPER, budget)
        wait_for(device)
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    kernels, calls, runtime = Counter[str](), Counter[str](), Counter[str]()
    for event in seen.events():
        if event.device_type == kind and not event.is_user_annotation:
            kernels[event.name] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            calls[event.name] += 1
        elif event.name.startswith(("cuda", "cuLaunch")):  # calls of CUDA's runtime: launches, copies, waits
            runtime[event.name] += 1
    return {
        "passages": len(jobs),
        "stack_s": seconds,
        "step_s": step_s,
        "steps_share": step_s * len(ends) / seconds,
        "busy_share": kernels.total() / 1e6 / seconds,
        "shares": time_shares(seen.events(), device),
        "kernels_per_step": calls.total() / len(ends),
        "runtime_calls_per_step": {name: n / len(ends) for name, n in runtime.most_common()},
        "top": {name[:100]: [t / kernels.total(), calls[name]] for name, t in kernels.most_common(_TOP)},
    }


def stacks(bench: Bench) -> Figures:
    """Passages of one length in stacks of D."""
    base = bench.base("1b")

    def stack(count: int) -> Figures:
        jobs = random_jobs(bench.sizes.paper, count, base.model.config.vocab_size, spread=0.0)
        return _training(bench, base, jobs, PAPER, count * jobs[0].longest)

    return bench.rows({str(count): partial(stack, count) for count in bench.sizes.stacks}, needs_s=15)


def variants(bench: Bench) -> Figures:
    """One setting at a time is changed from bf16, no checkpointing, the usual tokens a step, recipe `paper`."""
    sizes, base = bench.sizes, bench.base("1b")
    vocabulary = base.model.config.vocab_size
    jobs = random_jobs(sizes.paper, sizes.passages // 2, vocabulary)
    # The answer and its end count.
    questions = random_jobs(sizes.recall, sizes.passages // 2, vocabulary, scored=8)
    usual = partial(_training, bench, base, jobs, PAPER, sizes.tokens_per_step)

    def fp32() -> Figures:
        few = jobs[: max(1, len(jobs) // 4)]  # it may be ten times as slow
        return _training(bench, bench.random_model("1b", torch.float32), few, PAPER, sizes.tokens_per_step // 2)

    return bench.rows(
        {
            "bf16": usual,
            "recall": partial(_training, bench, base, questions, RECALL, sizes.tokens_per_step),
            **{f"{n} tokens a step": partial(_training, bench, base, jobs, PAPER, n) for n in sizes.budgets},
            "checkpointing": partial(usual, checkpoint=True),
            "recall, 4 examples a step": partial(
                _training, bench, base, questions, replace(RECALL, examples_per_step=4), sizes.tokens_per_step
            ),
            "fp32": fp32,
        },
        needs_s=15,
    )


def decoding(bench: Bench) -> Figures:
    """Rows that decode together, without adapters and with three each."""
    return _decoding(bench, "1b", bench.sizes.rows)


def decoding_8b(bench: Bench) -> Figures:
    """The same at the shape of Llama-3-8B."""
    return _decoding(bench, "8b", bench.sizes.rows)


def _decoding(bench: Bench, name: str, rows: Sequence[int]) -> Figures:
    base = bench.base(name)
    return bench.rows(
        {f"{n} rows, {k} adapters": partial(_decode, bench, base, n, k) for k in (0, 3) for n in rows}, needs_s=10
    )


def _decode(bench: Bench, base: BaseModel, rows: int, k: int) -> Figures:
    injector = Injector(base.model, PAPER)
    layout, dtype = injector.layout, base.model.dtype
    adapters = [(flatten_adapter(layout, random_adapter(layout, seed), dtype=dtype), 1 / k) for seed in range(k)]
    prompts = random_prompts(rows, bench.sizes.prompt, base.model.config.vocab_size)
    decoder = Decoder(base, injector, slots=rows, prefill_chunk=rows * bench.sizes.prompt)
    for prompt in prompts:
        decoder.submit(DecodeRequest(prompt, bench.sizes.new_tokens, adapters=adapters))
    steps, results = [], []
    try:
        while decoder.busy:
            begun = time.perf_counter()
            events = decoder.step()
            wait_for(bench.device)
            if len(events) == rows:
                steps.append(time.perf_counter() - begun)
            results += [event.result for event in events if event.result is not None]
    finally:
        injector.close()
    if broken := sum(result.finish == "not_finite" for result in results):
        raise RuntimeError(f"{broken} of {rows} rows are not finite")
    # The first steps read prompts and choose kernels.
    step_s = statistics.median(steps[len(steps) // 2 :])
    return {
        "step_ms": 1e3 * step_s,
        "tokens_per_s": rows / step_s,
        **({"inject_ms": statistics.median(result.inject_ms for result in results)} if k else {}),
        "peak_gb": peak_gb(bench.device),
    }


def prefill(bench: Bench) -> Figures:
    """Reading long prompts in chunks: a larger chunk reads faster, but a running row waits for it."""
    base = bench.base("1b")
    count, tokens = bench.sizes.long_prompts
    requests = [DecodeRequest(p, 1) for p in random_prompts(count, tokens, base.model.config.vocab_size)]

    def read(chunk: int) -> Figures:
        seconds = bench.seconds(lambda: Decoder(base, slots=count, prefill_chunk=chunk).run(requests))
        rate = count * tokens / seconds
        return {"tokens_per_s": rate, "chunk_ms": 1e3 * chunk / rate, "peak_gb": peak_gb(bench.device)}

    return bench.rows({str(chunk): partial(read, chunk) for chunk in bench.sizes.chunks}, needs_s=5)
