"""Preflight: find in seconds what would make a run fail after an hour, and say what to do about it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from cluster.preflight import (
    CheckResult,
    NodeReport,
    ask_nodes,
    check_cuda,
    check_gpu_memory,
    check_gpus,
    check_resources,
    compare_versions,
    gpus,
    on_cluster,
    probe_gpus,
    versions,
)
from cluster.resources import Actors, Profile
from cluster.session import JoinError, StartError, ray_session, socket_folder, wanted_folder
from pipelines.planning.checks import PreflightReport, check_corpus, check_node
from pipelines.settings import describe, profile_of
from pipelines.words import counted
from prag_core.augmentation.formats import read_augmentations
from prag_core.config import Config
from prag_core.data.files import shown, without_query
from prag_core.errors import ClusterError, InputError, StoreError
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.memory import CUDA_CONTEXT_BYTES
from prag_core.llm.model_facts import parameter_count
from prag_core.recipe import Recipe
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import Store, open_store
from prag_core.store.snapshot import check_base_model, current_id, load_snapshot

# Packages that must have the same version on the driver and its workers.
PACKAGES = ("prag-ray", "ray", "torch", "transformers", "peft", "pyarrow")
_GPU_REMEDY = "check that nvidia-smi shows the GPU and that torch is built for CUDA, no newer than the driver's"


def check_here(config: Config) -> PreflightReport:
    """Check from this machine, without Ray: corpus, augmentations, model, recipe, store, retriever.

    If Ray will be started on this machine, check too that the machine can hold an actor.
    """
    report = PreflightReport()
    warnings = report.check("corpus", lambda: _corpus(config))
    report.add([CheckResult("corpus", "warning", warning) for warning in warnings or ()])
    if config.augment.import_file:
        bad = report.check("augmentations", lambda: _import_file(config))
        report.add([CheckResult("augmentations", "warning", warning) for warning in bad or ()])
    described = report.check("model", lambda: _describe(config))
    store = report.check("store", lambda: _store(config))
    kind = index_kind(config.index)
    report.check(kind.REQUIREMENT, lambda: (str(kind.find_requirement()), None))
    if described is not None:
        recipe, report.layout = described
        if store is not None:
            report.check("snapshot", lambda: (_snapshot(config, store, recipe.base_model), None))
    if not on_cluster():
        report.add([CheckResult("cluster checks", "skipped", "running locally")])
        report.add([_check_sockets()])
        report.add(_check_machine(config, profile_of(config), report.layout))
    return report


def check_nodes(config: Config, profile: Profile, report: PreflightReport) -> None:
    """Check each node of the connected cluster, and add the findings to a report: see `docs/guides/kubernetes.md`."""
    here = versions(PACKAGES)
    with _probe(config) as probe:
        nodes = ask_nodes(PACKAGES, partial(check_node, config, probe), probe=_needs_gpus(config, profile))
    nodes = [node for node in nodes if node.versions or node.findings]
    workers = [node for node in nodes if node.resources.get("CPU", 0)]
    report.add([finding for node in nodes for finding in node.findings])
    report.add(compare_versions(here, nodes))
    if not workers:
        report.add([CheckResult("nodes", "warning", "no worker node is up yet: model, Java and GPUs are not checked")])
        return
    # A head without CPUs runs no work, so only its store is checked.
    answers = [
        replace(finding, where=node.name)
        for node in nodes
        for finding in node.answer or ()
        if node in workers or finding.check == "store"
    ]
    # What fails on this machine fails on the nodes too, and is reported once.
    known = {finding.detail for finding in report.findings if finding.outcome == "failed"}
    report.add(_merge_passed([answer for answer in answers if answer.detail not in known]))
    for stage, actors in _stages(profile):
        report.add([check_resources(actors.cpus, actors.gpus, f"a {stage} actor", workers)])
    if config.model.device == "cuda" and not profile.train.gpus:
        report.add(check_cuda(workers))
    if _needs_gpus(config, profile):
        report.add(check_gpus(nodes))
    if profile.train.gpus and report.layout is not None:
        report.add(_gpu_memory(config, profile, report.layout, nodes))


def preflight(config: Config) -> PreflightReport:
    """Run all checks: on this machine, and on the nodes of the cluster that RAY_ADDRESS names, if any."""
    report = check_here(config)
    if on_cluster():
        profile = profile_of(config)
        try:
            with ray_session(profile):
                check_nodes(config, profile, report)
        except JoinError as error:
            report.findings.append(CheckResult("cluster", "failed", str(error), error.remedy))
            report.errors.append(ClusterError(str(error), error.remedy))
    return report


def _describe(config: Config) -> tuple[str, tuple[Recipe, LoraLayout]]:
    recipe, layout = describe(config)
    return f"{config.model.name}, recipe {recipe.fingerprint}", (recipe, layout)


def _store(config: Config) -> tuple[str, Store]:
    store = open_store(config)
    if store.url.startswith("memory://"):
        raise StoreError(f"store = {store.url!r} is seen by this process alone", "use a folder or s3://")
    store.check_writable()
    return f"{store.url}: writable, conditional writes work", store


def _corpus(config: Config) -> tuple[str, list[str]]:
    _check_shared("corpus.path", config.corpus.path)
    return check_corpus(config)


def _import_file(config: Config) -> tuple[str, list[str]]:
    file = str(config.augment.import_file)
    _check_shared("augment.import_file", file)
    imported = read_augmentations(file, config.storage)
    name, bad = shown(without_query(file)), imported.rejects
    count = counted(len(bad), "bad record")
    first = [f"{name}: {count}, such as {bad[0].source}: {bad[0].detail}"] if bad else []
    return f"{name}: {counted(len(imported.by_name), 'augmentation')}", first


def _check_shared(setting: str, path: str) -> None:
    if path.startswith("memory://"):
        raise InputError(f"{setting} = {path!r} is seen by this process alone", "use a file or s3://")


def _snapshot(config: Config, store: Store, base_model: str) -> str:
    if current_id(store) is None:
        return "none yet"
    snapshot = load_snapshot(store)
    check_base_model(snapshot, store, config.model.name, base_model)
    return snapshot.id


@contextlib.contextmanager
def _probe(config: Config) -> Iterator[str]:
    """Keep an object in the store within this context, for every node to read."""
    try:
        store, name = open_store(config), f"runs/.preflight-{uuid.uuid4().hex}"
        store.put(name, name.encode())
    except StoreError:  # reported before; without the object the nodes do not check the store
        yield ""
        return
    try:
        yield name
    finally:
        store.remove(name)


def _merge_passed(answers: list[CheckResult]) -> list[CheckResult]:
    """Keep each failure, and one result for each check that all nodes passed."""
    failed = [finding for finding in answers if finding.outcome == "failed"]
    wrong = {finding.check for finding in failed}
    passed = [finding for finding in answers if finding.check not in wrong]
    counts = Counter(finding.check for finding in passed)
    by_check = {finding.check: finding for finding in passed}
    return failed + [
        CheckResult(name, "ok", f"{f.detail}, on {counted(counts[name], 'node')}") for name, f in by_check.items()
    ]


def _stages(profile: Profile) -> list[tuple[str, Actors]]:
    """Return the actors of training, and those of augmenting if they take other resources, each with their stage."""
    train, augment = profile.train, profile.augment
    same = (train.cpus, train.gpus) == (augment.cpus, augment.gpus)
    return [("training", train), *([] if same else [("augmentation", augment)])]


def _needs_gpus(config: Config, profile: Profile) -> bool:
    return config.model.device == "cuda" or any(actors.gpus for _, actors in _stages(profile))


def _check_machine(config: Config, profile: Profile, layout: LoraLayout | None) -> list[CheckResult]:
    """Check that the Ray that will be started here can give actors their resources, and that torch can use its GPUs."""
    cpus = profile.logical_cpus or os.cpu_count() or 1
    cards = gpus()
    if not _needs_gpus(config, profile):
        here = NodeReport("", {"CPU": cpus})
        findings = [_check_room(stage, actors, profile, here) for stage, actors in _stages(profile)]
        if cards and config.model.device == "auto":
            detail = f"this machine has a GPU ({cards[0].name}), which the profile {profile.name} does not use"
            findings.append(CheckResult("device", "warning", detail, "use --profile gpu, or model.device=cpu"))
        return findings
    usable, error = probe_gpus()
    here = NodeReport("", {"CPU": cpus, "GPU": usable}, gpus=cards, usable_gpus=usable, gpu_error=error)
    findings = [_check_room(stage, actors, profile, here) for stage, actors in _stages(profile)]
    if config.model.device == "cuda" and not usable:
        detail = f"model.device = 'cuda', but torch can use no GPU of this machine: {error}"
        findings.append(CheckResult("device", "failed", detail, f"{_GPU_REMEDY}, or set model.device to auto or cpu"))
    if usable:
        findings += check_gpus([here])
    if usable and layout is not None and profile.train.gpus:
        findings += _gpu_memory(config, profile, layout, [here])
    return findings


def _check_room(stage: str, actors: Actors, profile: Profile, here: NodeReport) -> CheckResult:
    """Check that this machine can hold one of a stage's actors."""
    if actors.cpus > here.resources["CPU"]:
        has = f"the profile {profile.name} has {here.resources['CPU']} of this machine"
        detail = f"{stage.capitalize()} needs {counted(actors.cpus, 'CPU')}; {has}"
        return CheckResult("resources", "failed", detail, "lower run.actor_cpus")
    if actors.gpus > here.usable_gpus:
        detail = (
            f"{stage.capitalize()} needs {counted(actors.gpus, 'GPU')}; PyTorch sees {here.usable_gpus or 'none'} here"
        )
        if here.gpu_error:
            detail += f": {here.gpu_error}"
        return CheckResult("resources", "failed", detail, f"{_GPU_REMEDY}, or use --profile laptop")
    return check_resources(actors.cpus, actors.gpus, f"a {stage} actor", [here])


def _check_sockets() -> CheckResult:
    """Find the folder for the sockets and the other files of the Ray that will be started here."""
    try:
        folder, wanted = socket_folder(), wanted_folder()
    except StartError as error:
        return CheckResult("sockets", "failed", str(error), error.remedy)
    if folder == (wanted or folder):
        return CheckResult("sockets", "ok", folder)
    detail = f"Ray's files go to {folder}: the path {wanted!a} is too long, not ASCII, or cannot be written"
    return CheckResult("sockets", "warning", detail, StartError.remedy)


def _gpu_memory(config: Config, profile: Profile, layout: LoraLayout, nodes: list[NodeReport]) -> list[CheckResult]:
    """Compare the memory of the GPUs with the least that a training actor needs: the weights and one step.

    The backward pass needs each adapted module's output for each token of the step. Training keeps more than that, so
    a step that passes may still be halved (`docs/trainer.md`), but one that does not pass cannot work.
    """
    width = 4 if config.model.dtype == "float32" else 2
    weights = width * parameter_count(resolve_model(config.model.name)) + CUDA_CONTEXT_BYTES
    token_bytes = width * len(layout.layers) * sum(outputs for _, outputs in layout.shapes)
    step = token_bytes * profile.tokens_per_step
    breakdown = f"weights {weights / 1e9:.1f} GB, a step of {profile.tokens_per_step:,} tokens {step / 1e9:.1f} GB"
    smallest = min((gpu.total_bytes for node in nodes for gpu in node.gpus), default=0)
    fitting = (smallest - weights) // token_bytes // 1024 * 1024
    remedy = f"set run.tokens_per_step={fitting}" if fitting > 0 else "use a larger GPU, or a smaller base model"
    share = profile.train.gpus
    if 0 < share < 1:
        weights, step = round(weights / share), round(step / share)
        breakdown += f"; actors a GPU: {1 / share:.0f}"
    return check_gpu_memory(weights + step, breakdown, remedy, nodes)
