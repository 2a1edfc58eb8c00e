"""The docs say what the code says: settings, commands, routes, names; and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from docs import pages, picture
from pipelines.serving.schemas import AnswerRequest, AnswerResponse, PassageUse

ROOT = Path(__file__).parents[2]
REMEDY = "run `make pages` and commit what it wrote"


def test_what_the_docs_take_from_the_code_is_up_to_date() -> None:
    for path, content in pages.pages().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.relative_to(ROOT)}: {REMEDY}"
    wanted = set(pages.python_pages())
    assert set((ROOT / "docs" / "reference" / "python").iterdir()) == wanted, REMEDY


def test_the_pictures_are_those_of_the_script() -> None:
    for path, content in picture.pictures().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.relative_to(ROOT)}: {REMEDY}"


def test_each_setting_has_a_description() -> None:
    assert [name for name, field in pages.settings() if not (field.description or "").endswith(".")] == []


def test_advice_is_on_settings_that_exist() -> None:
    advice = yaml.safe_load((ROOT / "docs" / "settings.yaml").read_text(encoding="utf-8"))
    assert advice.keys() - {name for name, _ in pages.settings()} == set()


def test_the_http_page_names_every_field() -> None:
    page = (ROOT / "docs" / "reference" / "http-api.md").read_text(encoding="utf-8")
    spans = set(re.findall(r"`(\w+)`", page))
    for model in (AnswerRequest, AnswerResponse, PassageUse):
        assert model.model_fields.keys() - spans == set(), model.__name__


def test_the_readme_is_short_and_has_both_pictures() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 80
    assert {ROOT / name for name in re.findall(r"docs/pictures/[\w-]+\.svg", readme)} == set(picture.pictures())
