"""Compare augmenting with transformers' `generate`: `python benchmarks/augment.py`.

Passages are augmented as in a run: with the default strategy (a writer, if the model has one), all of its prompts in
one batch whose rows join and leave. Then transformers' `generate` continues the same prompts with the same model and
dtype, up to the same limits: one prompt at a time, and in padded batches of prompts of similar length. The writer's
adapter is merged into its weights, which costs it nothing. There is one attempt a passage, so that all is greedy.

With `--vllm COMMAND` (the command in vLLM's own environment) vLLM serves the model, and the passages are augmented
through it (strategy `lines`, whose texts are sampled). A plain client sends the same prompts, `--concurrency` at a
time. Rates count the tokens of the texts; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from measure import machine

from pipelines.settings import describe, writer_of
from pipelines.stages.augment import make_generator
from prag_core.augmentation.augment import augment
from prag_core.config import Config, CorpusConfig
from prag_core.config_file import parse_config
from prag_core.data.corpus import Piece, merge_pieces, read_records
from prag_core.data.listing import list_files
from prag_core.errors import GenerationError
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.chat import WITHOUT_REASONING, chat_ids, document_ids
from prag_core.llm.checkpoint import load_tokenizer, resolve_model
from prag_core.llm.generator import Generator, Prompt
from prag_core.llm.layout import find_layout
from prag_core.llm.model_facts import model_facts
from prag_core.llm.peft import export_peft, peft_base
from prag_core.llm.vllm_generator import VllmGenerator
from prag_core.recipe import AugmentRecipe
from prag_core.records import Passage
from prag_core.store.adapters import get_start
from prag_core.testing import write_tiny_model

ATLAS = Path(__file__).parent.parent / "pipelines" / "examples" / "atlas"


@dataclass
class Asked:
    """A prompt that the augmentation has asked, how, and the reply."""

    prompt: Prompt
    max_new_tokens: int
    temperature: float
    reply: str = ""


class Recorder:
    """Passes prompts on to a generator, and records them with their replies."""

    def __init__(self, generator: Generator) -> None:
        self.fingerprint = generator.fingerprint
        self.concurrency = generator.concurrency
        self.asked: list[Asked] = []
        self._generator = generator

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        asked = Asked(prompt, max_new_tokens, temperature)
        self.asked.append(asked)
        reply = await self._generator.ask(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
        asked.reply = str(reply)
        return reply

    async def close(self) -> None:
        await self._generator.close()


@dataclass
class Run:
    """What one way of continuing prompts has made."""

    texts: list[str]
    seconds: float


def passages_of(corpus: str, count: int) -> list[Passage]:
    config = CorpusConfig(path=corpus, limit=count)
    (file,) = list_files(config).files
    pieces = (piece for piece in read_records(file, config) if isinstance(piece, Piece))
    return [merge_pieces([piece]) for piece in islice(pieces, count)]


def run_ours(generator: Generator, passages: Sequence[Passage], recipe: AugmentRecipe) -> tuple[list[Asked], float]:
    recorder = Recorder(generator)
    begun = time.perf_counter()
    augment(passages, recorder, recipe)
    return recorder.asked, time.perf_counter() - begun


def plain_model(config: Config, base: BaseModel, scratch: Path) -> Any:
    """Load the model as transformers does, with the writer's adapter, if there is one, merged into its weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = resolve_model(config.model.name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.model.dtype).to(base.device)
    if writer := writer_of(config, base.fingerprint):
        facts = model_facts(folder)
        layout = find_layout(facts.linear, writer.recipe)
        factors = get_start(writer.store, writer.name)
        export_peft(layout, factors, scratch / "writer", peft_base(config.model.name, facts))
        model = PeftModel.from_pretrained(model, str(scratch / "writer")).merge_and_unload()
    return model.eval()


def run_generate(model: Any, base: BaseModel, asked: Sequence[Asked], rows: int) -> Run:
    """Continue the prompts with `generate`, `rows` of similar length at a time, padded on the left."""
    import torch

    tokenizer = base.tokenizer
    breaks = [id for token, id in tokenizer.get_vocab().items() if "Ċ" in token]
    begun = time.perf_counter()
    prompts = []
    for one in asked:
        message = {"role": "user", "content": one.prompt.text}
        chat = one.prompt.chat
        ids = chat_ids(tokenizer, [message], **WITHOUT_REASONING) if chat else document_ids(tokenizer, one.prompt.text)
        prompts.append(ids)
    # Prompts of one kind and of similar length share a batch, so that no text is longer than its limit.
    keys = [(one.max_new_tokens, one.prompt.stop, -len(ids)) for one, ids in zip(asked, prompts, strict=True)]
    order = sorted(range(len(asked)), key=keys.__getitem__)
    batches: list[list[int]] = []
    for index in order:
        if not batches or len(batches[-1]) == rows or keys[batches[-1][0]][:2] != keys[index][:2]:
            batches.append([])
        batches[-1].append(index)
    texts = [""] * len(asked)
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id
    for batch in batches:
        width = max(len(prompts[index]) for index in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch], device=base.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        first = asked[batch[0]]
        made = model.generate(
            ids,
            attention_mask=mask.to(base.device),
            max_new_tokens=first.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=[*base.end_ids, *(breaks if first.prompt.stop else [])],
        )
        for index, row in zip(batch, made[:, width:], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            texts[index] = text.split(first.prompt.stop)[0] if first.prompt.stop else text
    return Run(texts, time.perf_counter() - begun)


async def ask_plainly(url: str, key: str, model: str, asked: Sequence[Asked], concurrency: int) -> Run:
    """Send the prompts with OpenAI's own client, `concurrency` at a time."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(api_key=key, base_url=url, timeout=600.0) as client:

        async def ask(one: Asked) -> str:
            async with gate:
                reply = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": one.prompt.text}],
                    max_tokens=one.max_new_tokens,
                    temperature=one.temperature,
                )
            return reply.choices[0].message.content or ""

        begun = time.perf_counter()
        texts = await asyncio.gather(*map(ask, asked))
        return Run([*texts], time.perf_counter() - begun)


def compare_local(options: argparse.Namespace, config: Config, scratch: Path) -> dict[str, Any]:
    base = load_base_model(config.model)
    generator = make_generator(config, 0)
    recipe = describe(config)[0].augment
    model = plain_model(config, base, scratch)
    passages = passages_of(options.corpus, options.passages)
    dtype = str(base.model.dtype).removeprefix("torch.")
    count = counter(base.tokenizer)
    print(machine(base.device))
    print(f"{len(passages)} passages, strategy {recipe.strategy}, {options.slots} rows, {dtype}")
    print("| repeat | prompts | ours, tokens/s | generate, one at a time | generate, padded batches | same texts |")
    print("|---|---|---|---|---|---|")
    rates: dict[str, list[float]] = {"ours": [], "generate": [], "generate_padded": []}
    passages_per_s = []
    for repeat in range(options.repeats):
        asked, seconds = run_ours(generator, passages, recipe)
        ours = [one.reply for one in asked]
        rates["ours"].append(count(ours) / seconds)
        passages_per_s.append(len(passages) / seconds)
        alone = run_generate(model, base, asked, 1)
        rates["generate"].append(count(alone.texts) / alone.seconds)
        padded = run_generate(model, base, asked, options.slots)
        rates["generate_padded"].append(count(padded.texts) / padded.seconds)
        same = sum(a == b for a, b in zip(ours, alone.texts, strict=True))
        values = " | ".join(f"{values[-1]:.1f}" for values in rates.values())
        print(f"| {repeat + 1} | {len(asked)} | {values} | {same} of {len(asked)} |", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "x_vs_generate": round(medians["ours"] / medians["generate"], 2),
        "x_vs_padded": round(medians["ours"] / medians["generate_padded"], 2),
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "passages_per_s": round(statistics.median(passages_per_s), 3),
        "strategy": recipe.strategy,
        "prompts": len(asked),
        "slots": options.slots,
        "dtype": dtype,
        "machine": machine(base.device),
    }


def compare_vllm(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    recipe = describe(config)[0].augment
    passages = passages_of(options.corpus, options.passages)
    count = counter(load_tokenizer(resolve_model(config.model.name)))
    generator = make_generator(config, 0)
    assert isinstance(generator, VllmGenerator)
    rates: dict[str, list[float]] = {"ours": [], "plain_client": []}
    per_s: dict[str, list[float]] = {"ours": [], "plain_client": []}
    print(f"{len(passages)} passages, strategy {recipe.strategy}, {options.concurrency} requests in flight")
    print("| repeat | prompts | ours, tokens/s | plain client | ours, passages/s | plain client |")
    print("|---|---|---|---|---|---|")
    try:
        run_ours(generator, passages[:4], recipe)  # the first requests take longer
        for repeat in range(options.repeats):
            asked, seconds = run_ours(generator, passages, recipe)
            rates["ours"].append(count([one.reply for one in asked]) / seconds)
            per_s["ours"].append(len(passages) / seconds)
            plain = asyncio.run(
                ask_plainly(generator.url, generator.key, config.model.name, asked, options.concurrency)
            )
            rates["plain_client"].append(count(plain.texts) / plain.seconds)
            per_s["plain_client"].append(len(passages) / plain.seconds)
            values = [*(f"{v[-1]:.1f}" for v in rates.values()), *(f"{v[-1]:.2f}" for v in per_s.values())]
            print(f"| {repeat + 1} | {len(asked)} | {' | '.join(values)} |", flush=True)
    finally:
        generator.stop()
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain_client"], strict=True)]
    return {
        "x_vs_plain_client": round(statistics.median(ratios), 2),
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "passages_per_s": {name: round(statistics.median(values), 3) for name, values in per_s.items()},
        "requests_in_flight": options.concurrency,
        "machine": machine(),
    }


def counter(tokenizer: Any) -> Callable[[Sequence[str]], int]:
    return lambda texts: sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", default=str(ATLAS / "passages.jsonl"), help="a file of passages")
    parser.add_argument("--passages", type=int, help="how many of them to augment (by default 6, with --vllm 64)")
    parser.add_argument("--strategy", choices=["lines", "paper", "writer"], help="by default as in a run")
    parser.add_argument("--model")
    parser.add_argument("--dtype")
    parser.add_argument("--slots", type=int, default=16, help="rows of the local batch")
    parser.add_argument("--vllm", metavar="COMMAND", help="vLLM's command; arguments of `vllm serve` may follow")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight with --vllm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one passage, a tiny random model, one repeat")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if options.smoke:
            options.passages, options.repeats, options.dtype = 1, 1, "float32"
            options.model = str(write_tiny_model(scratch / "tiny"))
        options.passages = options.passages or (64 if options.vllm else 6)
        augmenting = {"strategy": options.strategy, "concurrency": options.slots, "attempts": 1}
        if options.vllm:
            augmenting |= {"generator": "vllm", "vllm": options.vllm, "concurrency": options.concurrency}
        chosen = {"name": options.model, "dtype": options.dtype}
        config = parse_config(
            {
                "store": str(scratch / "store"),
                "corpus": {"path": options.corpus},
                "model": {key: value for key, value in chosen.items() if value},
                "augment": augmenting,
            }
        )
        found = compare_vllm(options, config) if options.vllm else compare_local(options, config, scratch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
