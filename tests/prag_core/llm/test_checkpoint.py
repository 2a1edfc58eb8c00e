"""The files of a base model: which of a folder's files count, and what is said of those that are missing or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prag_core.config import ModelConfig
from prag_core.errors import ModelError
from prag_core.llm.base_model import choose_device, choose_dtype, load_base_model
from prag_core.llm.checkpoint import find_model, resolve_model, weight_files
from prag_core.llm.model_facts import model_facts, model_fingerprint, parameter_count


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny model that the test may change, with an empty cache."""
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def into_shards(folder: Path) -> Path:
    """Replace the weights of a model by an index and two files; return the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{1 + n % 2:05}-of-00002.safetensors" for n, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in places if places[name] == file}, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def other_weights(folder: Path) -> None:
    """Put the weights of nobody, in all formats, beside those of a model."""
    for name in ("consolidated.safetensors", "consolidated-00001-of-00001.safetensors", "adapter_model.safetensors"):
        save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / name)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json"):
        (folder / name).write_text(json.dumps({"weight_map": {"a": "consolidated.safetensors"}}))
    (folder / "broken.safetensors").symlink_to("/nowhere")


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_weights_that_are_loaded_count(folder: Path, sharded: bool) -> None:
    expected, count = model_fingerprint(folder), parameter_count(folder)
    if sharded:
        into_shards(folder)
    other_weights(folder)
    assert (model_fingerprint(folder), parameter_count(folder)) == (expected, count)
    assert len(weight_files(folder)) == 1 + sharded
    assert load_base_model(ModelConfig(name=str(folder), device="cpu")).fingerprint == expected


def test_a_single_file_goes_before_an_index_as_in_transformers(folder: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    index = into_shards(folder)
    shards = weight_files(folder)
    for shard in shards:
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(single)
    assert weight_files(folder) == [folder / "model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(loaded["model.norm.weight"], load_file(folder / "model.safetensors")["model.norm.weight"])
    assert index.exists()


def test_the_configuration_may_name_the_weights(folder: Path) -> None:
    expected = model_fingerprint(folder)
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    assert model_fingerprint(folder) == expected
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded["model.norm.weight"].count_nonzero()


def test_a_folder_of_links_is_a_model(folder: Path, tmp_path: Path) -> None:
    """A snapshot of the hub is all links."""
    expected = model_fingerprint(folder)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert model_fingerprint(snapshot) == expected


def lose_shard(folder: Path) -> None:
    into_shards(folder)
    weight_files(folder)[1].unlink()


def break_link(folder: Path) -> None:
    into_shards(folder)
    shard = weight_files(folder)[1]
    shard.unlink()
    shard.symlink_to("/nowhere")


def break_only_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/nowhere")


def keep_another_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write_index(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        into_shards(folder).write_text(text)

    return write


def repeat_tensors(folder: Path) -> None:
    into_shards(folder)
    first, second = weight_files(folder)
    second.write_bytes(first.read_bytes())


def add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def change(name: str, text: str | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)

    return write


def set_in_config(**settings: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_shard, r"index\.json: names model-00002-of-00002\.safetensors, which is missing"),
        (break_link, r"index\.json: names model-00002-of-00002\.safetensors, which is missing or a broken link"),
        (break_only_link, r"holds neither model\.safetensors nor .*\n.*a link may be broken"),
        (keep_another_format, r"holds neither .*, but pytorch_model\.bin\n.*save_pretrained"),
        (write_index("{"), r"index\.json: cannot be read.*\n.*get it again"),
        (write_index("[]"), r"index\.json: holds no JSON object"),
        (write_index('{"weight_map": {}}'), r"index\.json: its weight_map names no files"),
        (write_index('{"weight_map": {"a": 1}}'), r"index\.json: its weight_map names no files"),
        (repeat_tensors, r"00002\.safetensors: holds .*, and so does model-00001-of-00002"),
        (add_adapter, r"holds an adapter beside the model .*\n.*merge"),
        (change("config.json", "{"), r"config\.json: cannot be read"),
        (change("config.json", "[]"), r"config\.json: holds no JSON object"),
        (change("tokenizer.json", None), r"its tokenizer cannot be loaded"),
        (change("tokenizer.json", "{}"), r"its tokenizer cannot be loaded: KeyError"),
        (change("tokenizer_config.json", "[]"), r"its tokenizer cannot be loaded"),
        (set_in_config(model_type="nobodys"), r"config\.json: no model can be made of it.*nobodys"),
        (set_in_config(num_attention_heads=0), r"config\.json: no model can be made of it: ZeroDivisionError"),
        (set_in_config(hidden_act="nobodys"), r"config\.json: no model can be made of it: KeyError"),
        (change("config.json", "[" * 100_000), r"config\.json: cannot be read"),
        (set_in_config(transformers_weights=5), r"config\.json: transformers_weights names no file"),
        (set_in_config(transformers_weights=["a"]), r"config\.json: transformers_weights names no file"),
        (set_in_config(transformers_weights="none.safetensors"), r"holds neither none\.safetensors nor"),
    ],
)
def test_a_damaged_folder_is_an_error_with_a_remedy(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as raised:
        model_facts(resolve_model(str(folder)))
    assert raised.value.remedy


def test_weights_that_lack_a_tensor_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight and 0 more, which would be random"
    ):
        load_base_model(ModelConfig(name=str(folder), device="cpu"))


def test_layers_that_the_configuration_leaves_out_are_not_dropped(folder: Path) -> None:
    set_in_config(num_hidden_layers=2)(folder)
    with pytest.raises(ModelError, match=r"config\.json leaves out layers: .* model\.layers\.2\..* and 8 more"):
        load_base_model(ModelConfig(name=str(folder), device="cpu"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-has-this-name/m"])
def test_a_name_that_no_path_can_be_is_an_error_with_a_remedy(name: str) -> None:
    for find in (resolve_model, find_model):
        with pytest.raises(ModelError, match="not a folder") as raised:
            find(name)
        assert raised.value.remedy


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written.*\n.*PRAG_CACHE"):
        resolve_model("smollm2-135m-instruct")


def test_an_index_that_transformers_cannot_read_is_an_error(folder: Path) -> None:
    index = into_shards(folder)
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(ModelError, match="cannot be loaded on cpu: KeyError: 'metadata'"):
        load_base_model(ModelConfig(name=str(folder), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_a_remedy(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.device = 'cuda', but torch .* cannot compute on a GPU here: .*\n"):
        load_base_model(ModelConfig(name=str(tiny_model_folder), device="cuda"))
    with pytest.raises(ModelError, match=r"this process holds 0\.5 GPUs, but torch .*: .+\n.*model\.device=cpu"):
        load_base_model(ModelConfig(name=str(tiny_model_folder)), gpus=0.5)


def test_a_process_that_holds_no_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray leaves all GPUs of a node visible to a process that holds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", 0) == "cpu"
    assert choose_device("cpu", 1) == "cpu"


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = SimpleNamespace(major=8 if native else 7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert choose_dtype("auto", "cuda") == dtype
    assert choose_dtype("bfloat16", "cuda") == torch.bfloat16


def test_a_model_whose_forward_pass_calls_the_cache_otherwise_is_refused(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        raise AssertionError

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    version = transformers.__version__
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM of transformers {version} takes no cache,.*\n.*release"):
        load_base_model(ModelConfig(name=str(tiny_model_folder), device="cpu"))
