"""What tests and first trials need, as a product: a tiny model made in code, and a scripted generator.

Nothing here downloads anything; a tiny model trains and answers in milliseconds, and is wrong about everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# Architectures of gated feed-forward decoders: name → the classes of transformers, and what else they must be told.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    ),
    "gemma3": ("Gemma3Text:Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "phi3": ("Phi3", {}),
}


def write_tiny_model(
    folder: Path, *, family: str = "llama", layers: int = 3, hidden: int = 32, feed_forward: int = 48, seed: int = 0
) -> Path:
    """Write a random decoder of some ten thousand parameters, with a byte-level tokenizer, and return its folder."""
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
    # The library's small random weights give almost uniform logits; larger ones make differences visible.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_base_model(folder: Path, **options: Any) -> BaseModel:
    """Write a tiny model to `folder` (`options` as `write_tiny_model` takes them) and load it in fp32 on the CPU."""
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
    """A generator that answers each prompt by a function of its text, and remembers the prompts it saw.

    It is a `Scorer` too: by `score` of two texts, or 0 (certain) for all. A reply may be an error.
    """

    def __init__(
        self,
        reply: Callable[[str], str | GenerationError],
        score: Callable[[str, str], float] | None = None,
    ) -> None:
        self.fingerprint = "scripted"
        self.prompts: list[str] = []
        self._reply = reply
        self._score = score

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str | GenerationError]:
        """Return the scripted reply to each prompt; the other arguments are accepted and ignored."""
        self.prompts.extend(prompt.text for prompt in prompts)
        return [self._reply(prompt.text) for prompt in prompts]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the scripted score of each pair of texts."""
        return [self._score(before, text) if self._score else 0.0 for before, text in pairs]
