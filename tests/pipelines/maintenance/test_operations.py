"""The operator's commands: with which configuration a repair makes again what it removed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.maintenance.operations import _config_of_service
from prag_core.config_file import dump_config, parse_config
from prag_core.errors import ConfigError
from prag_core.store.objects import Store
from prag_core.store.runs import RunInputs, put_config, put_inputs
from prag_core.store.snapshot import Snapshot, created_now, publish

RUN = "20260101T000000-aaaaaa"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    snapshot = Snapshot(
        corpus_version="v1", index="i", recipe="recipe", base_model="base", ledger_parts=(), passages=2, adapters=2
    )
    publish(store, created_now(snapshot), replaces=None)
    return store


def test_a_repair_has_the_configuration_of_the_run_in_service(store: Store) -> None:
    """The demo's limit and import are options of its run, and its configuration file has neither."""
    given = parse_config({"store": store.url, "corpus": {"path": "all.jsonl"}, "storage": {"retries": 2}})
    said = io.StringIO()
    console = Console(file=said, width=200)
    assert _config_of_service(store, given, console, ()) == given
    assert "no run stored its configuration" in said.getvalue()
    made = parse_config(
        {
            "store": "where it was made",
            "corpus": {"path": "all.jsonl", "limit": 16},
            "augment": {"import_file": "demo.jsonl", "generator": "none"},
            "run": {"max_reject_share": 0.9},
        }
    )
    put_config(store, RUN, dump_config(made))
    put_inputs(store, RUN, RunInputs("v1", "recipe"))
    used = _config_of_service(store, given, console, ["run.train_batch=2"])
    assert (used.corpus.limit, used.augment, used.run.max_reject_share) == (16, made.augment, 0.9)
    assert (used.run.train_batch, used.store, used.storage) == (2, store.url, given.storage)
    assert f"with the configuration of run {RUN}" in said.getvalue()


def test_a_stored_configuration_that_is_not_valid_is_not_replaced_by_another(store: Store) -> None:
    put_config(store, RUN, "store: s\ncorpus: {path: c}\ntrain: {start: x}\n")
    put_inputs(store, RUN, RunInputs("v1", "recipe"))
    given = parse_config({"store": store.url, "corpus": {"path": "all.jsonl"}})
    with pytest.raises(
        ConfigError, match=r"config\.yaml: unknown key train\.start(.|\n)*run `prag run` with"
    ) as raised:
        _config_of_service(store, given, Console(file=io.StringIO()), ())
    assert RUN in raised.value.message
