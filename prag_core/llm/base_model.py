"""Finding, naming and loading the frozen base model.

A base model is a folder or a hub name as transformers takes them, or the name of a model that a Python package
carries (`PACKAGED`), which is converted once into the cache folder. Its fingerprint is over weights and
vocabulary, so that a store made for one model is never used with another.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from prag_core.config import ModelConfig
from prag_core.errors import ModelError
from prag_core.llm.checkpoint import load_tokenizer, resolve_model, silence_progress
from prag_core.llm.model_facts import model_fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen causal language model with its tokenizer and the fingerprint of both."""

    name: str
    fingerprint: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> Any:
        """The torch device that the weights are on."""
        return next(self.model.parameters()).device


def load_base_model(config: ModelConfig, *, expected: str | None = None) -> BaseModel:
    """Load the base model frozen, in `config.dtype`, on `config.device`.

    Args:
        config: Which model, in which type, where.
        expected: The fingerprint that it must have, when the caller knows it (a worker is told by the driver).

    Raises:
        ModelError: when it cannot be found or loaded, or is another model than expected.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from prag_core.llm.skinny_linear import use_few_rows

    silence_progress()
    folder = resolve_model(config.name)
    found = model_fingerprint(folder)
    if expected is not None and found != expected:
        raise ModelError(
            f"model.name = {config.name!r} has the fingerprint {found} here, and {expected} where the run started",
            "put the same model files on each node",
        )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(config.dtype, device))
        model.to(device)  # type: ignore[arg-type]  # its decorator hides the parameter's type
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.name = {config.name!r} cannot be loaded on {device}: {error}") from error
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    use_few_rows(model)
    return BaseModel(config.name, found, model, load_tokenizer(folder))


def _dtype(name: str, device: str) -> Any:
    import torch

    if name == "auto":
        # A CPU without bf16 instructions emulates them, at a tenth of the speed of fp32.
        native = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)
