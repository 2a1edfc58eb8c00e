"""What the strategies share that ask a model for text: how it samples, and what its reply says."""

from __future__ import annotations

from prag_core.augmentation.filter import Draft
from prag_core.errors import GenerationError, PromptTooLongError, UnfinishedReplyError
from prag_core.llm.reply import reply_content
from prag_core.prompts import passage_text
from prag_core.recipe import AugmentRecipe

TEMPERATURE = 0.7
TOP_K = 50
_NO_REASONING = "augment with a model that does not reason, or turn its reasoning off"
# What a passage's replies may have in addition, once one of them was cut off in its reasoning.
_REASONING_TOKENS = 2048


def reasoning_room(draft: Draft) -> int:
    """Return how many more tokens than usual the replies about a draft may have."""
    return _REASONING_TOKENS if draft.reasons else 0


def read_reply(draft: Draft, reply: str | GenerationError) -> str | None:
    """Return what a reply says; if it says nothing, note the reason in the draft and return None."""
    if isinstance(reply, PromptTooLongError) and draft.reasons:
        reply = UnfinishedReplyError(f"there is no room for the model's reasoning: {reply.message}", _NO_REASONING)
    if isinstance(reply, str):
        content = reply_content(reply, passage_text(draft.passage))
        if content is not None:
            return content
        reply = UnfinishedReplyError("the model's reply ended before its reasoning did", _NO_REASONING)
    draft.reasons = draft.reasons or isinstance(reply, UnfinishedReplyError)
    draft.error = reply
    return None


def attempt_seed(recipe: AugmentRecipe, attempt: int, number: int) -> int:
    """Return the seed of an attempt's `number`-th call."""
    return recipe.seed + 1_000 * attempt + number
