"""How bodies of requests are read, and what is said of a field that is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from prag_core.data.parsing import is_storable

_OBJECT = "must be an object in braces"
_NOT_TEXT = "holds half a surrogate pair, so it is not Unicode text"
# What is wrong, by pydantic's name of the error. Values in braces are of the error's context.
PROBLEMS: Mapping[str, str] = MappingProxyType(
    {
        "missing": "is missing",
        "string_type": "must be a text",
        "string_unicode": _NOT_TEXT,
        "not_text": _NOT_TEXT,
        "string_too_short": "must not be empty",
        "string_too_long": "at most {max_length} characters",
        "list_type": "must be a list",
        "too_short": "must not be empty",
        "too_long": "at most {max_length} {unit}",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "greater_than": "must be above {gt:g}",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "bool_type": "must be true or false",
        "literal_error": "must be {expected}",
        "model_type": _OBJECT,
        "model_attributes_type": _OBJECT,
        "unknown_field": "{reason}",
        "not_supported": "{reason}",
    }
)
_IN_JSON = {"False": "false", "True": "true", "None": "null"}
# The longest name of a field that a message repeats.
_NAME_CHARS = 100


class Strict(BaseModel):
    """A body that is read strictly: no field that would be dropped, no text in place of a number.

    Attributes:
        IGNORED: Further fields that are taken and have no effect.
        WITHOUT_EFFECT: Fields that are taken only with a value that asks for nothing: null, or one of these.
        ELSEWHERE: Fields that callers write here by mistake, and what to write instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    WITHOUT_EFFECT: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType({})
    ELSEWHERE: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @model_validator(mode="before")
    @classmethod
    def refuse_dropped(cls, data: Any) -> Any:
        """Refuse a field that is not known or not supported here, and say what may have been meant."""
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name in cls.model_fields or name in cls.IGNORED:
                continue
            if name in cls.WITHOUT_EFFECT:
                values = cls.WITHOUT_EFFECT[name]
                if value is not None and json.dumps(value) not in map(json.dumps, values):
                    shown = "".join(f", or send {json.dumps(taken)}" for taken in values[:1])
                    _refuse("not_supported", name, f"is not supported here; leave it out{shown}")
            elif name in cls.ELSEWHERE:
                _refuse("not_supported", name, cls.ELSEWHERE[name])
            elif cls.model_config["extra"] == "forbid":
                near = difflib.get_close_matches(name[:_NAME_CHARS].lower(), cls.model_fields, n=1)
                instead = f"did you mean {near[0]}?" if near else f"known are {', '.join(cls.model_fields)}"
                _refuse("unknown_field", name, f"is not known; {instead}")
        return {name: value for name, value in data.items() if name in cls.model_fields}


def _refuse(kind: str, name: str, reason: str) -> NoReturn:
    # A name may be long, and hold half a surrogate pair.
    shown = name[:_NAME_CHARS].encode("utf-8", "replace").decode()
    raise PydanticCustomError(kind, "", {"name": shown, "reason": reason})


def unicode_text(value: str) -> str:
    """Return a text, or refuse half a surrogate pair: JSON can spell it, but it is not Unicode text."""
    if not is_storable(value):
        raise PydanticCustomError("not_text", "")
    return value


def explain(error: ErrorDetails) -> tuple[str, str]:
    """Return the field of a validation error, as the caller wrote it, and what is wrong with it.

    Nothing of the caller's values is repeated. The field is empty when the body as a whole is wrong.
    """
    context = error.get("ctx", {})
    # The first part of `loc` is the place (body, query); parts in angle brackets name a case of a union.
    parts = [str(part) for part in error["loc"][1:] if not str(part).startswith("<")]
    parts += [context["name"]] if "name" in context else []
    values = {name: _IN_JSON.get(str(value), value) for name, value in context.items()}
    values["unit"] = "items" if context.get("field_type") == "List" else "characters"
    problem = PROBLEMS.get(error["type"], "is not valid").format(**values)
    return ".".join(parts), problem
