"""Preflight checks of machines: what each node has, and where nodes differ. Knows nothing of passages.

A check never raises; it returns a `CheckResult`, so that one preflight names everything that is wrong.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.resources import list_nodes

MIB = 1024 * 1024
# How long a node may take to start a process and answer: starting Python and importing Ray takes seconds.
NODE_TIMEOUT_S = 60.0

CheckOutcome = Literal["ok", "failed", "warning", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. `where` is a node, or empty for this machine; `remedy` says what to do."""

    check: str
    outcome: CheckOutcome
    detail: str
    remedy: str = ""
    where: str = ""
    duration_ms: float | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver reports it."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class NodeReport:
    """What one node reports. `cuda` is the CUDA version that its torch was built for, empty for a CPU build."""

    name: str
    resources: Mapping[str, float]
    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    cuda: str = ""
    findings: tuple[CheckResult, ...] = ()
    answer: Any = None


def on_cluster() -> bool:
    """Whether a job would join a running cluster (RAY_ADDRESS is set)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of Python and of each package, `missing` if it is not installed; imports none of them."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def gpus() -> tuple[Gpu, ...]:
    """Return this machine's GPUs, including those that Ray hides from this process; none without a working driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.count(",") == 2]
    return tuple(Gpu(name, int(total) * MIB, int(free) * MIB) for name, total, free in rows)


def torch_cuda() -> str:
    """Return the CUDA version that torch was built for, empty for a CPU build or without torch."""
    try:
        import torch
    except ImportError:
        return ""
    return torch.version.cuda or ""


def ask_nodes(packages: Sequence[str], ask: Callable[[], Any], timeout_s: float = NODE_TIMEOUT_S) -> list[NodeReport]:
    """Return a report of each node of the connected cluster, with what `ask` returned there as its `answer`.

    `ask` runs in a process on the node that takes none of its CPUs. A node that does not answer in time, or on which
    `ask` raises, has a failed finding instead of an answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def report() -> tuple[dict[str, str], tuple[Gpu, ...], str, Any]:
        found = gpus()
        return versions(packages), found, torch_cuda() if found else "", ask()

    alive = [node for node in list_nodes() if node["Alive"]]
    remote = ray.remote(report)
    asked = {}
    for node in alive:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[remote.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote()] = node
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    nodes = []
    for reference, node in asked.items():
        name, resources = node["NodeManagerAddress"], node["Resources"]
        if len(alive) > 1:
            name = f"{name} ({node['NodeID'][:8]})"
        if reference not in done:
            ray.cancel(reference, force=True)
            detail = f"no answer in {timeout_s:.0f} s"
            finding = CheckResult("node", "failed", detail, "see its logs in the dashboard", name)
            nodes.append(NodeReport(name, resources, findings=(finding,)))
            continue
        try:
            found, cards, cuda, answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            detail = f"{type(error.cause).__name__}: {_first_line(error.cause)}"
            finding = CheckResult("node", "failed", detail, "use the same image on every node", name)
            nodes.append(NodeReport(name, resources, findings=(finding,)))
        except ray.exceptions.RayError as error:
            finding = CheckResult("node", "warning", f"lost while it was asked: {_first_line(error)}", "", name)
            nodes.append(NodeReport(name, resources, findings=(finding,)))
        else:
            nodes.append(NodeReport(name, resources, found, cards, cuda, answer=answer))
    return nodes


def compare_versions(here: Mapping[str, str], nodes: Sequence[NodeReport]) -> list[CheckResult]:
    """Find the packages whose version on a node differs from the version on this machine."""
    findings = []
    for node in nodes:
        wrong = [
            f"{package} {there}, here {here[package]}"
            for package, there in node.versions.items()
            if _release(there) != _release(here[package])
        ]
        if wrong:
            remedy = "use the same image, or environment, on every node and where the job starts"
            findings.append(CheckResult("versions", "failed", "; ".join(wrong), remedy, node.name))
    if not findings:
        listed = ", ".join(f"{package} {version}" for package, version in here.items())
        findings.append(CheckResult("versions", "ok", f"{listed}; nodes: {len(nodes)}"))
    return findings


def _s(count: float) -> str:
    return "" if count == 1 else "s"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _release(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one release, built for two machines


def check_resources(cpus: float, gpus: float, user: str, nodes: Sequence[NodeReport]) -> CheckResult:
    """Check that a running node has the CPUs and GPUs that `user` (say, "a training actor") takes."""
    fit = [n for n in nodes if n.resources.get("CPU", 0) >= cpus and n.resources.get("GPU", 0) >= gpus]
    need = f"{user} takes {cpus:g} CPU{_s(cpus)} and {gpus:g} GPU{_s(gpus)}"
    if fit:
        return CheckResult("resources", "ok", f"{need}; nodes that can hold one: {len(fit)} of {len(nodes)}")
    return CheckResult(
        "resources",
        "warning",
        f"{need}; running nodes that can hold one: none of {len(nodes)}",
        "fine if an autoscaler adds such nodes; else the job waits for ever: lower run.actor_cpus, run.actor_gpus",
    )


def check_cuda(nodes: Sequence[NodeReport]) -> list[CheckResult]:
    """Find the nodes on which torch cannot use a GPU, for actors that need one but reserve none."""
    remedy = "set run.actor_gpus, so that only nodes with GPUs get such actors, or model.device=auto"
    findings = [
        CheckResult("device", "failed", "model.device = 'cuda', but torch can use no GPU", remedy, node.name)
        for node in nodes
        if not node.findings and not (node.gpus and node.cuda)
    ]
    return findings or [CheckResult("device", "ok", f"each node has a GPU; nodes: {len(nodes)}")]


def check_gpu_memory(needed_bytes: int, breakdown: str, remedy: str, nodes: Sequence[NodeReport]) -> list[CheckResult]:
    """Find the nodes to which Ray assigns GPUs that are missing or have too little memory.

    `breakdown` says what `needed_bytes` are for.
    """
    with_gpus = [node for node in nodes if node.resources.get("GPU", 0) and not node.findings]
    if not with_gpus:
        return [CheckResult("GPU memory", "skipped", "no node with a GPU is running")]
    findings = []
    for node in with_gpus:
        if not node.gpus:
            detail = f"Ray counts {node.resources['GPU']:g} GPUs, the driver shows none"
            findings.append(
                CheckResult("GPU memory", "failed", detail, "fix its driver, or set run.actor_gpus=0", node.name)
            )
        elif not node.cuda:
            findings.append(
                CheckResult("GPU memory", "failed", "its torch has no CUDA", "use the image's CUDA target", node.name)
            )
        elif (smallest := min(gpu.total_bytes for gpu in node.gpus)) < needed_bytes:
            detail = f"{smallest / 1e9:.1f} GB, at least {needed_bytes / 1e9:.1f} GB needed: {breakdown}"
            findings.append(CheckResult("GPU memory", "failed", detail, remedy, node.name))
    if not findings:
        detail = f"at least {needed_bytes / 1e9:.1f} GB needed ({breakdown}); nodes that have it: {len(with_gpus)}"
        findings.append(CheckResult("GPU memory", "ok", detail))
    return findings
