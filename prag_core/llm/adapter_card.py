"""The README.md of an adapter in PEFT's format: what it is, how it was made, and code that asks it a question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from prag_core.errors import InputError
from prag_core.llm.peft import FILE_MODE, PeftBase
from prag_core.prompts import MAX_NEW_TOKENS, answer_messages, answer_prefix, brief_text
from prag_core.recipe import Recipe
from prag_core.records import Template

CARD = "README.md"
_QUESTION = "What do you want to know?"


@dataclass(frozen=True)
class AdapterCard:
    """What the card says of one passage's adapter.

    `key`, `title` and `sources` name the passage, whose text is not in the card. `steps`, `tokens`, `first_loss`,
    `last_loss` and `seconds` are those of its training; without steps the adapter was made elsewhere.
    """

    recipe: Recipe
    key: str
    title: str
    sources: tuple[str, ...]
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float


def write_card(folder: Path, base: PeftBase, card: AdapterCard) -> None:
    """Write the card into the folder of an exported adapter.

    Raises:
        InputError: when it cannot be written.
    """
    file = folder / CARD
    try:
        file.write_text(card_text(base, card), encoding="utf-8")
        file.chmod(FILE_MODE)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error}", "name another folder, or make room there") from error


def card_text(base: PeftBase, card: AdapterCard) -> str:
    """Return the card in Markdown, with the YAML header that model hubs read."""
    header = {
        "base_model": base.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        # An adapter holds what its passage says, so the passage's owner has a say in it. Nobody has stated a licence.
        "license": "unknown",
        "tags": ["lora", "parametric-rag"],
    }
    train, augment = card.recipe.train, card.recipe.augment
    named = f"`{base.name}`, fingerprint `{base.facts.fingerprint}`"
    trained = (
        f"{card.steps} steps, {card.tokens} tokens, {card.seconds:.1f} s"
        if card.steps
        else "not trained here: imported from a PEFT folder"
    )
    rows = {
        "passage": f"{_cell(card.title) or '(no title)'}, key `{card.key}`",
        "sources": ", ".join(f"`{_cell(source)}`" for source in card.sources) or "(none)",
        "base model": f"{named}, revision `{base.revision}`" if base.revision else named,
        "recipe": f"`{train.name}`, fingerprint `{card.recipe.fingerprint}`",
        "LoRA": f"rank {train.rank}, alpha {train.alpha:g}, {', '.join(train.targets)}"
        + (f", last {train.last_layers} layers" if train.last_layers else ""),
        "question-answer pairs": "imported" if augment.imported else f"strategy `{augment.strategy}`",
        "prompt": f"`{train.template}`",
        "training": trained,
    }
    if card.steps:
        rows["loss"] = f"{card.first_loss:.3f} in the first epoch, {card.last_loss:.3f} in the last"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# LoRA adapter of one passage

This adapter holds the facts of one passage, so that the base model answers questions about it without reading it.

| | |
|---|---|
{table}

`license` in the header is `unknown`: set it to one that the passage's and the base model's licences allow.

## How to load it
Run this in the adapter's folder. The prompt is the one on which the adapter was trained; other words work less well.

```python
{_loading_code(base, train.template)}
```
"""


def _loading_code(base: PeftBase, template: Template) -> str:
    """Return Python code that loads the adapter with PEFT and asks a question in the words of its training."""
    revision = f", revision={json.dumps(base.revision)}" if base.revision else ""
    prefix = answer_prefix(template)
    if template == "brief":
        prompt = [f"prompt = {_format(brief_text(_QUESTION) + prefix)}", 'ids = tokenizer(prompt, return_tensors="pt")']
    else:
        (message,) = answer_messages(_QUESTION, template=template)
        prompt = [
            f'turns = [{{"role": "user", "content": {_format(message["content"])}}}]',
            "prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
            f'ids = tokenizer(prompt + {json.dumps(prefix)}, add_special_tokens=False, return_tensors="pt")',
        ]
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = {json.dumps(base.location)}",
        f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{revision}), ".")',
        "",
        f"question = {json.dumps(_QUESTION)}",
        *prompt,
        f"answer = model.generate(**ids, max_new_tokens={MAX_NEW_TOKENS[template]}, do_sample=False)[0]",
        'text = tokenizer.decode(answer[ids["input_ids"].shape[1] :], skip_special_tokens=True)',
        r'print(text.partition("\n")[0])',
    ]
    return "\n".join(lines)


def _format(text: str) -> str:
    """Return a prompt as Python code: a formatted string with the question as its variable."""
    return "f" + json.dumps(text.replace("{", "{{").replace("}", "}}").replace(_QUESTION, "{question}"))


def _cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())
