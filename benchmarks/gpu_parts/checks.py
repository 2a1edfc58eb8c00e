"""Is what the device computes right? Each check has `ok`, and the figures that decide it."""

from __future__ import annotations

import contextlib
import copy
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from gpu_parts.bench import Bench, Figures, random_adapter, random_jobs, random_prompts, train
from prag_core.config import ModelConfig
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.decode_request import DecodeRequest
from prag_core.llm.decoder import Decoder
from prag_core.llm.lora import Factors, Injector, TrainedAdapter, find_targets, flatten_adapter
from prag_core.recipe import RECIPES
from prag_core.training.examples import TrainingJob

RECIPE = RECIPES["paper"]
_VOCABULARY = 256  # of the small model, without its control tokens
_NEW_TOKENS = 24
# More than any device has.
_TOO_MANY_BYTES = 1 << 50

Pair = tuple[list[TrainedAdapter], list[TrainedAdapter]]


def trainer(bench: Bench) -> Figures:
    """One stack on the device, against one passage after the other on the CPU."""
    jobs, budget = _jobs(bench)
    few = jobs[:8]
    return _agreement(
        lambda dtype: (train(bench.small(dtype), few, RECIPE, budget), train(bench.small(dtype, "cpu"), few, RECIPE, 1))
    )


def checkpointing(bench: Bench) -> Figures:
    """Layers that are computed again in the backward pass, against layers that are kept."""
    jobs, budget = _jobs(bench)

    def pair(dtype: torch.dtype) -> Pair:
        base = bench.small(dtype)
        return train(base, jobs, RECIPE, budget, checkpoint=True), train(base, jobs, RECIPE, budget)

    return _agreement(pair)


def short_memory(bench: Bench) -> Figures:
    """A stack that does not fit under a cap on memory, against the same without a cap; a CPU has none."""
    jobs, budget = _jobs(bench)
    stacks: list[int] = []

    def count(step: int, steps: int, adapters: int) -> None:
        stacks[-1] += step == 1

    def pair(dtype: torch.dtype) -> Pair:
        base = bench.small(dtype)
        bench.free()
        stacks.append(0)
        whole = train(base, jobs, RECIPE, budget, on_step=count)
        with _memory_cap(bench.device, 0.6):
            stacks.append(0)
            return train(base, jobs, RECIPE, budget, on_step=count), whole

    found = _agreement(pair)
    halved = bench.device == "cpu" or (stacks[0] < stacks[1] and stacks[2] < stacks[3])
    return {**found, "ok": found["ok"] and halved, "stacks": stacks}


def decoder(bench: Bench) -> Figures:
    """Rows that join, decode together and leave, against plain greedy decoding of each.

    With adapters, the plain model has their sum in its weights. Two tokens that score alike up to rounding may make a
    row differ.
    """
    base = bench.small()
    summed = copy.deepcopy(base.model)
    layout, modules = find_targets(summed, RECIPE)
    adapters = [(random_adapter(layout, seed), weight) for seed, weight in enumerate((1.0, 0.5, 0.3))]
    with torch.no_grad():
        for (layer, target), module in modules.items():
            for factors, weight in adapters:
                delta = _delta(factors, target)[layout.layers.index(layer)]
                module.weight += weight * layout.scale * delta.to(module.weight)
    prompts = [prompt[: 5 + 3 * i] for i, prompt in enumerate(random_prompts(16, 50, _VOCABULARY))]
    plain = {k: [_greedy(base, model, prompt) for prompt in prompts] for k, model in ((0, base.model), (3, summed))}
    same = {}
    flat = [(flatten_adapter(layout, factors, dtype=base.model.dtype), weight) for factors, weight in adapters]
    injector = Injector(base.model, RECIPE)
    try:
        for k, wanted in plain.items():
            requests = [DecodeRequest(p, _NEW_TOKENS, base.end_ids, adapters=flat[:k]) for p in prompts]
            rows = Decoder(base, injector, slots=5, prefill_chunk=64).run(requests)
            same[str(k)] = statistics.mean(row.tokens == tokens for row, tokens in zip(rows, wanted, strict=True))
    finally:
        injector.close()
    # If the adapters changed nothing, their agreement would show nothing.
    changed = statistics.mean(a != b for a, b in zip(plain[0], plain[3], strict=True))
    return {"ok": min(same.values()) > 0.8 and changed > 0.5, "same_rows": same, "rows_changed_by_adapters": changed}


def child(bench: Bench) -> Figures:
    """A forked child process that trains on the device, against this process; and one that runs out of memory."""
    # Imported here, so that the other parts do without it.
    from pipelines.execution.child_process import Child, ChildLostError, Limits

    jobs, budget = _jobs(bench)
    few = jobs[:4]
    wanted = [adapter.last_loss for adapter in train(bench.small(), few, RECIPE, budget)]
    work = pickle.dumps((ChildActor, (bench.small_config(), few, budget)))
    limits = Limits(silence_s=120.0, memory_bytes=1e12)
    ready_s, lost_as = [], ""
    for too_much in (False, True):
        begun = time.perf_counter()
        process = Child(work, [ChildActor.__module__])
        try:
            (table,) = process.call(pa.table({"bytes": [0]}), limits)
            ready_s.append(time.perf_counter() - begun)
            if too_much:
                list(process.call(pa.table({"bytes": [_TOO_MANY_BYTES]}), limits))
        except ChildLostError as error:
            if not too_much:
                raise
            lost_as = error.reason
        finally:
            process.kill()
    worst = max(abs(a - b) / b for a, b in zip(table["loss"].to_pylist(), wanted, strict=True))
    ok = worst < 1e-3 and lost_as == "out_of_memory"
    return {"ok": ok, "loss_difference": worst, "lost_as": lost_as, "first_s": ready_s[0], "next_s": ready_s[1]}


class ChildActor:
    """What the child runs: it takes as much memory as a table says, trains the jobs, and returns their losses."""

    def __init__(self, config: ModelConfig, jobs: Sequence[TrainingJob], budget: int) -> None:
        self._base, self._jobs, self._budget = load_base_model(config), jobs, budget

    def prepare(self, table: pa.Table) -> int:
        """Return how many bytes the batch asks for."""
        return int(table["bytes"][0].as_py())

    def __call__(self, size_bytes: int, heartbeat: Callable[[float], None]) -> Iterator[pa.Table]:
        """Take so much memory, train the jobs, and yield their losses."""
        torch.empty(size_bytes, dtype=torch.uint8, device=self._base.device)
        yield pa.table({"loss": [a.last_loss for a in train(self._base, self._jobs, RECIPE, self._budget)]})


def _jobs(bench: Bench) -> tuple[list[TrainingJob], int]:
    """Return passages for the small model, and the tokens a step with which they are one stack."""
    jobs = random_jobs(bench.sizes.paper, bench.sizes.checked_passages, _VOCABULARY)
    return jobs, len(jobs) * max(job.longest for job in jobs)


def _agreement(pair: Callable[[torch.dtype], Pair]) -> Figures:
    """Return the largest ‖ΔW' − ΔW‖ / ‖ΔW‖ of a matrix between two trainings, in fp64 and in fp32.

    fp64 is the strict one. In fp32 AdamW makes a whole step of the rounding of a gradient that is almost zero.
    """
    worst = {}
    for name, dtype in (("dw_fp64", torch.float64), ("dw_fp32", torch.float32)):
        found, wanted = ({adapter.key: adapter.factors or {} for adapter in trained} for trained in pair(dtype))
        worst[name] = max(
            float(((_delta(found[key], target) - delta).norm(dim=(1, 2)) / delta.norm(dim=(1, 2))).max())
            for key in wanted
            for target in RECIPE.targets
            for delta in [_delta(wanted[key], target)]
        )
    return {"ok": worst["dw_fp64"] < 1e-6 and worst["dw_fp32"] < 0.1, **worst}


def _delta(factors: Factors, target: str) -> torch.Tensor:
    """Return B·A of each layer, `[layers, outputs, inputs]`."""
    return factors[f"{target}.B"] @ factors[f"{target}.A"]


def _greedy(base: BaseModel, model: Any, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([prompt], device=base.device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(base.end_ids),
        pad_token_id=0,
    )
    tokens = made[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] in base.end_ids else tokens


@contextlib.contextmanager
def _memory_cap(device: str, share: float) -> Iterator[None]:
    """Grant, beyond what is in use, a share of what was reserved at the peak."""
    if device == "cpu":
        yield
        return
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + share * (peak - used)) / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
