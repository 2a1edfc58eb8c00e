"""What is known of a base model without loading its weights: fingerprint, linear modules, number of weights."""

from __future__ import annotations

import hashlib
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
from prag_core.identity import FINGERPRINT_BYTES, canonical_json, checksum, fingerprint
from prag_core.llm.checkpoint import cache_dir, load_tokenizer

log = logging.getLogger(__name__)


# The files beside the weights that say what model and what vocabulary it is.
_TEXTS = {".json", ".model", ".txt", ".jinja"}


def parameter_count(folder: Path) -> int:
    """Return the number of weights in a model folder's safetensors files."""
    entries = (entry for path in folder.glob("*.safetensors") for _, entry, _ in _safetensors_entries(path))
    return sum(math.prod(entry["shape"]) for entry in entries)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a base model without its weights in memory: its fingerprint, and its linear modules.

    `linear` maps the name of each linear module to its (inputs, outputs).
    """

    fingerprint: str
    linear: Mapping[str, tuple[int, int]]


def model_facts(folder: Path) -> ModelFacts:
    """Return the facts of a model folder. They are kept in the cache folder under a hash of all that they follow from.

    So the driver of a run, which leaves the model to its workers, need not import torch and transformers for seconds.

    Raises:
        ModelError: when the folder holds no safetensors weights, or its tokenizer has no chat template.
    """
    weights = _weights_digest(folder)
    texts = sorted(path for path in folder.iterdir() if path.suffix in _TEXTS and path.is_file())
    read = [[path.name, checksum(path.read_bytes())] for path in texts]
    # Another version of transformers may read the same files in another way.
    name = fingerprint([weights, read, importlib.metadata.version("transformers")])
    cached = cache_dir() / "facts" / f"{name}.json"
    try:
        known = json.loads(cached.read_text(encoding="utf-8"))
        return ModelFacts(known["fingerprint"], {name: (i, o) for name, (i, o) in known["linear"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there yet, or not as it was written: it is made anew
    facts = _learn_facts(folder, weights)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # The rename makes it appear whole, whoever else writes it meanwhile.
        scratch = cached.with_suffix(f".{uuid.uuid4().hex}")
        scratch.write_text(canonical_json(facts), encoding="utf-8")
        scratch.replace(cached)
    except OSError as error:
        log.warning("%s cannot be written, so the next command looks at the model again: %s", cached, error)
    return facts


def _learn_facts(folder: Path, weights: str) -> ModelFacts:
    from prag_core.llm.lora import linear_shapes

    tokenizer = load_tokenizer(folder)
    words = sorted(tokenizer.get_vocab().items())
    name = fingerprint([weights, [list(w) for w in words], tokenizer.chat_template])
    return ModelFacts(name, linear_shapes(model_skeleton(folder)))


def model_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder: of each tensor's name, type, shape and bytes, and the vocabulary.

    The order and the packing of the weight files do not matter; the type in which the model is loaded neither.

    Raises:
        ModelError: when the folder holds no safetensors weights, or its tokenizer has no chat template.
    """
    return model_facts(folder).fingerprint


def _weights_digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: holds no *.safetensors", "save the model with safe serialization")
    tensors = sorted((name, entry, path, start) for path in files for name, entry, start in _safetensors_entries(path))
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for name, entry, path, start in tensors:
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with path.open("rb") as stream:
            stream.seek(start + begin)
            remaining = end - begin
            while remaining:
                block = stream.read(min(remaining, 1 << 24))
                if not block:
                    raise ModelError(f"{path}: ends before tensor {name}", "the file is truncated; get it again")
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def model_skeleton(folder: Path) -> Any:
    """Return the model of a folder without its weights: enough to see its modules and their shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def _safetensors_entries(path: Path) -> list[tuple[str, dict[str, Any], int]]:
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return [(name, entry, 8 + size) for name, entry in header.items() if name != "__metadata__"]
