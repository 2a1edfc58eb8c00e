"""Facts about a base model: its fingerprint and linear modules, without loading its weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prag_core.errors import ModelError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import find_layout
from prag_core.llm.lora import find_targets
from prag_core.llm.model_facts import model_facts, model_skeleton
from prag_core.recipe import RECIPES


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny model that the test may change, with an empty cache."""
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def test_facts_equal_those_of_the_loaded_model(folder: Path, tiny_session: BaseModel) -> None:
    facts = model_facts(folder)
    assert facts.fingerprint == tiny_session.fingerprint
    assert find_layout(facts.linear, RECIPES["paper"]) == find_targets(tiny_session.model, RECIPES["paper"])[0]
    assert find_layout(facts.linear, RECIPES["paper"]) == find_targets(model_skeleton(folder), RECIPES["paper"])[0]


def test_cached_facts_need_no_model_library(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from prag_core.llm.model_facts import model_facts\n"
        f"loaded = {{'torch', 'transformers'}}; print(model_facts(Path({str(folder)!r})).fingerprint, end=' ')\n"
        "print(*sorted(loaded & set(sys.modules)))"
    )

    def ask() -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split()

    first, again = ask(), ask()
    assert first[1:] == ["torch", "transformers"]
    assert again == first[:1]


def test_facts_change_with_each_file_that_describes_the_model(folder: Path) -> None:
    seen = [model_facts(folder)]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    seen.append(model_facts(folder))
    assert seen[0].linear != seen[1].linear
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    seen.append(model_facts(folder))
    assert seen[1].fingerprint != seen[2].fingerprint


@pytest.mark.parametrize("text", ["", "[]", '{"fingerprint": "x"}', '{"fingerprint": "x", "linear": {"a": [1]}}'])
def test_a_damaged_file_in_the_cache_is_written_again(folder: Path, tmp_path: Path, text: str) -> None:
    facts = model_facts(folder)
    (cached,) = (tmp_path / "cache" / "facts").iterdir()
    cached.write_text(text)
    assert model_facts(folder) == facts
    assert json.loads(cached.read_text())["fingerprint"] == facts.fingerprint


def test_a_cache_that_cannot_be_written_costs_only_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    facts = model_facts(folder)
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "file"))
    assert model_facts(folder) == facts


def headed(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


def tensor(dtype: object = "F32", shape: object = (), offsets: object = (0, 4)) -> bytes:
    return headed(json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 16,
        headed("[]"),
        headed('{"a":{}}'),
        headed("[" * 200_000),
        tensor(offsets=[0, 2.5]),
        tensor(offsets=[4, 0]),
        tensor(offsets=[-1_000_000, 4]),
        tensor(shape=["a"]),
        tensor(shape=None),
    ],
)
def test_damaged_weights_are_an_error_with_a_remedy(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"no safetensors header.*\n.*get it again"):
        model_facts(folder)


def test_truncated_weights_are_an_error_with_a_remedy(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ModelError, match="ends before tensor"):
        model_facts(folder)
