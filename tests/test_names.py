"""Names: no public class has the name of another one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]


def public_classes(root: Path) -> dict[str, list[str]]:
    """Return the files that define each public class, by the class's name."""
    found: dict[str, list[str]] = defaultdict(list)
    for top in ("cluster", "prag_core", "pipelines"):
        for file in sorted((root / top).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(str(file.relative_to(root)))
    return found


def test_no_public_class_name_is_used_twice() -> None:
    found = public_classes(ROOT)
    assert len(found) > 100
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_a_name_that_is_used_twice_is_found(tmp_path: Path) -> None:
    for name in ("prag_core/store/a.py", "pipelines/b.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("class Finding:\n    class _Own:\n        pass\n")
    assert public_classes(tmp_path) == {"Finding": ["prag_core/store/a.py", "pipelines/b.py"]}
