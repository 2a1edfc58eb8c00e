"""Stacked training against the plain PEFT loop, side by side in one run: `python benchmarks/stacked_training.py`.

Both train the same passages of the example corpus by the recipe `closed_book`, one epoch, without padding for the
PEFT loop; the last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from prag_core.augment_import import read_augmentations
from prag_core.config import CorpusConfig, ModelConfig
from prag_core.corpus import Piece, merge_pieces, read_records
from prag_core.examples import training_examples
from prag_core.models import BaseModel, load_base_model
from prag_core.recipe import RECIPES, TrainRecipe
from prag_core.trainer import Trainer, TrainingJob

ATLAS = Path(__file__).parent.parent / "examples" / "atlas"
PASSAGES = 4
REPEATS = 3


def jobs_of(base: BaseModel, recipe: TrainRecipe) -> list[TrainingJob]:
    config = CorpusConfig(path=str(ATLAS / "passages.jsonl"), limit=PASSAGES)
    augmentations = read_augmentations(str(ATLAS / "augmentations.jsonl"))
    jobs = []
    for piece in read_records(config.path, config):
        if len(jobs) == PASSAGES:
            break
        if not isinstance(piece, Piece):
            continue
        passage = merge_pieces([piece])
        augmentation = augmentations.find(passage)
        if augmentation is not None:
            examples = training_examples(base.tokenizer, passage, augmentation, recipe)
            jobs.append(TrainingJob(passage.key, tuple(map(tuple, examples))))
    return jobs


def seconds_with_peft(base: BaseModel, jobs: list[TrainingJob], recipe: TrainRecipe) -> float:
    begun = time.perf_counter()
    for job in jobs:
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets))
        model = get_peft_model(base.model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)
        for example in job.examples:
            ids = torch.tensor([example], device=base.device)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.unload()
    return time.perf_counter() - begun


def seconds_stacked(base: BaseModel, jobs: list[TrainingJob], recipe: TrainRecipe) -> float:
    trainer = Trainer(base, recipe)
    begun = time.perf_counter()
    list(trainer.train(jobs, tokens_per_step=4096))
    seconds = time.perf_counter() - begun
    trainer.close()
    return seconds


def main() -> None:
    base = load_base_model(ModelConfig())
    recipe = replace(RECIPES["closed_book"], epochs=1)
    jobs = jobs_of(base, recipe)
    tokens = sum(job.tokens for job in jobs)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {base.model.dtype}, {base.device}")
    print(f"{len(jobs)} passages, {tokens} tokens an epoch")
    peft, stacked = [], []
    for repeat in range(REPEATS):
        peft.append(seconds_with_peft(base, jobs, recipe))
        stacked.append(seconds_stacked(base, jobs, recipe))
        print(f"repeat {repeat + 1}: PEFT one by one {peft[-1]:.1f} s, stacked {stacked[-1]:.1f} s")
    left, right = statistics.median(peft), statistics.median(stacked)
    print(json.dumps({"peft_s": round(left, 2), "stacked_s": round(right, 2), "x_vs_peft": round(left / right, 2)}))


if __name__ == "__main__":
    main()
