"""A plan from a measured sample has a price and leaves nothing in the store; a few passages are measured unasked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.preflight import gpus
from pipelines.planning import plan as planning
from prag_core.errors import ClusterError
from tests.helpers.command_line import prag
from tests.helpers.passages import make_passage
from tests.helpers.workspace import Workspace

pytestmark = pytest.mark.slow


def test_a_measured_plan_has_a_price_and_writes_nothing(tmp_path: Path, ray_here: str) -> None:
    work = Workspace(tmp_path, [make_passage(n, words=20 + 5 * (n % 7)) for n in range(40)])
    settings = ["--set", "run.train_batch=2", "--set", "run.train.actor_gpus=0.5", "--set", "run.actors_max=4"]
    # The GPU is one that Ray counts and nobody has.
    settings += ["--set", "run.tokens_per_step=256", "--set", "model.device=cpu"]
    measured = ["--measure", "10", "--price-gpu-hour", "2.5"]
    plan = json.loads(work.run("plan", "-c", "config.yaml", "--json", *settings, *measured))
    assert (plan["passages"], plan["to_augment"], plan["to_train"]) == (40, 40, 40)
    found = re.fullmatch(r"measured now: 10 passages in (\d+) stacks", plan["basis"])
    assert found
    assert 2 <= int(found[1]) <= 10
    # Two actors of half a GPU have room. Eight tasks for each would be 16 of 2.5 passages; of 3 passages they are 14.
    assert (plan["puts"], plan["gets"]) == (2 * 14 + 10, 3 * 14 + 2 * 10)
    # Half a GPU for each actor, at 2.5 dollars an hour.
    assert plan["gpu_hours"] == pytest.approx(plan["train_seconds"] * 0.5 / 3600)
    assert plan["dollars"] == pytest.approx(2.5 * plan["gpu_hours"])
    for name in ("tokens", "gpu_hours", "dollars"):
        low, high = plan[f"{name}_interval"]
        assert 0 <= low < plan[name] < high
    assert sorted(plan["wall_seconds"], key=int) == ["1", "2", "4"]
    assert plan["wall_seconds"]["1"] > plan["wall_seconds"]["4"] > plan["train_seconds"] / 4
    store = tmp_path / "store"
    assert not store.exists() or [path for path in store.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_an_actor_whose_gpu_torch_cannot_use_says_so_and_does_not_compute_on_the_cpu(
    tmp_path: Path, ray_here: str
) -> None:
    work = Workspace(tmp_path, [make_passage(1)])
    settings = ["--set", "run.train.actor_gpus=0.5"]
    said = work.run("plan", "-c", "config.yaml", "--measure", "1", *settings, code=4)
    assert "this process holds 0.5 GPUs, but torch" in said
    assert not list((work.folder / "store").rglob("*.parquet"))


def test_a_few_passages_are_measured_where_nothing_is_known(
    tmp_path: Path, ray_here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path, [make_passage(n) for n in range(6)])
    command = ("plan", "-c", "config.yaml", "--json")
    ended = prag(tmp_path, *command)
    plan = json.loads(ended.out)
    assert re.fullmatch(r"measured now: 4 passages in \d+ stacks?", plan["basis"])
    assert plan["train_seconds"] > 0
    said = " ".join(ended.err.split())
    assert "timing 4 passages on one actor, for 2 min at most; --measure 0 leaves it out" in said
    # Not unasked: what may cost money, or what this machine cannot hold.
    for setting, reason in (
        ("augment.generator=openai", "it would ask the endpoint"),
        ("run.actor_gpus=8", "an actor takes 8 GPU, this machine has 1"),
    ):
        ended = prag(tmp_path, *command, "--set", setting)
        assert (json.loads(ended.out)["basis"], reason in " ".join(ended.err.split())) == ("no measurements yet", True)
    assert "takes 8 GPU" in work.run(
        *command, "--set", "run.actor_gpus=8", "--measure", "2", code=ClusterError.exit_code
    )
    monkeypatch.setattr(planning, "_FEW_S", 0.01)
    ended = prag(tmp_path, *command)
    assert json.loads(ended.out)["basis"] == "no measurements yet"
    assert "stopped timing" in ended.err
    # What somebody asks for has no such limit, and what they do not want is left out.
    assert json.loads(work.run(*command, "--measure", "1"))["basis"] == "measured now: 1 passage in 1 stack"
    shown = work.run("plan", "-c", "config.yaml", "--measure", "0")
    assert "Unknown. Run `prag plan --measure 12` to time 12 passages." in " ".join(shown.replace("│", " ").split())
    assert re.search(r"based on +│ no measurements yet", shown)


def test_what_a_run_stored_is_not_measured_again(tmp_path: Path, ray_here: str) -> None:
    work = Workspace(tmp_path, [make_passage(n) for n in range(3)])
    work.report()
    work.write_corpus([make_passage(n) for n in range(5)])
    ended = prag(tmp_path, "plan", "-c", "config.yaml", "--json", "--set", "augment.generator=none")
    assert "timing" not in ended.err
    assert json.loads(ended.out)["basis"].startswith("earlier runs: 1 commit")
