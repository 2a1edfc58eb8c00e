"""A configuration names a profile and may replace its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.resources import PROFILES
from pipelines.settings import augmenting_model, describe, profile_of, writer_of
from prag_core.config_file import parse_config
from prag_core.errors import ConfigError
from prag_core.store.adapters import get_start


def profile(*, augment: dict[str, object] | None = None, model: dict[str, object] | None = None, **run: object):
    sections = {"augment": augment or {}, "model": model or {}, "run": run}
    return profile_of(parse_config({"store": "s", "corpus": {"path": "c"}, **sections}))


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_by_its_name(name: str) -> None:
    assert profile(profile=name) == PROFILES[name]


def test_single_numbers_are_replaced() -> None:
    made = profile(profile="cluster", actors_min=2, actors_max=6, actor_gpus=0, actor_cpus=2, partitions=8)
    for pool in (made.augment, made.train, made.answer):
        assert (pool.min_size, pool.max_size, pool.cpus, pool.gpus, pool.threads) == (2, 6, 2, 0, 2)
    assert (made.partitions, made.index_cpus) == (8, 2)
    assert made.tokens_per_step == PROFILES["cluster"].tokens_per_step
    assert profile(tokens_per_step=128).tokens_per_step == 128


def test_a_stage_may_have_numbers_of_its_own() -> None:
    own = {"actor_gpus": 0.5, "actors_max": 4}
    made = profile_of(
        parse_config(
            {
                "store": "s",
                "corpus": {"path": "c"},
                "run": {"profile": "gpu", "actor_gpus": 0, "actor_cpus": 3, "train": own, "answer": {"actor_gpus": 1}},
            }
        )
    )
    assert [pool.gpus for pool in (made.augment, made.train, made.answer)] == [0, 0.5, 1]
    assert [pool.max_size for pool in (made.augment, made.train, made.answer)] == [8, 4, 8]
    assert {pool.cpus for pool in (made.augment, made.train, made.answer)} == {3}


@pytest.mark.parametrize(("generator", "gpus"), [("transformers", 1), ("openai", 0), ("none", 0)])
def test_augmenting_without_a_model_of_its_own_holds_no_gpu(generator: str, gpus: float) -> None:
    made = profile(profile="cluster", augment={"generator": generator})
    assert (made.augment.gpus, made.train.gpus, made.answer.gpus) == (gpus, 1, 1)


def test_a_model_on_the_cpu_holds_no_gpu() -> None:
    made = profile(profile="gpu", model={"device": "cpu"})
    assert (made.augment.gpus, made.train.gpus, made.answer.gpus) == (0, 0, 0)


def test_a_pool_grows_from_its_minimum_to_its_maximum() -> None:
    pool = profile(profile="gpu", actors_min=3).train.pool()
    assert (pool["compute"].min_size, pool["compute"].max_size) == (3, 8)
    assert (pool["num_cpus"], pool["num_gpus"]) == (2, 1)
    assert "num_gpus" not in profile(profile="gpu", actor_gpus=0).train.pool()


def test_the_maximum_bounds_the_minimum() -> None:
    assert profile(profile="cluster", actors_min=5, actors_max=2).train.min_size == 2


def test_a_laptop_computes_with_all_its_cores() -> None:
    assert profile(actor_cpus=1).train.threads is None


@pytest.mark.parametrize("wrong", [{"profile": "lap"}, {"actors_max": 0}, {"actor_cpus": 0}, {"partitions": 0}])
def test_invalid_numbers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        profile(**wrong)


def augmenting(**augment: object):
    config = parse_config({"store": "s", "corpus": {"path": "c"}, "augment": augment})
    recipe, _ = describe(config)
    return recipe.augment, writer_of(config, recipe.base_model)


def test_the_packaged_model_has_a_writer() -> None:
    recipe, writer = augmenting()
    assert recipe.strategy == "writer"
    assert writer is not None
    assert {tensor.isfinite().all().item() for tensor in get_start(writer.store, writer.name).values()} == {True}
    # Without it, the model makes other augmentations.
    lines, nobody = augmenting(strategy="lines")
    assert (lines.strategy, nobody) == ("lines", None)
    assert recipe.generator != lines.generator
    # An endpoint or a file knows nothing of a writer.
    assert [augmenting(generator=name)[0].strategy for name in ("openai", "none")] == ["lines", "lines"]
    # It completes imports, whatever the base model is, unless something else is named.
    assert augmenting(import_file="f.jsonl")[0] == replace(recipe, imported=True, complete_imports=True)
    config = {"store": "s", "corpus": {"path": "c"}, "model": {"name": "another"}, "augment": {"import_file": "f"}}
    assert augmenting_model(parse_config(config)) == "smollm2-135m-instruct"
    for other in ({"complete_imports": False}, {"strategy": "lines"}, {"writer": "ab"}, {"generator": "vllm"}):
        changed = parse_config({**config, "augment": {"import_file": "f", **other}})
        assert augmenting_model(changed) == "another"
    with pytest.raises(ConfigError, match=r"augment.writer = 'ab': .*starts/ab.json"):
        augmenting(writer="ab")
    with pytest.raises(ConfigError, match="there is no writer of this model"):
        augmenting(strategy="writer", generator="openai")
