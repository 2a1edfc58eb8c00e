"""Reading and writing adapters as folders in PEFT's format.

An import must mean here what it means in PEFT. So each field of a PEFT configuration is known, with the values that
mean a plain LoRA adapter, and every other field or value is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from prag_core.data.parsing import parse_json
from prag_core.errors import AdapterError, InputError, ModelError
from prag_core.llm.checkpoint import PACKAGED, local_folder, resolve_model
from prag_core.llm.layout import LoraLayout, module_names, place_of
from prag_core.llm.lora import Factors, check_factors
from prag_core.llm.model_facts import ModelFacts, model_facts, model_fingerprint

# The largest rank and alpha that are tried.
_MOST = 1e9
# Patterns whose matching may have no end: a group that is repeated, or many repetitions.
_SLOW = re.compile(r"\)[*+{]|([*+{].*){5}", re.DOTALL)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of exported files: whoever may read their folder may read them. safetensors writes files that only their owner reads.
FILE_MODE = 0o644
# In the metadata of the weights, which PEFT ignores: the fingerprint of the base model.
_BASE_MODEL = "base_model"
# Fields that change what an adapter does, unless they are off: null, false or empty.
_OFF = {
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "kasa_config", "layer_replication", "loftq_config", "lora_bias"),
    *("lora_ga_config", "megatron_config", "modules_to_save", "monteclora_config", "rank_pattern"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora"),
    "velora_config",
}
# Fields that say nothing about what a trained adapter does.
_NOTES = {
    *("auto_mapping", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size"),
    "runtime_config",
}
# Fields with the values that mean a plain adapter. Some other initial weights (PiSSA, OLoRA) change the base model too.
_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "layers_pattern": (None, "", [], "layers", ["layers"]),
    "revision": (None, "main"),
}
# Fields that are compared with the recipe and the base model.
_COMPARED = {"r", "lora_alpha", "target_modules", "layers_to_transform", "base_model_name_or_path"}


@dataclass(frozen=True)
class PeftBase:
    """The base model of adapters in PEFT's format.

    `name` is as configured; `location` is what PEFT loads it from: an absolute folder, or a name on the hub.
    `revision` is the commit on the hub, or empty.
    """

    name: str
    location: str
    facts: ModelFacts
    revision: str = ""


def peft_base(name: str, facts: ModelFacts | None = None) -> PeftBase:
    """Return the base model that `model.name` names.

    `facts` are its facts, if they are known already; finding them reads all weights.

    Raises:
        ModelError: when it cannot be found or read.
    """
    folder = resolve_model(name)
    local = name in PACKAGED or local_folder(name) is not None
    if local:
        return PeftBase(name, str(folder.resolve()), facts or model_facts(folder))
    # The hub's cache names a model's folder by its commit.
    return PeftBase(name, name, facts or model_facts(folder), revision=folder.name)


def export_peft(layout: LoraLayout, factors: Factors, folder: Path, base: PeftBase) -> None:
    """Write an adapter as a PEFT folder, which `PeftModel.from_pretrained` can load onto the base model.

    Raises:
        InputError: when the folder cannot be written.
    """
    tensors = {}
    for (layer, target), module in module_names(base.facts.linear, layout).items():
        position = layout.layers.index(layer)
        for factor in "AB":
            tensors[_tensor_name(module, factor)] = factors[f"{target}.{factor}"][position].float().contiguous()
    metadata = {"format": "pt", _BASE_MODEL: base.facts.fingerprint}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.location,
        "r": layout.rank,
        "lora_alpha": layout.scale * layout.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layout.targets),
        "layers_to_transform": list(layout.layers),
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, folder / _WEIGHTS, metadata)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        for name in (_CONFIG, _WEIGHTS):
            (folder / name).chmod(FILE_MODE)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written: {error}", "name another folder, or make room there") from error


def import_peft(layout: LoraLayout, folder: Path, base: PeftBase) -> dict[str, Tensor]:
    """Return the fp32 factors of a LoRA folder that `export_peft` or PEFT wrote.

    Raises:
        AdapterError: when the folder holds no LoRA adapter; when its configuration has a field or a value that is not
            known to mean a plain LoRA adapter; or when it differs from the layout in rank, scale, modules, shapes or
            base model. A tensor that the layout does not have is an error too.
    """
    try:
        config = parse_json((folder / _CONFIG).read_text(encoding="utf-8"))
        with safetensors.safe_open(folder / _WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterError(
            f"{folder}: not a readable PEFT adapter: {error}", f"name a folder with {_CONFIG} and {_WEIGHTS}"
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder}: {_CONFIG} holds no settings", "name a folder that PEFT wrote")
    _check_fields(folder, config)
    _check_scale(folder, config, layout)
    _check_base(folder, config["base_model_name_or_path"], metadata.get(_BASE_MODEL), base)
    modules = module_names(base.facts.linear, layout)
    _check_modules(folder, config, set(modules.values()), base.facts)
    stacked: dict[str, list[Tensor]] = {}
    for name in layout.tensor_shapes:
        target, factor = name.rsplit(".", 1)
        wanted = [_tensor_name(modules[layer, target], factor) for layer in layout.layers]
        missing = [tensor for tensor in wanted if tensor not in tensors]
        if missing:
            raise AdapterError(f"{folder}: lacks {missing[0]} and {len(missing) - 1} more", "name a complete adapter")
        stacked[name] = [tensors.pop(tensor) for tensor in wanted]
        for tensor_name, tensor in zip(wanted, stacked[name], strict=True):
            shape = layout.tensor_shapes[name][1:]
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise AdapterError(
                    f"{folder}: {tensor_name} is {list(tensor.shape)} {tensor.dtype}; the recipe has {list(shape)} in "
                    f"floating point",
                    "name an adapter for this base model and this recipe",
                )
    if tensors:
        raise AdapterError(
            f"{folder}: holds {min(tensors)} and {len(tensors) - 1} more, but the recipe adapts "
            f"{', '.join(layout.targets)} of layers {layout.layers[0]} to {layout.layers[-1]}",
            "set train.targets and train.last_layers to those of the adapter",
        )
    factors = {name: torch.stack([tensor.float() for tensor in found]) for name, found in stacked.items()}
    check_factors(layout, factors, str(folder))
    return factors


def _tensor_name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _check_fields(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that each field is known, and does not make more than a plain LoRA adapter."""
    for name in ("peft_type", *sorted(_COMPARED - {"layers_to_transform"})):
        if config.get(name) is None:
            raise AdapterError(f"{folder}: {_CONFIG} does not say {name}", "add it, or save the adapter with PEFT")
    for name, value in config.items():
        if name in _OFF:
            known = value in (None, False, {}, [])
        elif name in _ALLOWED:
            known = any(type(value) is type(allowed) and value == allowed for allowed in _ALLOWED[name])
        else:
            known = name in _COMPARED or name in _NOTES or value is None
        if not known:
            raise AdapterError(
                f"{folder}: {_CONFIG} has {name} = {json.dumps(value)}, which is not supported",
                "train a plain LoRA adapter: rank, alpha and target modules, and nothing else",
            )


def _check_scale(folder: Path, config: Mapping[str, Any], layout: LoraLayout) -> None:
    rank, alpha = config["r"], config["lora_alpha"]
    # Python divides no numbers beyond those of a float.
    if type(rank) is not int or type(alpha) not in (int, float) or not 1 <= rank < _MOST or abs(alpha) >= _MOST:
        raise AdapterError(
            f"{folder}: {_CONFIG} has r = {json.dumps(rank)} and lora_alpha = {json.dumps(alpha)}; both are numbers",
            "save the adapter with PEFT",
        )
    if (rank, alpha / rank) != (layout.rank, layout.scale):
        raise AdapterError(
            f"{folder}: rank {rank}, alpha / rank {alpha / rank:g}; the recipe has rank {layout.rank}, "
            f"{layout.scale:g}",
            "set train.rank and train.alpha to those of the adapter",
        )


def _check_base(folder: Path, name: object, fingerprint: str | None, base: PeftBase) -> None:
    """Check that an adapter was made for this base model: by the fingerprint of an export, or else by the name."""
    if fingerprint is not None:
        same = fingerprint == base.facts.fingerprint
    elif isinstance(name, str) and local_folder(name):
        try:
            same = model_fingerprint(resolve_model(name)) == base.facts.fingerprint
        except ModelError:  # no model, or a damaged one
            same = False
    else:
        same = name == base.name
    if not same:
        of = f" ({fingerprint})" if fingerprint else ""
        raise AdapterError(
            f"{folder}: {_CONFIG} has base_model_name_or_path = {json.dumps(name)}{of}; model.name is {base.name} "
            f"({base.facts.fingerprint})",
            "set model.name to the adapter's base model; if both are the same model, write the latter name there",
        )


def _check_modules(folder: Path, config: Mapping[str, Any], expected: set[str], facts: ModelFacts) -> None:
    """Check that PEFT would adapt the same modules of the base model."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    chosen = layers if isinstance(layers, list) else [layers]

    def adapts(module: str) -> bool:
        if isinstance(targets, str):  # a regular expression, which PEFT refuses to combine with layers
            return layers is None and not _SLOW.search(targets) and re.fullmatch(targets, module) is not None
        place = place_of(module)
        if layers is not None and (place is None or place[0] not in chosen):
            return False
        return any(module == target or module.endswith(f".{target}") for target in targets)

    try:
        listed = isinstance(targets, str | list) and all(type(layer) in (int, NoneType) for layer in chosen)
        found = {module for module in facts.linear if listed and adapts(module)}
    except (TypeError, re.error):
        found = set()
    if found != expected:
        wrong = min(found ^ expected)
        raise AdapterError(
            f"{folder}: {_CONFIG} has target_modules = {json.dumps(targets)} and layers_to_transform = "
            f"{json.dumps(layers)}; of {wrong}, the recipe says the opposite",
            "set train.targets and train.last_layers to those of the adapter",
        )
