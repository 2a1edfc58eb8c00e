"""Reading a configuration from YAML and dotted overrides, and writing it back.

YAML guesses what a plain text means: `no` is false, `010` is eight, `1e-4` is a text, a second section replaces the
first. Here every value stays the text that was typed, and the type of its setting decides what it means.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from prag_core.config import NO_CREDENTIALS_HERE, Config
from prag_core.errors import ConfigError
from prag_core.packaged import local_path

_MOST_VALUES = 10_000
_NULLS = ("", "~", "null", "Null", "NULL")
_UNTAGGED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
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
        text = Path(local_path(str(path))).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file", f"`prag init CORPUS` writes one; {_EXAMPLE}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", "name a readable YAML file") from error
    return read_config(text, str(path), overrides)


def read_config(text: str, origin: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that a YAML text describes, after applying dotted overrides.

    Raises:
        ConfigError: as `load_config` does; `origin` begins the message.
    """
    data = _parse_yaml(text, origin)
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: holds no settings", f"write a YAML mapping; {_EXAMPLE}")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, origin, [override.partition("=")[0].strip() for override in overrides])


def parse_config(data: dict[str, Any], origin: str = "configuration", overridden: Sequence[str] = ()) -> Config:
    """Return the configuration that plain values describe.

    Raises:
        ConfigError: for an unknown key or a wrong value; `origin` begins the message, or `override` for a setting that
            `overridden` names.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, origin, overridden) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """Return the YAML text of a configuration, with all defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one value of `data` in place, as `KEY=VALUE` says; the value is the text as typed.

    Only for a setting that takes no text may it be a YAML list or mapping in one line, such as `[q_proj, v_proj]`.
    """
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
    if text.strip() in _NULLS:
        node[last] = None
    elif text.lstrip().startswith(("[", "{")) and _takes_many(dotted.strip().split(".")):
        node[last] = _parse_yaml(text, f"override {override!r}")
    else:
        node[last] = text


def _parse_yaml(text: str, origin: str) -> Any:
    """Return the mappings, lists and texts of a YAML document; a plain `null`, `~` or nothing is None.

    Raises:
        ConfigError: for text that is not one YAML document, a key that is given twice, a merge key or a tag; `origin`
            and the line begin the message.
    """
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return _plain(node, origin, itertools.count()) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        remedy = f"Fix line {mark.line + 1}, column {mark.column + 1}." if mark else "Fix the file, or write it again."
        raise ConfigError(f"{origin}: not valid YAML: {error}", remedy) from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply, or an alias holds itself", _EXAMPLE) from None


def _plain(node: yaml.Node, origin: str, seen: Iterator[int]) -> Any:
    place = f"{origin}: line {node.start_mark.line + 1}"
    if next(seen) > _MOST_VALUES:  # aliases of aliases stand for more values than any memory holds
        raise ConfigError(f"{place}: more than {_MOST_VALUES:,} values", "write lists out, without aliases")
    if node.tag not in _UNTAGGED:
        raise ConfigError(f"{place}: the tag {node.tag!r} is not allowed", "leave it out")
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _NULLS else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, origin, seen) for item in node.value]
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = key.value, key.start_mark.line + 1
        if not isinstance(name, str) or name == "<<":
            raise ConfigError(
                f"{origin}: line {line}: a key must be one name, and no merge key `<<`", "write out each setting"
            )
        if name in lines:
            raise ConfigError(
                f"{origin}: line {line}: the key {name} is given twice, first in line {lines[name]}",
                "keep one of the two",
            )
        lines[name] = line
        found[name] = _plain(value, origin, seen)
    return found


def _explain(item: Any, origin: str, overridden: Sequence[str]) -> str:
    """Return the message for one of pydantic's validation errors."""
    location = tuple(str(part) for part in item["loc"])
    dotted = ".".join(location)
    if any(f"{dotted}.".startswith(f"{name}.") for name in overridden):
        origin = "override"  # who looks for it in the file would not find it
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
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{origin}: {dotted} is a section\n  → write its settings below it, or leave it out; {_EXAMPLE}"
    return f"{origin}: {dotted} = {item.get('input')!r}: {item['msg']}"


def _takes_many(location: Sequence[str]) -> bool:
    """Return whether a setting is a section or a list."""
    *parents, last = location
    try:
        annotation = _section_at(parents).model_fields[last].annotation
    except (KeyError, StopIteration):  # an unknown setting, which the caller reports
        return True
    kinds = [annotation, *get_args(annotation)]
    return any(get_origin(kind) is tuple or (isinstance(kind, type) and issubclass(kind, BaseModel)) for kind in kinds)


def _fields_at(location: Sequence[str]) -> list[str]:
    """Return the names of the settings in one section."""
    return list(_section_at(location).model_fields)


def _section_at(location: Sequence[str]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for name in location:
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model
