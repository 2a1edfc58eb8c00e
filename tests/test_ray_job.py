"""The manifest agrees with the project: Ray's version, the entry point, the image, the controller's rules."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml
from typer.testing import CliRunner

from pipelines.cli import app

ROOT = Path(__file__).parent.parent
JOB = yaml.safe_load((ROOT / "ray_job.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_it_is_a_ray_job_within_the_controllers_rules() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert len(JOB["metadata"]["name"]) <= 47
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True  # ttlSecondsAfterFinished needs it
    assert yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]


def test_versions_agree() -> None:
    (pinned,) = [d.partition("==")[2] for d in PROJECT["dependencies"] if d.startswith("ray[")]
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    cluster = JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {c["image"] for group in groups for c in group["template"]["spec"]["containers"]}
    assert images == {f"{PROJECT['name']}:{PROJECT['version']}"}


def test_the_entry_point_exists() -> None:
    program, command, *options = JOB["spec"]["entrypoint"].split()
    assert program in PROJECT["scripts"]
    shown = CliRunner().invoke(app, [command, "--help"]).output
    assert all(option in shown for option in options if option.startswith("--"))
