"""The report of a run tells what the store knows: stages, rejects, pairs, losses, cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.execution.outcomes import StageReport
from pipelines.execution.progress import RunProgress
from pipelines.jobs.run_report import read_run_facts, run_page
from prag_core.config_file import dump_config, parse_config
from prag_core.errors import InputError, StoreError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.lora import find_targets
from prag_core.records import Reject
from prag_core.store.objects import Store
from prag_core.store.runs import RunInputs, put_inputs
from prag_core.store.tables import put_rejects
from tests.helpers.stores import PASSAGES, RECIPE, VERSION, adapters_of, commit

GPU = {"profile": "gpu", "actors_min": 2, "actors_max": 2}
AUGMENT = StageReport(
    "augment", taken=5, done=4, earlier=1, rejected={"no_usable_pair": 1}, seconds=3600.0,
    extra={"pairs": {"8": 1, "12": 3}, "coverage": 0.8, "refused": {"answer not in the passage": 7}},
)  # fmt: skip
TRAIN = StageReport("train", taken=4, done=4, earlier=1, rejected={}, seconds=1800.0, bytes=3_000_000)


@pytest.fixture
def store(tmp_path: Path, tiny_session: BaseModel) -> Store:
    """A store with a finished run, before which there was another adapter."""
    store = Store(str(tmp_path / "store"))
    adapters = adapters_of(store, find_targets(tiny_session.model, RECIPE.train)[0])
    adapters.describe()
    commit(adapters, [PASSAGES[0].key])
    config = parse_config({"store": store.url, "corpus": {"path": "c.jsonl"}, "run": GPU})
    store.put("runs/r1/config.yaml", dump_config(config).encode())
    put_inputs(store, "r1", RunInputs(VERSION, RECIPE.fingerprint))
    progress = RunProgress(store, "r1", Console(quiet=True))
    with progress.running():
        commit(adapters, [passage.key for passage in PASSAGES[1:4]])
        put_rejects(store, "r1", [Reject("augment", "no_usable_pair", "all <b>refused</b>", "c.jsonl:5", "k")])
        progress.finish(AUGMENT)
        progress.finish(TRAIN)
    put_rejects(store, "r0", [Reject("augment", "no_usable_pair", "of another run", "c.jsonl:6", "k")])
    store.put_json("runs/r1/report.json", {"snapshot": "20260101T000000-ab", "recipe": RECIPE.fingerprint})
    return store


def test_the_facts_of_a_finished_run(store: Store) -> None:
    facts = read_run_facts(store, None, price_gpu_hour=2.0)
    assert [reject.detail for reject in facts.rejects] == ["all <b>refused</b>"]
    told = facts.to_json()
    assert (told["run"], told["state"], told["snapshot"]) == ("r1", "finished", "20260101T000000-ab")
    # Two actors with a GPU each, for an hour and for half an hour.
    assert (told["gpu_hours"], told["dollars"], told["seconds"]) == (3.0, 6.0, 5400.0)
    assert told["last_loss_median"] == 0.5
    assert asdict(facts)["store"] == store.url


def test_the_page_says_first_what_came_of_it(store: Store) -> None:
    page = run_page(read_run_facts(store, "r1", 2.0))
    first = page.partition("<svg")[0]
    for text in (
        "Finished in 90 min: 4 adapters, 1 reject, snapshot 20260101T000000-ab. 6.00 dollars of GPUs at most.",
        "11.0 pairs a passage cover 80% of what the passages say.",
        "ended with a loss below",
    ):
        assert text in first
    assert page.count("<svg") == 3
    assert "all &lt;b&gt;refused&lt;/b&gt;" in page
    assert "answer not in the passage" in page
    assert "of another run" not in page


def test_a_failed_run_says_why_and_what_next(store: Store) -> None:
    store.put("runs/r2/config.yaml", b"")  # a configuration that this version cannot read
    with pytest.raises(StoreError), RunProgress(store, "r2", Console(quiet=True)).running():
        raise StoreError("the disk is full", "make room")
    facts = read_run_facts(store, None)
    assert facts.to_json()["dollars"] is None
    page = run_page(facts)
    assert "Failed after 0.00 s. StoreError: the disk is full Run `prag run` again to continue." in page


def test_an_unknown_run_is_told_with_those_that_there_are(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run r9") as caught:
        read_run_facts(store, "r9")
    assert "r1" in str(caught.value)
    with pytest.raises(InputError, match="no run yet"):
        read_run_facts(Store(str(tmp_path / "empty")), None)
