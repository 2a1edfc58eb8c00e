"""Reading a configuration from YAML and dotted overrides, and writing it back."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from prag_core.config import NO_CREDENTIALS_HERE, Config
from prag_core.errors import ConfigError
from prag_core.packaged import local_path

_EXAMPLE = "`prag --help` says where an example is"
# Old name → new name. A configuration of an older version gets an error that names the new one.
_RENAMED = {"train.start": "train.initial_adapter", "train.without": "train.ablation"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply dotted overrides such as `train.epochs=4`.

    Relative paths in the file (`store`, `corpus.path`, `augment.import_file`) are relative to the working directory,
    as on the command line.

    Raises:
        ConfigError: for a missing file, broken YAML, an unknown key (with the most similar known one) or a wrong
            value; the message carries the key's dotted path.
    """
    try:
        data = yaml.safe_load(Path(local_path(str(path))).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file", _EXAMPLE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", "name a readable YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", "fix the line that the message names") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no settings", f"write a YAML mapping; {_EXAMPLE}")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], origin: str = "configuration") -> Config:
    """Return the configuration that plain values describe.

    Raises:
        ConfigError: for an unknown key or a wrong value; `origin` begins the message.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, origin) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """Return the YAML text of a configuration, with all defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one value of `data` in place, as `KEY=VALUE` says."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"override {override!r} is not KEY=VALUE", "write it as train.epochs=4")
    *parents, last = dotted.strip().split(".")
    node = data
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name!r} holds no settings", _EXAMPLE)
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML", "quote it") from None


def _explain(item: Any, origin: str) -> str:
    """Return the message for one of pydantic's validation errors."""
    location = tuple(str(part) for part in item["loc"])
    dotted = ".".join(location)
    if dotted in _RENAMED:
        return f"{origin}: unknown key {dotted}\n  → it is called {_RENAMED[dotted]} now"
    if item["type"] == "extra_forbidden":
        siblings = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"{origin}: unknown key {dotted}\n  → {hint or 'known here: ' + ', '.join(siblings)}"
    if item["type"] == "missing":
        return f"{origin}: {dotted} is required\n  → add it; {_EXAMPLE}"
    if item["type"] == "credentials":  # the value must not be repeated
        return f"{origin}: {dotted} {item['msg']}\n  → {NO_CREDENTIALS_HERE}"
    return f"{origin}: {dotted} = {item.get('input')!r}: {item['msg']}"


def _fields_at(location: Sequence[str]) -> list[str]:
    """Return the names of the settings in one section."""
    model: type[BaseModel] = Config
    for name in location:
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
