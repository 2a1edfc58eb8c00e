"""Passage → Augmentation or Reject: rewrites, and questions with their answers.

Three strategies make the questions. With `paper`, an instruction-following model writes them as JSON (Su et al. 2025,
section 3.1); with `lines`, it writes them one a line, in several drafts. With `writer`, a model of some hundred million
parameters does what one adapter has taught it: it names facts, asks for them, and answers. Cloze questions, made by
rules, can fill up the pairs of each strategy, and those of an imported augmentation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from prag_core.augmentation.cloze import add_cloze_pairs
from prag_core.augmentation.coverage import coverage
from prag_core.augmentation.filter import Draft
from prag_core.augmentation.lines import add_line_pairs
from prag_core.augmentation.paper import add_pairs, add_rewrites
from prag_core.augmentation.writer import add_written_pairs
from prag_core.errors import PromptTooLongError
from prag_core.llm.generator import Generator
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, Reject

_STRATEGIES = {
    "lines": add_line_pairs,
    "paper": add_pairs,
    "writer": add_written_pairs,
}


def augment(passages: Sequence[Passage], generator: Generator, recipe: AugmentRecipe) -> list[Augmentation | Reject]:
    """Make rewrites and question-answer pairs of some passages, in common batches; return the results in their order.

    Eight to sixteen passages in a call keep a local model busy. After `recipe.attempts` an augmentation may have fewer
    rewrites or pairs than the recipe asks for. A passage without any pair is a reject, with the reason
    `no_usable_pair`, `too_long_for_model` or `generation_failed`.

    Raises:
        GenerationError: when the generator cannot be used, or failed for each of several passages.
    """
    started = time.monotonic()
    drafts = [Draft(passage, wanted_pairs(passage, recipe.pairs)) for passage in passages]
    add = _STRATEGIES[recipe.strategy]
    for attempt in range(recipe.attempts):
        drafts_open = [draft for draft in drafts if _is_open(draft, recipe)]
        for draft in drafts_open:
            draft.attempts += 1
            draft.error = None
        add_rewrites(drafts_open, generator, recipe, attempt)
        add([draft for draft in drafts_open if len(draft.pairs) < draft.wanted], generator, recipe, attempt)
    seconds = (time.monotonic() - started) / max(1, len(drafts))
    for draft in drafts:
        # They must not hide that the generator failed.
        if recipe.cloze and not draft.error:
            add_cloze_pairs(draft)
    results = [_result(draft, seconds) for draft in drafts]
    failed = [draft.error for draft in drafts if draft.error]
    if len(failed) > 1 and all(isinstance(r, Reject) and r.reason == "generation_failed" for r in results):
        # If all fail, the generator is to blame and not the passages: a server that is down must not reject a corpus.
        raise failed[0]
    return results


def complete(passage: Passage, augmentation: Augmentation, recipe: AugmentRecipe) -> Augmentation:
    """Return an imported augmentation with its coverage, and if the recipe says so, filled up with cloze pairs."""
    draft = Draft(passage, wanted_pairs(passage, recipe.pairs), pairs=list(augmentation.pairs))
    if recipe.cloze:
        add_cloze_pairs(draft)
    return replace(augmentation, pairs=tuple(draft.pairs), coverage=coverage(passage, draft.pairs))


# How many pairs to make of a passage where the configuration does not say.
_WORDS_PER_PAIR = 7
_FEWEST_PAIRS = 8
MOST_PAIRS = 24


def wanted_pairs(passage: Passage, pairs: int) -> int:
    """Return how many pairs to make of a passage: `pairs`, or if it is 0 one for each 7 words, from 8 to 24."""
    return pairs or min(MOST_PAIRS, max(_FEWEST_PAIRS, len(passage.text.split()) // _WORDS_PER_PAIR))


def _is_open(draft: Draft, recipe: AugmentRecipe) -> bool:
    short = len(draft.pairs) < draft.wanted or len(draft.rewrites) < recipe.rewrites
    return short and not isinstance(draft.error, PromptTooLongError)


def _result(draft: Draft, seconds: float) -> Augmentation | Reject:
    if draft.error:
        draft.refused["no_reply"] += 1
    refused = tuple(f"{reason}={count}" for reason, count in sorted(draft.refused.items()))
    passage = draft.passage
    if draft.pairs and not isinstance(draft.error, PromptTooLongError):
        return Augmentation(
            key=passage.key,
            rewrites=tuple(draft.rewrites),
            pairs=tuple(draft.pairs),
            origin="generated",
            refused=refused,
            attempts=draft.attempts,
            seconds=seconds,
            coverage=coverage(passage, draft.pairs),
        )
    if isinstance(draft.error, PromptTooLongError):
        reason, detail = "too_long_for_model", draft.error.message
    elif draft.error:
        reason, detail = "generation_failed", draft.error.message
    else:
        reason, detail = "no_usable_pair", f"refused: {', '.join(refused) or 'nothing was proposed'}"
    source = passage.sources[0] if passage.sources else ""
    return Reject("augment", reason, detail, source, passage.key, draft.attempts)
