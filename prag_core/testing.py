"""Helpers for tests and first trials: tiny random models, and a generator with scripted replies.

Nothing is downloaded. A tiny model trains and answers in milliseconds, but its answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prag_core.config import ModelConfig
from prag_core.errors import GenerationError
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.generator import Prompt

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
# Decoders with gated feed-forward layers: name → (prefix of their classes in transformers, further settings). Where the
# prefixes of the configuration and the model differ, they are "configuration:model".
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text:Gemma3", _GEMMA),
    "phi3": ("Phi3", {}),
}


def write_tiny_model(
    folder: Path, *, family: str = "llama", layers: int = 3, hidden: int = 32, feed_forward: int = 48, seed: int = 0
) -> Path:
    """Write a decoder with some ten thousand random weights and a byte-level tokenizer; returns its folder."""
    import torch
    import transformers

    tokenizer = _byte_tokenizer()
    torch.manual_seed(seed)
    names, settings = FAMILIES[family]
    config_name, _, model_name = names.partition(":")
    config = getattr(transformers, f"{config_name}Config")(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    model = getattr(transformers, f"{model_name or config_name}ForCausalLM")(config)
    # The library's small random weights give almost uniform logits, which would hide differences.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_base_model(folder: Path, **options: Any) -> BaseModel:
    """Write a tiny model to `folder` and load it in fp32 on the CPU; `options` are those of `write_tiny_model`."""
    write_tiny_model(folder, **options)
    return load_base_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


class ScriptedGenerator:
    """A generator whose replies are a function of the prompt's text, and which records the prompts in `prompts`.

    A reply may be an error.
    """

    def __init__(self, reply: Callable[[str], str | GenerationError], concurrency: int = 16) -> None:
        self.fingerprint = "scripted"
        self.concurrency = concurrency
        self.prompts: list[str] = []
        self._reply = reply

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        """Return the scripted reply to a prompt; all other arguments are ignored."""
        self.prompts.append(prompt.text)
        return self._reply(prompt.text)

    async def close(self) -> None:
        """Do nothing."""
