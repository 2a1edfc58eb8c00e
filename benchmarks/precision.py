"""Compare adapters and answers of training in bf16 with those in fp32: `python benchmarks/precision.py`.

The same passages are trained on the base model in fp32 and in bf16, with factors in fp32 both times. The comparison
covers ΔW, and the answers of the fp32 model with either set of adapters. Where the processor does not multiply bf16
natively, it is simulated in fp32: the weights and the outputs of each module, forward and backward, are rounded to
bf16. Sums are not rounded, as in hardware. The scores over the vocabulary and the factors in their products are not
rounded either, although real bf16 would round them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from measure import machine
from torch import Tensor, nn
from train import ATLAS, from_atlas

from pipelines.jobs.demo import read_demo_questions
from prag_core.config import ModelConfig
from prag_core.evaluation.metrics import f1, paired_bootstrap
from prag_core.inference.engine import Engine
from prag_core.inference.processor import RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors
from prag_core.recipe import RECIPES
from prag_core.records import Augmentation, Hit, Mode, Passage
from prag_core.training.examples import TrainingJob, training_examples
from prag_core.training.trainer import Trainer

RECIPE = RECIPES["recall"]
MODES: tuple[Mode, ...] = ("prag", "combine")


class _Rounded(torch.autograd.Function):
    """Round to bf16 in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return `x` rounded to bf16, in its own dtype."""
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient rounded to bf16, in its own dtype."""
        (gradient,) = gradients
        return gradient.bfloat16().to(gradient.dtype)


def simulate_bf16(base: BaseModel) -> None:
    """Round the weights of an fp32 model in place, and from now on the output of each of its modules."""
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.copy_(parameter.bfloat16())
    for module in base.model.modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(
                lambda _module, _inputs, output: _Rounded.apply(output) if isinstance(output, Tensor) else None
            )


def train(
    base: BaseModel, corpus: Sequence[tuple[Passage, Augmentation]], budget: int
) -> tuple[dict[str, dict[str, Tensor]], LoraLayout]:
    """Return the factors of each passage, by key, and their layout."""
    trainer = Trainer(base, RECIPE)
    jobs = [TrainingJob(p.key, training_examples(base.tokenizer, p, a, RECIPE)) for p, a in corpus]
    trained = {}
    for adapter in trainer.train(jobs, tokens_per_step=budget):
        if adapter.factors is None:
            raise RuntimeError(f"{adapter.key}: {adapter.failure}")
        trained[adapter.key] = adapter.factors
    trainer.close()
    return trained, trainer.layout


class Adapters:
    """The adapters of one training, as an `AdapterSource` for an engine."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = factors

    def get(self, key: str) -> Factors:
        """Return a passage's factors."""
        return self._factors[key]


class NoIndex:
    """A retriever without an index, for questions that bring their passage."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        """Return no hits."""
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model: a name or a folder")
    parser.add_argument("--passages", type=int, default=8, help="passages of the example corpus to train")
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    print(json.dumps(measure(parser.parse_args())))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    corpus = from_atlas()[: arguments.passages]
    fp32 = load_base_model(ModelConfig(name=arguments.model, dtype="float32"))
    bf16 = load_base_model(ModelConfig(name=arguments.model))
    native = bf16.model.dtype == torch.bfloat16
    if not native:
        simulate_bf16(bf16)
    print(f"{machine(fp32.device)}; bf16 {'native' if native else 'simulated'}; {len(corpus)} passages")

    # 1. ΔW.
    factors, layout = train(fp32, corpus, arguments.tokens_per_step)
    rounded, _ = train(bf16, corpus, arguments.tokens_per_step)
    differences = sorted(
        relative_difference(rounded[key], factors[key], target, position)
        for key in factors
        for target in layout.targets
        for position in range(len(layout.layers))
    )
    middle, worst = statistics.median(differences), differences[-1]
    print(f"ΔW: median {middle:.4f}, worst {worst:.4f} of {len(differences)} matrices")

    # 2. Answers.
    passages = {source: passage for passage, _ in corpus for source in passage.sources}
    questions = read_demo_questions(ATLAS / "questions.jsonl", passages)
    scores: dict[str, dict[str, list[float]]] = {}
    for name, adapters in (("fp32", factors), ("bf16", rounded)):
        engine = Engine(fp32, RECIPE, RequestProcessor(fp32, NoIndex()), Adapters(adapters))
        scores[name] = {}
        for mode in MODES:
            requests = [Request(q.question, mode, hits=(Hit(passages[q.gold[0].id], 1.0),)) for q in questions]
            answers = engine.answer_batch(requests)
            scores[name][mode] = [f1(a.text, q.answers) for a, q in zip(answers, questions, strict=True)]
        engine.close()
    change = {}
    for mode in MODES:
        groups = [question.gold[0].id for question in questions]
        mean, low, high = paired_bootstrap(scores["bf16"][mode], scores["fp32"][mode], groups)
        change[mode] = [round(mean, 4), round(low, 4), round(high, 4)]
        fp32_f1, bf16_f1 = (statistics.mean(scores[name][mode]) for name in ("fp32", "bf16"))
        print(f"{mode}: F1 {fp32_f1:.3f} in fp32, {bf16_f1:.3f} in bf16 ({len(questions)} questions)")
    return {
        "dw_median": round(middle, 4),
        "dw_worst": round(worst, 4),
        "f1": {
            name: {mode: round(statistics.mean(s), 4) for mode, s in by_mode.items()}
            for name, by_mode in scores.items()
        },
        "f1_change": change,
        "bf16": "native" if native else "simulated",
        "machine": machine(fp32.device),
    }


def relative_difference(found: Factors, wanted: Factors, target: str, position: int) -> float:
    """Return ‖ΔW' − ΔW‖ / ‖ΔW‖ of one module of one layer."""
    one, other = (f[f"{target}.B"][position] @ f[f"{target}.A"][position] for f in (found, wanted))
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    main()
