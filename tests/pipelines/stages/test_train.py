"""A training task commits full shards, or fewer adapters after some time, and nothing twice when it is retried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.execution.outcomes import TASK
from pipelines.settings import make_context
from pipelines.stages.train import TrainAdapters, adapters_per_shard, passages_per_task
from prag_core.config import Config
from prag_core.config_file import parse_config
from prag_core.errors import LeaseError
from prag_core.records import LedgerRow, Reject, from_table
from prag_core.store.objects import Store
from prag_core.store.runs import hold_lease
from tests.helpers.passages import make_passage
from tests.helpers.training import outcomes_here, training_batch

ADAPTER_BYTES = 2880  # of the tiny model, in bf16


def settings(folder: Path, model: Path, recipe: dict | None = None, **run: object) -> Config:
    return parse_config(
        {
            "store": str(folder / "store"),
            "storage": {"shard_mb": 5.5 * ADAPTER_BYTES / 1e6},
            "corpus": {"path": "none"},
            "model": {"name": str(model), "dtype": "float32"},
            "augment": {"generator": "none"},
            "train": {"epochs": 1, **(recipe or {})},
            "run": run,
        }
    )


def batch_of(count: int) -> pa.Table:
    return training_batch([make_passage(n) for n in range(count)])


def train(config: Config, table: pa.Table) -> tuple[Store, list[LedgerRow], list[dict]]:
    store = Store(config.store)
    actor = TrainAdapters(make_context(config, "run"))
    outcomes = pa.concat_tables(outcomes_here(actor, table)).to_pylist()
    rows = from_table(LedgerRow, store.get_table(LedgerRow, store.list("adapters", ".parquet")))
    return store, rows, outcomes


def test_shards_are_filled_to_their_target(tmp_path: Path, tiny_model_folder: Path) -> None:
    store, rows, outcomes = train(settings(tmp_path, tiny_model_folder), batch_of(12))
    assert len({row.key for row in rows}) == len(rows) == len(outcomes) == 12
    shards = [row.shard for row in rows]
    assert sorted(shards.count(shard) for shard in set(shards)) == [2, 5, 5]
    assert {row.length for row in rows} == {ADAPTER_BYTES}
    assert sorted(store.list("adapters", ".safetensors")) == sorted(set(shards))


def test_adapters_are_committed_in_time_even_if_the_shard_is_not_full(tmp_path: Path, tiny_model_folder: Path) -> None:
    _, rows, _ = train(settings(tmp_path, tiny_model_folder, commit_every_s=0), batch_of(3))
    assert len({row.shard for row in rows}) == 3


def test_a_task_of_one_shard_leaves_one_thing_to_do_beside_the_next_task(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    config = settings(tmp_path, tiny_model_folder)
    actor = TrainAdapters(make_context(config, "run"))
    table = batch_of(4)
    # A second one would wait for the first before the next task begins.
    (finish,) = [done for done in actor(actor.prepare(table), lambda share: None) if not isinstance(done, pa.Table)]
    assert Store(config.store).list("", "") == []
    assert sorted(finish()["key"].to_pylist()) == sorted(table["key"].to_pylist())


def test_a_retried_batch_trains_only_what_was_not_committed(tmp_path: Path, tiny_model_folder: Path) -> None:
    config, table = settings(tmp_path, tiny_model_folder), batch_of(12)
    store, rows, outcomes = train(config, table)
    # As if the process had died after its first commit.
    first, *later = sorted(
        store.list("adapters", ".parquet"), key=lambda name: store.get_table(LedgerRow, [name])["created"][0].as_py()
    )
    kept = from_table(LedgerRow, store.get_table(LedgerRow, [first]))
    for part in later:
        store.remove(part)
    _, again, outcomes_again = train(config, table)
    assert len({row.key for row in again}) == len(again) == 12
    assert [row for row in again if row in kept] == kept
    assert len([row for row in again if row in rows]) == len(kept)
    assert sorted(o["key"] for o in outcomes_again) == sorted(o["key"] for o in outcomes)
    # Once all is committed, nothing is trained at all.
    assert train(config, table)[1] == again
    assert train(config, table.slice(3, 4))[1] == again
    # Another batch of the same passages is another task.
    assert len(train(config, batch_of(11))[1]) == 23


def rejects(store: Store) -> dict[str, str]:
    found = from_table(Reject, store.get_table(Reject, store.list("rejects/train", ".parquet")))
    return {reject.source: f"{reject.reason}: {reject.detail}" for reject in found}


def test_passages_without_an_answer_to_learn_are_rejects(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = settings(tmp_path, tiny_model_folder, recipe={"max_tokens": 32})
    store, rows, outcomes = train(config, batch_of(3))
    assert rows == []
    assert [outcome["rejected"] for outcome in outcomes] == ["nothing_to_train"] * 3
    assert set(rejects(store)) == {"p0", "p1", "p2"}
    assert "train.max_tokens = 32" in rejects(store)["p0"]


def test_of_passages_with_the_same_examples_one_is_trained(tmp_path: Path, tiny_model_folder: Path) -> None:
    passages = [make_passage(n) for n in range(3)]
    twin = replace(passages[0], key="f" * 32, sources=("twin",))
    table = pa.concat_tables([training_batch(passages), training_batch([twin])])
    table = table.set_column(table.column_names.index(TASK), TASK, pa.array(["task"] * 4))
    store, rows, outcomes = train(settings(tmp_path, tiny_model_folder), table)
    assert {row.key for row in rows} == {passage.key for passage in passages}
    assert len(outcomes) == 4
    assert rejects(store)["twin"].startswith("equals_another: ")


def test_a_rate_too_small_to_learn_is_a_reject(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = settings(tmp_path, tiny_model_folder, recipe={"learning_rate": 1e-45})
    store, rows, _ = train(config, batch_of(2))
    assert rows == []
    assert "train.learning_rate" in rejects(store)["p1"]


def test_each_training_step_sends_a_heartbeat(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = settings(tmp_path, tiny_model_folder)
    shares: list[float] = []
    actor = TrainAdapters(make_context(config, "run"))
    assert sum(done.num_rows for done in outcomes_here(actor, batch_of(1), shares.append)) == 1
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0])  # the questions of a passage, once


def test_without_the_lease_nothing_is_committed(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = settings(tmp_path, tiny_model_folder)
    with hold_lease(Store(config.store), "another"), pytest.raises(LeaseError, match="taken over by run another"):
        train(config, batch_of(2))
    assert Store(config.store).list("adapters", "") == []


def test_a_task_fills_a_shard_unless_the_corpus_is_small(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = settings(tmp_path, tiny_model_folder, train_batch=2)
    context = make_context(config)
    assert adapters_per_shard(context) == 5
    # Eight tasks for the one actor, never smaller than train_batch, never larger than a shard.
    assert [passages_per_task(total, context, 1) for total in (1, 16, 24, 25, 1000)] == [2, 2, 3, 4, 5]
    assert [passages_per_task(total, context, 10) for total in (160, 240, 1000)] == [2, 3, 5]
    huge = config.model_copy(update={"storage": config.storage.model_copy(update={"shard_mb": 1e-3})})
    assert passages_per_task(1000, replace(context, config=huge), 1) == 1
