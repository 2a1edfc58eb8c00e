"""Preflight: in seconds, everything that would otherwise fail after an hour, and what to do about each."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from cluster.preflight import (
    CheckResult,
    NodeReport,
    check_gpu_memory,
    check_room,
    compare_versions,
    gpus,
    look_at_nodes,
    on_cluster,
    torch_cuda,
    versions,
)
from cluster.resources import Profile
from cluster.session import JoinError, ray_session
from pipelines.planning.checks import PreflightReport, ask_node
from pipelines.settings import describe, profile_of
from prag_core.augmentation.formats import read_augmentations
from prag_core.config import Config
from prag_core.data.files import list_files
from prag_core.errors import ClusterError, StoreError
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.model_facts import parameter_count
from prag_core.recipe import Recipe
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import Store, open_store
from prag_core.store.snapshot import check_base_model, current_id, load_snapshot

T = TypeVar("T")

# What must not differ between the driver and its workers.
PACKAGES = ("prag-ray", "ray", "torch", "transformers", "peft", "pyarrow")
# Of the fixed needs of a CUDA process and of PyTorch's kernels.
_CUDA_CONTEXT_BYTES = 500_000_000


def check_here(config: Config) -> PreflightReport:
    """Check what this machine can see by itself: corpus, augmentations, model, recipe, store, Java. No Ray.

    Where Ray will be started on it, also whether it can hold an actor, and whether its GPUs can.
    """
    found = PreflightReport()
    found.check("corpus", lambda: (f"{len(list_files(config.corpus))} files", None))
    if config.augment.import_file:
        found.check("augmentations", lambda: (_import_file(config), None))
    described = found.check("model", lambda: _describe(config))
    store = found.check("store", lambda: _store(config))
    kind = index_kind(config.index)
    found.check(kind.REQUIREMENT, lambda: (kind.find_requirement(), None))
    if described is not None:
        found.recipe, found.layout = described
        if store is not None:
            base_model = described[0].base_model
            found.check("snapshot", lambda: (_snapshot(config, store, base_model), None))
    if not on_cluster():
        found.note(
            [CheckResult("nodes", "skipped", "Ray is started on this machine: versions, model and store are its own")]
        )
        if found.layout is not None:
            found.note(_this_machine(config, profile_of(config), found.layout))
    return found


def check_nodes(config: Config, found: PreflightReport) -> None:
    """Check each node of the connected cluster, and add what is found: see `docs/operations.md`."""
    profile = profile_of(config)
    here = versions(PACKAGES)
    with _probe(config) as probe:
        nodes = look_at_nodes(PACKAGES, partial(ask_node, config, probe))
    nodes = [node for node in nodes if node.versions or node.findings]
    workers = [node for node in nodes if node.resources.get("CPU", 0)]
    found.note([finding for node in nodes for finding in node.findings])
    found.note(compare_versions(here, nodes))
    if not workers:
        found.note(
            [CheckResult("nodes", "warning", "no node that works is up yet: model, Java and GPUs are not checked")]
        )
        return
    # A head that works on nothing needs the store alone.
    answers = [
        replace(finding, where=node.name)
        for node in nodes
        for finding in node.answer or ()
        if node in workers or finding.check == "store"
    ]
    # What is wrong here is wrong there as well: it is one thing to mend.
    known = {finding.detail for finding in found.findings if finding.outcome == "failed"}
    found.note(_agreed([answer for answer in answers if answer.detail not in known]))
    found.note([check_room(profile.train.cpus, profile.train.gpus, "a training actor", workers)])
    if profile.train.gpus and found.layout is not None:
        found.note(_gpu_memory(config, profile, found.layout, nodes))


def preflight(config: Config) -> PreflightReport:
    """Look at everything: here, and on the nodes of the cluster that RAY_ADDRESS names, if any."""
    found = check_here(config)
    if on_cluster():
        try:
            with ray_session(profile_of(config)):
                check_nodes(config, found)
        except JoinError as error:
            found.findings.append(CheckResult("cluster", "failed", str(error), error.remedy))
            found.errors.append(ClusterError(str(error), error.remedy))
    return found


def _describe(config: Config) -> tuple[str, tuple[Recipe, LoraLayout]]:
    recipe, layout = describe(config)
    return f"{config.model.name}, recipe {recipe.fingerprint}", (recipe, layout)


def _store(config: Config) -> tuple[str, Store]:
    store = open_store(config)
    if store.url.startswith("memory://"):
        raise StoreError(f"store = {store.url!r} is seen by this process alone", "use a folder or s3://")
    store.check_writable()
    return f"{store.url}: writable, conditional writes work", store


def _import_file(config: Config) -> str:
    imported = read_augmentations(str(config.augment.import_file))
    return f"{config.augment.import_file}: {len(imported.rejects)} bad lines"


def _snapshot(config: Config, store: Store, base_model: str) -> str:
    if current_id(store) is None:
        return "none yet"
    snapshot = load_snapshot(store)
    check_base_model(snapshot, store, config.model.name, base_model)
    return snapshot.id


@contextlib.contextmanager
def _probe(config: Config) -> Iterator[str]:
    """Within this context the store holds an object that every node must be able to read."""
    try:
        store, name = open_store(config), f"runs/.preflight-{uuid.uuid4().hex}"
        store.put(name, name.encode())
    except StoreError:  # found before: there is nothing that the nodes could look for
        yield ""
        return
    try:
        yield name
    finally:
        store.remove(name)


def _agreed(answers: list[CheckResult]) -> list[CheckResult]:
    """Keep each failure, and one line for each check that all nodes passed."""
    failed = [finding for finding in answers if finding.outcome == "failed"]
    wrong = {finding.check for finding in failed}
    passed = [finding for finding in answers if finding.check not in wrong]
    counts = Counter(finding.check for finding in passed)
    one_each = {finding.check: finding for finding in passed}.values()
    return failed + [replace(f, detail=f"{f.detail}, on {counts[f.check]} nodes", where="") for f in one_each]


def _this_machine(config: Config, profile: Profile, layout: LoraLayout) -> list[CheckResult]:
    """Find out whether the Ray that will be started here can ever give an actor what it takes."""
    actors, cpus = profile.train, profile.logical_cpus or os.cpu_count() or 1
    if actors.cpus > cpus:
        detail = f"a training actor takes {actors.cpus:g} CPUs; of this machine the profile {profile.name} has {cpus}"
        return [CheckResult("resources", "failed", detail, "lower run.actor_cpus")]
    if not actors.gpus:
        return [check_room(actors.cpus, 0, "a training actor", [NodeReport("", {}, (), "", {"CPU": cpus})])]
    import torch  # only who wants a GPU waits for it

    count = torch.cuda.device_count()
    if actors.gpus > count:
        detail = f"a training actor takes {actors.gpus:g} GPUs; of this machine torch can use {count}"
        remedy = "see that nvidia-smi shows the GPU and torch is built for CUDA, or take --profile laptop"
        return [CheckResult("resources", "failed", detail, remedy)]
    here = NodeReport("", {}, gpus(), torch_cuda(), {"CPU": cpus, "GPU": count})
    room = check_room(actors.cpus, actors.gpus, "a training actor", [here])
    return [room, *_gpu_memory(config, profile, layout, [here])]


def _gpu_memory(config: Config, profile: Profile, layout: LoraLayout, nodes: list[NodeReport]) -> list[CheckResult]:
    """Compare the GPUs with what a training actor needs at least: weights, and what a step cannot let go of.

    The backward pass needs each adapted module's output for each token of the step. More is kept than that, so a
    budget that passes may still be halved (`docs/trainer.md`); one that does not pass cannot work.
    """
    width = 4 if config.model.dtype == "float32" else 2
    weights = width * parameter_count(resolve_model(config.model.name)) + _CUDA_CONTEXT_BYTES
    a_token = width * len(layout.layers) * sum(outputs for _, outputs in layout.shapes)
    step = a_token * profile.tokens_per_step
    of_it = f"weights {weights / 1e9:.1f} GB, a step of {profile.tokens_per_step:,} tokens {step / 1e9:.1f} GB"
    smallest = min((gpu.total_bytes for node in nodes for gpu in node.gpus), default=0)
    fitting = (smallest - weights) // a_token // 1024 * 1024
    remedy = f"set run.tokens_per_step={fitting}" if fitting > 0 else "take a larger GPU, or a smaller base model"
    share = profile.train.gpus
    if 0 < share < 1:
        weights, step = round(weights / share), round(step / share)
        of_it += f"; {1 / share:.0f} actors a GPU"
    return check_gpu_memory(weights + step, of_it, remedy, nodes)
