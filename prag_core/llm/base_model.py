"""Loading the frozen base model, and checking by its fingerprint that it is the expected one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from prag_core.config import ModelConfig
from prag_core.errors import ModelError
from prag_core.llm.chat import end_ids
from prag_core.llm.checkpoint import load_tokenizer, resolve_model, silence_progress
from prag_core.llm.model_facts import model_fingerprint


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen causal language model with its tokenizer and their common fingerprint."""

    name: str
    fingerprint: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> Any:
        """The torch device that the weights are on."""
        return next(self.model.parameters()).device

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a text, whoever decodes it."""
        return end_ids(self.tokenizer, getattr(self.model, "generation_config", None))


def load_base_model(config: ModelConfig, *, expected: str | None = None) -> BaseModel:
    """Load a base model onto a device, with frozen weights.

    Args:
        config: The model's name, dtype and device.
        expected: The fingerprint that the model must have; a worker gets it from the driver.

    Raises:
        ModelError: when the model cannot be found or loaded, or has another fingerprint than expected.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from prag_core.llm.skinny_linear import use_few_rows

    silence_progress()
    folder = resolve_model(config.name)
    found = model_fingerprint(folder)
    if expected is not None and found != expected:
        raise ModelError(
            f"model.name = {config.name!r} has the fingerprint {found} here, but {expected} where the run started",
            "put the same model files on each node",
        )
    check_device(config.device)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Its declared type is that of a call without the loading info.
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loaded = load(folder, dtype=_dtype(config.dtype, device), output_loading_info=True)
        if missing := sorted(loaded["missing_keys"]):
            raise ModelError(
                f"{folder}: its weights lack {missing[0]} and {len(missing) - 1} more, which would be random",
                "get the model again, or name the config.json that belongs to these weights",
            )
        known, unexpected = {*model.state_dict()}, sorted(loaded["unexpected_keys"])
        if left := [name for name in unexpected if re.sub(r"\.\d+\.", ".0.", name, count=1) in known]:
            raise ModelError(
                f"{folder}: its config.json leaves out layers: the weights hold {left[0]} and {len(left) - 1} more",
                "get the model again, or name the config.json that belongs to these weights",
            )
        model.to(device)
    except ModelError:
        raise
    except Exception as error:  # a damaged file makes transformers' code raise whatever it happens to lead to
        raise ModelError(
            f"model.name = {config.name!r} cannot be loaded on {device}: {type(error).__name__}: {error}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    use_few_rows(model)
    return BaseModel(config.name, found, model, load_tokenizer(folder))


def check_device(device: str) -> str:
    """Check that this machine has the device that `model.device` names; return what will be used, in words.

    Raises:
        ModelError: when it is `cuda`, and torch finds no GPU here.
    """
    if device != "cuda":
        return device
    import torch

    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ModelError(
            f"model.device = 'cuda', but torch ({build}) finds no GPU on this machine",
            "set model.device to auto or cpu, or check that nvidia-smi shows the GPU and that torch is built for CUDA",
        )
    return torch.cuda.get_device_name()


def _dtype(name: str, device: str) -> Any:
    import torch

    if name == "auto":
        # A CPU without bf16 instructions emulates them, at a tenth of the speed of fp32.
        native = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)
