"""Reading and writing adapters as folders in PEFT's format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from prag_core.errors import AdapterError
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, check_factors

_PEFT_NAME = re.compile(r"layers\.(\d+)\..*?(\w+)\.lora_([AB])\.weight$")


def export_peft(layout: LoraLayout, factors: Factors, folder: Path, base_model: str) -> None:
    """Write an adapter as a PEFT folder, which `PeftModel.from_pretrained` can load onto the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for target in layout.targets:
        for position, layer in enumerate(layout.layers):
            prefix = f"base_model.model.model.layers.{layer}.mlp.{target}"
            tensors[f"{prefix}.lora_A.weight"] = factors[f"{target}.A"][position].float().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = factors[f"{target}.B"][position].float().contiguous()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": layout.rank,
        "lora_alpha": layout.scale * layout.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layout.targets),
        "layers_to_transform": list(layout.layers),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def import_peft(layout: LoraLayout, folder: Path) -> dict[str, Tensor]:
    """Return the fp32 factors of a LoRA folder that `export_peft` or PEFT wrote.

    Raises:
        AdapterError: when the folder holds no LoRA adapter, or differs from the layout in rank, scale, modules or
            shapes. A tensor that the layout does not have is an error too.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{folder}: not a readable PEFT adapter: {error}", "name a folder that PEFT wrote") from None
    rank, scale = config.get("r"), config.get("lora_alpha", 0) / (config.get("r") or 1)
    if config.get("use_rslora") or (rank, scale) != (layout.rank, layout.scale):
        raise AdapterError(
            f"{folder}: rank {rank}, alpha / rank {scale:g}; the recipe has rank {layout.rank}, {layout.scale:g}",
            "set train.rank and train.alpha to those of the adapter",
        )
    stacked: dict[str, dict[int, Tensor]] = {name: {} for name in layout.tensor_shapes}
    for name, tensor in tensors.items():
        match = _PEFT_NAME.search(name)
        place = f"{match.group(2)}.{match.group(3)}" if match else ""
        if match is None or place not in stacked or int(match.group(1)) not in layout.layers:
            raise AdapterError(
                f"{folder}: holds {name}, but the recipe adapts {', '.join(layout.targets)} of layers "
                f"{layout.layers[0]} to {layout.layers[-1]}",
                "set train.targets and train.last_layers to those of the adapter",
            )
        stacked[place][int(match.group(1))] = tensor.float()
    missing = [f"layer {n} {name}" for name, found in stacked.items() for n in layout.layers if n not in found]
    if missing:
        raise AdapterError(f"{folder}: lacks {missing[0]} and {len(missing) - 1} more", "name a complete adapter")
    factors = {name: torch.stack([found[n] for n in layout.layers]) for name, found in stacked.items()}
    check_factors(layout, factors, str(folder))
    return factors
