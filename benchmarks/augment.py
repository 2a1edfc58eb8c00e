"""Compare the batched generator with transformers' `generate`, one prompt at a time: `python benchmarks/augment.py`.

The prompts are those of augmenting a few passages: one for a rewrite of each, one for its pairs. Both generators take
turns. They continue the prompts greedily, with the same model and dtype, up to the same limits. The rate counts the
tokens of the resulting texts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import machine

from prag_core.augmentation.augment import augment
from prag_core.config import CorpusConfig, ModelConfig
from prag_core.data.corpus import Piece, merge_pieces, read_records
from prag_core.data.listing import list_files
from prag_core.errors import GenerationError
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.generator import Prompt, TransformersGenerator
from prag_core.recipe import AugmentRecipe
from prag_core.records import Passage
from prag_core.testing import write_tiny_model

ATLAS = Path(__file__).parent.parent / "pipelines" / "examples" / "atlas"


@dataclass(frozen=True)
class Call:
    """One call of the augmentation to its generator."""

    prompts: Sequence[Prompt]
    max_new_tokens: int


class Recorder:
    """A generator that records its calls and answers with empty texts."""

    fingerprint = "recorder"

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str | GenerationError]:
        self.calls.append(Call(prompts, max_new_tokens))
        return [""] * len(prompts)


def passages_of(corpus: str, count: int) -> list[Passage]:
    config = CorpusConfig(path=corpus, limit=count)
    (file,) = list_files(config).files
    pieces = (piece for piece in read_records(file, config) if isinstance(piece, Piece))
    return [merge_pieces([piece]) for piece, _ in zip(pieces, range(count), strict=False)]


def calls_of(passages: Sequence[Passage], strategy: str) -> list[Call]:
    recorder = Recorder()
    recipe = AugmentRecipe("recorder", strategy, pairs=3, rewrites=1, attempts=1, seed=0, imported=False)
    augment(passages, recorder, recipe)
    return recorder.calls


def texts_of_ours(base: BaseModel, calls: Sequence[Call], slots: int) -> list[str]:
    generator = TransformersGenerator(base, max_batch=slots)
    return [
        str(text) for call in calls for text in generator.generate(call.prompts, max_new_tokens=call.max_new_tokens)
    ]


def texts_of_generate(base: BaseModel, calls: Sequence[Call]) -> list[str]:
    tokenizer = base.tokenizer
    texts = []
    for call in calls:
        for prompt in call.prompts:
            message = [{"role": "user", "content": prompt.text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(base.device)["input_ids"]
            made = base.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=prompt.limit(call.max_new_tokens),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", default=str(ATLAS / "passages.jsonl"), help="a file of passages")
    parser.add_argument("--passages", type=int, default=6, help="how many of them to augment")
    parser.add_argument("--strategy", choices=["lines", "paper"], default="lines")
    parser.add_argument("--model", default=ModelConfig().name)
    parser.add_argument("--dtype", default=ModelConfig().dtype)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one passage, a tiny random model, one repeat")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.smoke:
            options.passages, options.repeats, options.dtype = 1, 1, "float32"
            options.model = str(write_tiny_model(Path(scratch)))
        base = load_base_model(ModelConfig(name=options.model, dtype=options.dtype))
    calls = calls_of(passages_of(options.corpus, options.passages), options.strategy)
    prompts = sum(len(call.prompts) for call in calls)
    dtype = str(base.model.dtype).removeprefix("torch.")
    print(machine(base.device))
    print(f"{options.passages} passages, {prompts} prompts in {len(calls)} calls, {options.slots} slots, {dtype}")

    def rate(texts: list[str], seconds: float) -> float:
        return sum(len(base.tokenizer.encode(text, add_special_tokens=False)) for text in texts) / seconds

    print("| repeat | ours, tokens/s | generate, tokens/s | same texts |")
    print("|---|---|---|---|")
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    for repeat in range(options.repeats):
        begun = time.perf_counter()
        ours = texts_of_ours(base, calls, options.slots)
        rates["ours"].append(rate(ours, time.perf_counter() - begun))
        begun = time.perf_counter()
        theirs = texts_of_generate(base, calls)
        rates["generate"].append(rate(theirs, time.perf_counter() - begun))
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f"| {repeat + 1} | {rates['ours'][-1]:.1f} | {rates['generate'][-1]:.1f} | {same} of {prompts} |")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "x_vs_generate": round(medians["ours"] / medians["generate"], 2),
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "prompts": prompts,
        "slots": options.slots,
        "dtype": dtype,
        "machine": machine(base.device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
