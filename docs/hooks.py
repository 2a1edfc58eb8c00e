"""What the site needs beyond mkdocs: links that leave docs/, and a check that public names have docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import get_plugin_logger

DOCS = Path(__file__).parent
_log = get_plugin_logger("docs/hooks.py")
_logger = griffe.get_logger("documented")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Show the name of a file of the repository that is outside of docs/, instead of a link to it."""

    def name(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        target = (DOCS / page.file.src_uri).parent.joinpath(link.partition("#")[0]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        if not target.exists():
            _log.warning("%s links to %s, which is not there", page.file.src_uri, link)
        return text if text.startswith("`") else f"`{text}`"

    return re.sub(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)", name, markdown)


class Documented(griffe.Extension):
    """Warns of each public module, class or function without a docstring. In a strict build a warning is an error."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look at all that a package holds."""
        self._look_at(pkg, _promised(pkg))

    def _look_at(self, thing: griffe.Object, promised: set[str]) -> None:
        described = thing.is_attribute or thing.has_docstring or (thing.is_function and thing.name in promised)
        if not described:
            _logger.warning("%s:%s: %s has no docstring", thing.filepath, thing.lineno, thing.path)
        for member in thing.members.values():
            if not member.is_alias and not member.name.startswith("_"):
                self._look_at(member, promised)


def _promised(thing: griffe.Object) -> set[str]:
    """Return the names of the methods that protocols describe, so that what provides them need not."""
    if thing.is_class and any(str(base) == "Protocol" for base in thing.bases):
        return {name for name, member in thing.members.items() if not member.is_alias and member.has_docstring}
    return {name for member in thing.members.values() if not member.is_alias for name in _promised(member)}
