"""The commands of docs/quickstart.md lead from a folder with passages to a server that answers from them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import httpx
import pytest

from tests.helpers.command_line import prag
from tests.helpers.live import Server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def own_passages() -> list[str]:
    """The commands under "Your own passages"."""
    section = PAGE.split("## Your own passages\n")[1].split("\n## ")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]


def test_the_readme_has_the_same_five_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.removeprefix("$ ").partition("  #")[0].rstrip() for line in readme.splitlines()]
    assert [line for line in lines if line in own_passages()] == own_passages()[1:6]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_twelve_passages_of_ones_own(tmp_path: Path, tiny_model_folder: Path) -> None:
    # The tiny model writes nothing that can be used, so the pairs are cloze questions. Ray's workers were started in
    # another folder, so paths are absolute here.
    places = [f"corpus.path={tmp_path / 'my-passages'}", f"store={tmp_path / 'prag-store'}"]
    quick = [f"model.name={tiny_model_folder}", "augment.attempts=1", "train.epochs=1", *places]
    settings = [word for setting in quick for word in ("--set", setting)]
    copy, activate, init, run, ask, serve, curl = map(shlex.split, own_passages())

    assert (copy[:2], copy[3]) == (["cp", "-r"], ".")
    shutil.copytree(ROOT / copy[2], tmp_path / Path(copy[2]).name)
    assert activate == ["source", ".venv/bin/activate"]

    ended = prag(tmp_path, *init[1:])
    assert (ended.code, ended.out.splitlines()[-1]) == (0, f"Next: {shlex.join(run)}")
    assert "12 records" in ended.out
    ended = prag(tmp_path, *run[1:], *settings, "--json")
    assert ended.code == 0, ended.err[-3000:]
    ended = prag(tmp_path, *ask[1:], *settings)
    assert ended.code == 0, ended.err[-3000:]
    assert "Pelle Andur" in ended.out  # the passage that was found

    assert serve[:3] == ["prag", "serve", "-c"]
    with Server(tmp_path / serve[3], quick) as server:
        url, body = curl[1], json.loads(curl[curl.index("-d") + 1])
        answer = httpx.post(url.replace("http://127.0.0.1:8000", server.url), json=body, timeout=120).json()
    assert answer["passages"][0]["title"] == "Velsund terminal"
