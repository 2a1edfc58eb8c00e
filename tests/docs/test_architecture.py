"""docs/architecture.md and CONTRIBUTING.md describe the packages and records that the code has."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_layering import ORDER

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_packages_stand_in_the_order_that_the_layering_test_holds() -> None:
    (block,) = re.findall(r"```\n(.*?)```", section(ARCHITECTURE, "The packages"), re.DOTALL)
    listed = []
    for row in block.splitlines():
        top, *packages = row.split()
        listed += [top, *(f"{top}.{package}" for package in packages)]
    assert tuple(listed) == ORDER


def test_contributing_has_one_row_a_package_in_the_same_order() -> None:
    rows = re.findall(r"^\| `(cluster|prag_core|pipelines)((?:/\w+)?)(?:\.py)?/?` \|", CONTRIBUTING, re.MULTILINE)
    assert tuple(top + package.replace("/", ".") for top, package in rows) == ORDER


def test_each_form_is_defined_where_the_page_says() -> None:
    table = section(ARCHITECTURE, "The forms of a record")
    forms = re.findall(r"^\| `(\w+)` \| .* \| `(\S+)` \|$", table, re.MULTILINE)
    assert len(forms) > 10
    for name, place in forms:
        files = [ROOT / place] if place.endswith(".py") else (ROOT / place).glob("*.py")
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        assert re.search(rf"^class {name}\b", text, re.MULTILINE), (name, place)


def test_the_glossary_is_sorted_and_has_one_sentence_a_word() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section(ARCHITECTURE, "Glossary"), re.MULTILINE)[2:]
    words = [word.strip("`").lower() for word, _ in rows]
    assert words == sorted(set(words))
    assert [word for word, meaning in rows if not meaning.endswith(".") or ". " in meaning] == []
