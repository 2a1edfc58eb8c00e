"""A tiny model that writes what a test tells it to, in tokens that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prag_core.config import ModelConfig
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.chat import text_ids

# Bytes that no text in UTF-8 has, or hardly any.
_RARE = ("Ã", "Ä", "Å", "Æ")


def follow(base: BaseModel, text: str, then: Sequence[int]) -> Any:
    """Make a model write the tokens of `then` after the last token of `text`, and the first one again after them.

    Return the handle that ends it.
    """
    chain = [text_ids(base.tokenizer, text)[-1], *then]
    after = dict(zip(chain, [*then, then[0]], strict=True))

    def write(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        for row, ids in enumerate(keywords["input_ids"].tolist()):
            output.logits[row, -1] = -1e9
            output.logits[row, -1, after.get(ids[-1], 3)] = 0.0

    return base.model.register_forward_hook(write, with_kwargs=True)


def with_tokens(base: BaseModel, folder: Path, tokens: Sequence[str]) -> BaseModel:
    """Return a copy of a tiny model that has tokens of several bytes, in the byte-level alphabet (Ċ is a line end)."""
    base.tokenizer.save_pretrained(folder)
    base.model.save_pretrained(folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    for token, rare in zip(tokens, _RARE, strict=False):
        document["model"]["vocab"][token] = document["model"]["vocab"].pop(rare)
    path.write_text(json.dumps(document))
    return load_base_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))
