"""Facts about a base model that need no loaded weights: its fingerprint, linear modules and number of weights."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prag_core.errors import ModelError
from prag_core.identity import canonical_json, checksum, fingerprint
from prag_core.llm.checkpoint import cache_dir, load_tokenizer, weight_files
from prag_core.llm.weights_digest import tensor_headers, weights_digest

log = logging.getLogger(__name__)

# The suffixes of the files that describe the model and its vocabulary.
_DESCRIPTIONS = {".json", ".model", ".txt", ".jinja"}


def parameter_count(folder: Path) -> int:
    """Return the number of weights of a model folder; see `weight_files`."""
    headers = (tensor_headers(path) for path in weight_files(folder))
    return sum(math.prod(tensor.shape) for header in headers for tensor in header.tensors.values())


@dataclass(frozen=True)
class ModelFacts:
    """A base model's fingerprint and its linear modules.

    `linear` maps the name of each linear module to its (inputs, outputs).
    """

    fingerprint: str
    linear: Mapping[str, tuple[int, int]]


def model_facts(folder: Path) -> ModelFacts:
    """Return the facts of a model folder, from the cache folder if they are there.

    The cache key is a hash of the folder's files. With a cached result, the driver of a run, which leaves the model to
    its workers, need not spend seconds on importing torch and transformers.

    Raises:
        ModelError: when the folder holds no readable safetensors weights, or its tokenizer has no chat template.
    """
    weights = weights_digest(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix in _DESCRIPTIONS and path.is_file())
    descriptions = [[path.name, checksum(path.read_bytes())] for path in paths]
    # Another version of transformers may read the same files in another way.
    name = fingerprint([weights, descriptions, importlib.metadata.version("transformers")])
    cached = cache_dir() / "facts" / f"{name}.json"
    try:
        known = json.loads(cached.read_text(encoding="utf-8"))
        return ModelFacts(known["fingerprint"], {name: (i, o) for name, (i, o) in known["linear"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing or damaged: written again below
    facts = _compute_facts(folder, weights)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # The rename makes the file appear whole, even if several processes write it.
        scratch = cached.with_suffix(f".{uuid.uuid4().hex}")
        scratch.write_text(canonical_json(facts), encoding="utf-8")
        scratch.replace(cached)
    except OSError as error:
        log.warning("%s cannot be written, so the next command reads the model again: %s", cached, error)
    return facts


def _compute_facts(folder: Path, weights: str) -> ModelFacts:
    from prag_core.llm.lora import linear_shapes

    linear = linear_shapes(model_skeleton(folder))
    tokenizer = load_tokenizer(folder)
    words = sorted(tokenizer.get_vocab().items())
    name = fingerprint([weights, [list(w) for w in words], tokenizer.chat_template])
    return ModelFacts(name, linear)


def model_fingerprint(folder: Path) -> str:
    """Return a hash of the name, dtype, shape and bytes of each tensor in a model folder, and of the vocabulary.

    It does not depend on how the tensors are spread over files, nor on the dtype in which the model is loaded.

    Raises:
        ModelError: when the folder holds no readable safetensors weights, or its tokenizer has no chat template.
    """
    return model_facts(folder).fingerprint


def model_skeleton(folder: Path) -> Any:
    """Return the model of a folder without its weights: its modules and their shapes.

    Raises:
        ModelError: when transformers has no causal language model for its `config.json`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder)
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # a wrong setting makes transformers' code raise whatever it happens to lead to
        raise ModelError(
            f"{folder / 'config.json'}: no model can be made of it: {type(error).__name__}: {error}",
            "name a decoder that the installed transformers knows, with the config.json that belongs to it",
        ) from None
