"""Loading the frozen base model, and checking by its fingerprint that it is the expected one."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from dataclasses import dataclass
from typing import Any

from prag_core.config import ModelConfig
from prag_core.errors import ModelError
from prag_core.llm.chat import end_ids
from prag_core.llm.checkpoint import load_tokenizer, resolve_model, silence_progress
from prag_core.llm.memory import prepare_cuda
from prag_core.llm.model_facts import model_fingerprint

# What the decoder passes to a model's forward pass. transformers' models take any other name without an error, so
# under another name in another release each token would be answered as if nothing came before it.
_FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache")


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


def load_base_model(config: ModelConfig, *, expected: str | None = None, gpus: float | None = None) -> BaseModel:
    """Load a base model onto a device, with frozen weights.

    Args:
        config: The model's name, dtype and device.
        expected: The fingerprint that the model must have; a worker gets it from the driver.
        gpus: How many GPUs this process holds; see `choose_device`.

    Raises:
        ModelError: when the model cannot be found or loaded, has another fingerprint than expected, cannot decode with
            this release of transformers, or when torch cannot use the device.
    """
    from transformers import AutoModelForCausalLM

    from prag_core.llm.packed_linear import pack_linear

    silence_progress()
    folder = resolve_model(config.name)
    found = model_fingerprint(folder)
    if expected is not None and found != expected:
        raise ModelError(
            f"model.name = {config.name!r} has the fingerprint {found} here, but {expected} where the run started",
            "put the same model files on each node",
        )
    device = choose_device(config.device, gpus)
    # Its declared type is that of a call without the loading info.
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loaded = load(folder, dtype=choose_dtype(config.dtype, device), output_loading_info=True)
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
        _check_forward(model)
        model.to(device)
    except ModelError:
        raise
    except Exception as error:  # a damaged file makes transformers' code raise whatever it happens to lead to
        raise ModelError(
            f"model.name = {config.name!r} cannot be loaded on {device}: {type(error).__name__}: {error}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    pack_linear(model)
    return BaseModel(config.name, found, model, load_tokenizer(folder))


def choose_device(device: str, gpus: float | None = None) -> str:
    """Return the device of a process, `cpu` or `cuda`, and set torch up for it.

    Args:
        device: `auto`, `cpu` or `cuda`. With `auto` a process that holds GPUs computes on them, and one that holds none
            on the CPU, even where it sees a GPU: that one is another's.
        gpus: How many GPUs the process holds, or which part of one; None where nobody assigns GPUs, as in a notebook.
            With `auto` it then computes on a GPU if torch finds one.

    Raises:
        ModelError: when it is `cuda`, and torch cannot compute there.
    """
    import torch

    if device == "auto":
        device = "cuda" if (torch.cuda.is_available() if gpus is None else gpus) else "cpu"
    if device == "cuda":
        try:
            prepare_cuda(1 if gpus is None else gpus)
            # A card may be there for which this torch has no kernels.
            ones = torch.ones(16, 16, device="cuda")
            (ones @ ones).sum().item()
        except (RuntimeError, AssertionError) as error:
            build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            holds = f"this process holds {gpus:g} GPUs" if gpus else "model.device = 'cuda'"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{holds}, but torch ({build}) cannot compute on a GPU here: {reason}",
                "check that nvidia-smi shows the GPU and that torch is built for CUDA, no newer than the driver; or "
                "compute on CPUs: model.device=cpu",
            ) from error
    return device


def _check_forward(model: Any) -> None:
    """Check that a model's forward pass knows what the decoder passes to it.

    Raises:
        ModelError: when it does not.
    """
    # Prompts are read without the head, by the decoder alone.
    parts = (model, model.get_decoder())
    known = set.intersection(*({*inspect.signature(part.forward).parameters} for part in parts))
    if missing := [name for name in _FORWARD_ARGUMENTS if name not in known]:
        raise ModelError(
            f"{type(model).__name__} of transformers {importlib.metadata.version('transformers')} takes no "
            f"{', '.join(missing)}, without which it would answer wrongly",
            "install the release of transformers that prag-ray requires; or use another model, such as a Llama or Qwen",
        )


def choose_dtype(name: str, device: str) -> Any:
    """Return the torch dtype that `model.dtype` names; `auto` is bf16 where `device` multiplies it natively."""
    import torch

    if name == "auto":
        # Without bf16 instructions a CPU or an older GPU emulates them, at a fraction of the speed of fp32.
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)
