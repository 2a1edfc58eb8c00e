"""The strict configuration: errors name the path of the setting and the most similar known name."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from prag_core.config import augment_recipe, train_recipe
from prag_core.config_file import dump_config, load_config
from prag_core.errors import ConfigError
from prag_core.identity import fingerprint
from prag_core.recipe import RECIPES, AugmentRecipe, Recipe

MINIMAL = "store: s\ncorpus: {path: c.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_and_overrides(write) -> None:
    config = load_config(write(MINIMAL), ["train.epochs=7", "answer.mode=prag", "model.name=./m"])
    assert (config.train.epochs, config.answer.mode, config.model.name) == (7, "prag", "./m")
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize(
    ("overrides", "slots", "prefill_chunk", "batch_tokens"),
    [
        ([], 16, 512, 32_768),
        (["run.profile=gpu"], 64, 8192, 131_072),
        (["run.profile=cluster", "serve.slots=24"], 24, 8192, 131_072),
        (["run.profile=gpu", "serve.prefill_chunk=512"], 64, 512, 131_072),
        (["run.profile=cluster", "run.actor_gpus=0"], 16, 512, 32_768),
    ],
)
def test_a_replica_with_a_gpu_holds_more_unless_told_otherwise(
    write, overrides: list[str], slots: int, prefill_chunk: int, batch_tokens: int
) -> None:
    config = load_config(write(MINIMAL), overrides)
    found = config.serve
    assert (found.slots, found.prefill_chunk, found.batch_tokens) == (slots, prefill_chunk, batch_tokens)
    # As a replica gets it: with all defaults written out.
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL, ["train.epoch=4"], r"unknown key train\.epoch\n.*did you mean train\.epochs\?"),
        (MINIMAL + "trian: {}\n", [], r"unknown key trian\n.*did you mean train\?"),
        (MINIMAL, ["augment.endpoint.modle=x"], r"unknown key augment\.endpoint\.modle\n.*augment\.endpoint\.model\?"),
        (MINIMAL, ["train.epochs=0"], r"train\.epochs = '0'"),
        (MINIMAL, ["answer.mode=fast"], r"^override: answer\.mode = 'fast'"),
        (MINIMAL + "answer: {mode: fast}\n", ["answer.top_k=2"], r"config\.yaml: answer\.mode = 'fast'"),
        ("corpus: {path: x}\n", [], r"store is required"),
        ("store: [\n", [], r"not valid YAML"),
        ("store: a\n  b: c: d\n", [], r"→ Fix line 2, column 4\."),
        ("just text\n", [], r"holds no settings"),
        (MINIMAL, ["nonsense"], r"not KEY=VALUE"),
        (MINIMAL, ["store.x=1"], r"'store' holds no settings"),
        (MINIMAL, ["storage.adapter_dtype=int4"], r"storage\.adapter_dtype = 'int4'"),
        (MINIMAL, ["storage.endpoint=x"], r"unknown key storage\.endpoint\n.*storage\.endpoint_url\?"),
        (MINIMAL, ["storage.secret_key=x"], r"unknown key storage\.secret_key"),
        (MINIMAL, ["train.start=x"], r"unknown key train\.start\n.*called train\.initial_adapter now"),
        (MINIMAL, ["train.without=qa"], r"unknown key train\.without\n.*called train\.ablation now"),
    ],
)
def test_errors_name_the_wrong_setting(write, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), overrides)


@pytest.mark.parametrize("key", ["store", "storage.endpoint_url", "corpus.path"])
@pytest.mark.parametrize(
    "url", ["s3://AKEY:hush@bucket/x", "s3://AKEY@bucket", "s3://AKEY:hu/sh@bucket", "http://AKEY:hush@host:1/x"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(write, key: str, url: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} holds credentials\n.*AWS_\* environment") as caught:
        load_config(write(MINIMAL), [f"{key}={url}"])
    assert not [part for part in ("hush", "hu/sh", "AKEY") if part in str(caught.value)]


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b", "s3://arn:aws:s3:eu:1:accesspoint/x", "http://host:8333/a@b", "abfs://box@account/x"]
)
def test_a_url_without_credentials_is_accepted(write, url: str) -> None:
    assert load_config(write(MINIMAL), [f"store={url}"]).store == url


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {epochs: 1}\ntrain: {rank: 2}\n", [], "line 4: the key train is given twice, first in line 3"),
        ("train:\n  epochs: 1\n  rank: 2\n  epochs: 2\n", [], "line 6: the key epochs is given twice.* in line 4"),
        ("augment: {endpoint: {model: a, model: b}}\n", [], "line 3: the key model is given twice"),
        ("'store': t\n", [], "line 3: the key store is given twice"),
        ("", ["corpus.columns={id: a, id: b}"], "override .*: line 1: the key id is given twice"),
        ("train: &a {rank: 2}\nrun: {<<: *a}\n", [], "line 4: a key must be one name, and no merge key"),
        ("? [a, b]\n: 1\n", [], "line 3: a key must be one name"),
        ("train: {rank: !!int 3}\n", [], "line 3: the tag .*int' is not allowed"),
        ("train: &a {rank: *a}\n", [], "an alias holds itself"),
        (
            "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]\n" for b, n in pairwise("abcdefghijk")),
            [],
            "more than 10,000 values",
        ),
        ("---\nrun: {}\n", [], "single document(.|\n)*line 3"),
        ("train:\n\tepochs: 1\n", [], "cannot start any token(.|\n)*line 4"),
        ("train:\n", [], "train is a section\n.*write its settings below"),
        ("train: recall\n", [], "train is a section"),
        ("train: {learning_rate: .inf}\n", [], r"train\.learning_rate = '\.inf'"),
        ("", ["train.learning_rate=inf"], r"train\.learning_rate = 'inf': .*finite"),
        ("", ["train.epochs=0x10"], r"train\.epochs = '0x10': Input should be a valid integer"),
        ("", ["store="], r"store = None"),
        ("", ["store= "], r"store = None"),
        ("", ["serve.modes=[rag"], r"override 'serve.modes=\[rag': not valid YAML"),
    ],
)
def test_what_yaml_would_guess_or_drop_is_refused(write, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(MINIMAL + text), overrides)


def test_a_path_without_a_meaning_is_refused(write) -> None:
    with pytest.raises(ConfigError, match="holds a zero byte"):
        load_config(write('store: "a\\0b"\ncorpus: {path: c.jsonl}\n'))
    with pytest.raises(ConfigError, match="store = '': is empty"):
        load_config(write("store: ''\ncorpus: {path: c.jsonl}\n"))


@pytest.mark.parametrize("as_override", [False, True])
@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("index.language", "no", "no"),
        ("model.name", "2024-01-01", "2024-01-01"),
        ("model.name", "010", "010"),
        ("model.name", "1_000", "1_000"),
        ("model.name", "12:30", "12:30"),
        ("model.name", "Off", "Off"),
        ("train.epochs", "010", 10),
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.learning_rate", "5E-4", 5e-4),
        ("run.checkpoint_activations", "on", True),
        ("train.eos", "no", False),
        ("corpus.limit", "null", None),
        ("corpus.limit", "~", None),
        ("train.targets", "[q_proj, no]", ("q_proj", "no")),
        ("serve.modes", "[rag]", ("rag",)),
    ],
)
def test_a_value_is_what_was_typed(write, as_override: bool, key: str, typed: str, value: object) -> None:
    section, name = key.split(".")
    text = "" if section == "corpus" else f"{section}: {{{name}: {typed}}}\n"
    corpus = f"corpus: {{path: c.jsonl{f', {name}: {typed}' if section == 'corpus' else ''}}}\n"
    config = (
        load_config(write(MINIMAL), [f"{key}={typed}"])
        if as_override
        else load_config(write(f"store: s\n{corpus}{text}"))
    )
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    "value", ["/data/run #1", "a: b", "[x]", "{x}", "*x", "&x", "!x", "'x'", '"x"', "%x", "null/x"]
)
def test_the_value_of_an_override_is_a_text_where_the_setting_is_one(write, value: str) -> None:
    assert load_config(write(MINIMAL), [f"store={value}"]).store == value


def test_a_byte_order_mark_and_an_alias_are_read(write) -> None:
    text = "store: &here s\ncorpus: {path: c.jsonl}\nmodel: {name: *here}\n"
    assert load_config(write("\ufeff" + text)).model.name == "s"


def test_strings_that_look_like_something_else_survive_writing_and_reading(write) -> None:
    config = load_config(write(MINIMAL), ["store=1e5", "model.name=no", "augment.model='null'", "train.ablation=qa"])
    assert load_config(write(dump_config(config))) == config


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


def test_the_example_is_valid() -> None:
    config = load_config("package://pipelines/examples/demo.yaml")
    assert train_recipe(config.train).name in RECIPES


def recipe_of(config) -> Recipe:
    train = train_recipe(config.train)
    return Recipe("base", augment_recipe(config.augment, "generator", train), train)


def test_machine_facts_never_enter_a_fingerprint(write) -> None:
    plain = load_config(write(MINIMAL))
    moved = load_config(
        write(MINIMAL),
        [
            "run.train_batch=2",
            "run.tokens_per_step=512",
            "run.profile=gpu",
            "model.device=cpu",
            "model.dtype=float32",
            "store=elsewhere",
            "augment.endpoint.url=http://x/v1",
            "run.augment_batch=3",
            "answer.top_k=1",
            "storage.adapter_dtype=int8",
        ],
    )
    assert recipe_of(plain).fingerprint == recipe_of(moved).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=9",
        "train.rank=4",
        "train.seed=1",
        "augment.pairs=2",
        "augment.strategy=paper",
        "train.recipe=paper",
        "train.ablation=qa",
        "augment.import_file=a.jsonl",
    ],
)
def test_settings_that_decide_an_adapter_enter_its_fingerprint(write, override: str) -> None:
    before, after = (recipe_of(load_config(write(MINIMAL), overrides)) for overrides in ([], [override]))
    assert before.fingerprint != after.fingerprint


def test_the_recipe_records_the_ablation_but_not_the_path_of_the_initial_adapter(write) -> None:
    config = load_config(write(MINIMAL), ["train.ablation=qa", "train.initial_adapter=./peft"])
    recipe = train_recipe(config.train)
    assert (recipe.without, recipe.start) == ("qa", "")


def test_a_recipe_can_be_read_from_its_document(write) -> None:
    recipe = recipe_of(load_config(write(MINIMAL)))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert isinstance(recipe.augment, AugmentRecipe)


def test_the_error_for_an_unknown_recipe_lists_the_known_ones(write) -> None:
    with pytest.raises(ConfigError, match=r"train\.recipe = 'recal'.*\n.*did you mean recall\?.*paper, recall"):
        load_config(write(MINIMAL), ["train.recipe=recal"])


def test_a_rate_that_is_set_holds_for_any_model_and_the_recipes_own_falls_with_its_width(write) -> None:
    own = train_recipe(load_config(write(MINIMAL)).train)
    assert own.rate_for(64) == own.rate_for(576) == own.learning_rate
    assert own.rate_for(1152) == own.learning_rate / 4
    chosen = train_recipe(load_config(write(MINIMAL), ["train.learning_rate=0.002"]).train)
    assert chosen.rate_for(576) == chosen.rate_for(1152) == 0.002


def test_the_recipe_paper_has_the_papers_settings() -> None:
    paper = RECIPES["paper"]
    assert (paper.rank, paper.alpha, paper.scale, paper.learning_rate, paper.epochs) == (2, 32, 16, 3e-4, 1)
    assert not paper.eos


def test_settings_that_were_added_later_leave_older_fingerprints_as_they_were(write) -> None:
    recipe = recipe_of(load_config(write(MINIMAL), ["train.recipe=paper"]))
    older = recipe.to_json()
    for name in ("template", "without", "rate_width", "examples_per_step", "schedule"):
        del older["train"][name]
    del older["augment"]["complete_imports"]
    assert Recipe.from_json(older) == recipe
    assert recipe.fingerprint == fingerprint(older)
