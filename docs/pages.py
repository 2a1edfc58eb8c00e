"""Write what the docs take from the code: `python -m docs.pages`. tests/docs/test_pages.py checks that it was run.

In most pages that is the part between two comments; the pages of the Python API are written whole.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel

import prag_core
from pipelines.cli.app import app
from pipelines.serving.app import make_app
from prag_core.config import Config, CorpusConfig, TrainConfig
from prag_core.errors import EXIT_CODES
from prag_core.recipe import RECIPES

DOCS = Path(__file__).parent
# The end of a setting's name says its unit.
UNITS = {
    "_s": "seconds", "_bytes": "bytes", "_mb": "MB", "_gb": "GB", "_words": "words", "_chars": "characters",
    "_tokens": "tokens", "prefill_chunk": "tokens", "tokens_per_step": "tokens", "_per_minute": "a minute",
}  # fmt: skip
_COMPARISONS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the field of each setting, in the order of the configuration's classes."""
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def is_section(annotation: Any) -> bool:
    """Return whether a field holds settings of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def settings_tables() -> str:
    """Return a table of settings for each section of the configuration."""
    when = yaml.safe_load((DOCS / "settings.yaml").read_text(encoding="utf-8"))
    parts = []
    for title, about, rows in _sections(Config, ""):
        parts += [f"## {title}", about, "", "| setting | type | default | what it is | when to change it |"]
        parts.append("|---|---|---|---|---|")
        for name, field in rows:
            kind = _type(field.annotation, field.metadata) + (f" ({unit})" if (unit := _unit(name)) else "")
            cells = (f"`{name}`", kind, _default(name, field), field.description or "", when.get(name, "–"))
            parts.append(_row(cells))
        parts.append("")
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, list[tuple[str, Any]]]]:
    """Yield each section that has settings of its own: its title, its docstring, and its settings by full name."""
    rows = [(prefix + name, field) for name, field in model.model_fields.items() if not is_section(field.annotation)]
    if rows:
        yield prefix.rstrip(".") or "The top", inspect.getdoc(model) or "", rows
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from _sections(field.annotation, f"{prefix}{name}.")


def _unit(name: str) -> str | None:
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), None)


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Return a type as people say it, with its bounds."""
    bounds = [
        f"{sign} {getattr(item, bound):,}"
        for item in metadata
        for bound, sign in _COMPARISONS.items()
        if hasattr(item, bound)
    ]
    return ", ".join([_type_name(annotation), *bounds])


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments if value != "")
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def _default(name: str, field: Any) -> str:
    if field.is_required():
        return "must be set"
    if field.default == ():
        return "none"
    if field.default is None:
        return "the recipe's" if name.startswith("train.") else "–"
    return f"`{_value(field.default)}`"


def recipes_table() -> str:
    """Return a table of what each recipe sets; the other settings of `train` have no value in a recipe."""
    rows = [
        (f"`train.{name}`", *(_value(getattr(recipe, name)) for recipe in RECIPES.values()))
        for name in TrainConfig.model_fields
        if hasattr(RECIPES["paper"], name)
    ]
    head = ("setting", *(f"`{name}`" for name in RECIPES))
    return "\n".join([_row(head), "|---" * len(head) + "|", *map(_row, rows)])


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    if value is None:
        return "all"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands() -> str:
    """Return a section for each command, with its arguments and options, in the groups of `prag --help`."""
    groups: dict[str, list[str]] = {}
    for path, command, group in _commands(typer.main.get_command(app), "prag", ""):
        groups.setdefault(group, []).append(_command(path, command))
    return "\n".join(f"## {group}\n" + "\n".join(texts) for group, texts in groups.items())


def _commands(command: Any, path: str, group: str) -> Iterator[tuple[str, Any, str]]:
    for name, child in getattr(command, "commands", {}).items():
        own = getattr(child.rich_help_panel, "value", child.rich_help_panel) or group or "Commands"
        if hasattr(child, "commands"):
            yield from _commands(child, f"{path} {name}", own)
        elif not child.hidden:
            yield f"{path} {name}", child, own


def _command(path: str, command: Any) -> str:
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [parameter for parameter in shown if not parameter.opts[0].startswith("-")]
    words = [_argument(parameter) for parameter in arguments]
    lines = [f"### {path}", (command.help or "").strip(), "", "```", " ".join([path, *words, "[OPTIONS]"]), "```", ""]
    if command.epilog:
        lines += [command.epilog, ""]
    lines += ["| | what | default |", "|---|---|---|"]
    for parameter in shown:
        named = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if parameter in arguments:
            named = f"`{_argument(parameter)}`"
        help_text = " ".join((parameter.help or "").split())
        if parameter.envvar:
            help_text += f" The environment may name it in `{parameter.envvar}`."
        lines.append(_row((named, help_text, _option_default(parameter))))
    return "\n".join([*lines, ""])


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper()).strip("[]")
    dots = "…" if parameter.nargs == -1 else ""
    return f"{name}{dots}" if parameter.required else f"[{name}]{dots}"


def _option_default(parameter: Any) -> str:
    value = parameter.default
    if value in (None, False, "", ()) or callable(value):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def exit_codes() -> str:
    """Return a table of the exit codes, with links to what the page says about each."""
    rows = [_row((f"[{code}](#{anchor(f'{code}: {meaning}')})", meaning)) for code, meaning in EXIT_CODES.items()]
    return "\n".join(["| code | meaning |", "|---|---|", *rows])


def anchor(heading: str) -> str:
    """Return the anchor that a heading gets, in the site as well as on code hosts."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def routes() -> str:
    """Return a table of the server's routes, from its OpenAPI document."""
    # To be described, routes need no service: they only read the configuration.
    dispatcher: Any = types.SimpleNamespace(config=Config(store="store", corpus=CorpusConfig(path="corpus.jsonl")))
    document = make_app(dispatcher, None, None).openapi()
    rows = [
        (f"`{method.upper()} {path}`", " ".join(operation.get("description", operation["summary"]).split()))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return "\n".join(["| request | what it does |", "|---|---|", *map(_row, rows)])


def decisions() -> str:
    """Return a table of the decisions."""
    lines = ["| | decision |", "|---|---|"]
    for file in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        number, _, title = file.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ").partition(". ")
        lines.append(_row((number, f"[{title}]({file.name})")))
    return "\n".join(lines)


def python_pages() -> dict[Path, str]:
    """Return the pages of the Python API: one for the modules directly in `prag_core`, and one for each package."""
    root = Path(prag_core.__path__[0])
    pages = {}
    for folder in (root, *sorted(path.parent for path in root.glob("*/__init__.py"))):
        name = ".".join(folder.relative_to(root.parent).parts)
        modules = [file.stem for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")]
        about = re.match(r'"""(.*?)"""', (folder / "__init__.py").read_text(encoding="utf-8"), re.DOTALL)
        text = "\n\n".join([f"# {name}\n{about[1].strip() if about else ''}"] + [f"::: {name}.{m}" for m in modules])
        pages[DOCS / "reference" / "python" / f"{folder.name}.md"] = text + "\n"
    return pages


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


PARTS = {
    "configuration.md": {"settings": settings_tables, "recipes": recipes_table},
    "reference/cli.md": {"commands": commands},
    "reference/exit-codes.md": {"exit codes": exit_codes},
    "reference/http-api.md": {"routes": routes},
    "decisions/index.md": {"decisions": decisions},
}


def pages() -> dict[Path, str]:
    """Return each page that takes something from the code, as it should be."""
    found = python_pages()
    for name, parts in PARTS.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        for part, make in parts.items():
            begin, end = f"<!-- {part}: written by docs/pages.py -->\n", "<!-- end -->"
            before, _, rest = text.partition(begin)
            _, found_end, after = rest.partition(end)
            if not found_end:
                raise ValueError(f"docs/{name} lacks the comments around {part!r}")
            text = f"{before}{begin}\n{make().strip()}\n\n{end}{after}"
        found[DOCS / name] = text
    return found


if __name__ == "__main__":
    for path, content in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
