"""Preflight names all errors at once, with a remedy for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import fsspec
import pytest
import torch

from cluster import gpu_probe
from cluster.gpu_probe import failure_on
from cluster.preflight import (
    CheckResult,
    Gpu,
    NodeReport,
    check_cuda,
    check_gpu_memory,
    check_gpus,
    check_resources,
    compare_versions,
    gpus,
    probe_gpus,
    versions,
)
from pipelines.planning.checks import PreflightReport, check_node
from pipelines.planning.preflight import PACKAGES, _gpu_memory, check_here
from pipelines.settings import profile_of
from prag_core.config import Config
from prag_core.config_file import dump_config, parse_config
from prag_core.errors import PragError, PreflightError
from prag_core.llm import checkpoint
from prag_core.store.objects import Store
from tests.helpers.http_files import serve_folder
from tests.helpers.passages import make_passage

ROOT = Path(__file__).parents[3]
GPU = Gpu("a card", 24_000_000_000, 23_000_000_000)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    passage = make_passage(1)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "title": passage.title, "text": passage.text}))
    return parse_config(
        {
            "store": str(tmp_path / "store"),
            "corpus": {"path": str(tmp_path / "corpus.jsonl")},
            "model": {"name": str(tiny_model_folder)},
            "augment": {"generator": "none"},
        }
    )


def changed(config: Config, **settings: object) -> Config:
    document = config.model_dump(mode="json")
    for dotted, value in settings.items():
        *parents, last = dotted.split("__")
        node = document
        for parent in parents:
            node = node[parent]
        node[last] = value
    return parse_config(document)


def node(name: str = "n1", found: Mapping[str, str] | None = None, **of_it: object) -> NodeReport:
    resources = {"CPU": 8.0, "GPU": 1.0}
    return NodeReport(
        name, **{"versions": found or {}, "gpus": (GPU,), "usable_gpus": 1, "resources": resources, **of_it}
    )


def test_a_machine_on_which_all_checks_pass(config: Config, tmp_path: Path) -> None:
    found = check_here(config)
    outcomes = {finding.check: finding.outcome for finding in found.findings}
    assert outcomes == {
        "corpus": "ok",
        "model": "ok",
        "store": "ok",
        "Java": "ok",
        "snapshot": "ok",
        "cluster checks": "skipped",
        "sockets": "ok",
        "resources": "ok",
    }
    assert found.summary().splitlines() == ["preflight: 7 checks passed", "Cluster checks skipped (running locally)."]
    found.raise_errors()
    assert found.layout is not None
    assert found.layout.layers == (0, 1, 2)
    assert all(finding.duration_ms is not None for finding in found.findings if finding.check in ("model", "store"))
    left = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert left == ["store.lock"]  # no probe is left


def test_all_errors_are_named_at_once(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = changed(
        config,
        corpus__path=str(tmp_path / "none.jsonl"),
        augment__import_file=str(tmp_path / "nobody.jsonl"),
        model__name="./nowhere",
        store=str(tmp_path / "file" / "store"),
    )
    with pytest.raises(PreflightError) as raised:
        check_here(wrong).raise_errors()
    message = str(raised.value)
    assert message.startswith("4 things are wrong:")
    for part in ("none.jsonl", "nobody.jsonl", "./nowhere", "file/store", "→"):
        assert part in message


def test_what_is_left_out_of_the_corpus_is_said(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"id": "a", "text": "A"}\n')
    (folder / "b.jsonl.bak").write_text("x")
    (folder / "c.tsv").write_text('text\n"never closed\n')
    found = check_here(changed(config, corpus__path=str(folder)))
    assert [f.outcome for f in found.findings if f.check == "corpus"] == ["ok", "warning", "warning"]
    assert "b.jsonl.bak" in found.summary()
    assert "c.tsv:2 is rejected: invalid_tsv" in found.summary()
    found.raise_errors()


def test_records_without_ids_and_bad_augmentations_give_warnings(config: Config, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"docid": "a", "text": "A"}\n')
    (tmp_path / "made.jsonl").write_text('{"id": "a", "qa": 7}\n')
    files = {"corpus__path": tmp_path / "x.jsonl", "augment__import_file": tmp_path / "made.jsonl"}
    found = check_here(changed(config, **{name: str(file) for name, file in files.items()}))
    assert "x.jsonl:1 has no id in the column 'id'" in found.summary()
    assert "made.jsonl: 1 bad record, such as" in found.summary()
    found.raise_errors()


def test_an_input_that_only_this_process_has_is_refused(config: Config) -> None:
    url = f"memory://{uuid.uuid4()}.jsonl"
    fsspec.filesystem("memory").pipe(url, b'{"id": "a", "text": "A", "qa": []}\n')
    found = check_here(changed(config, corpus__path=url, augment__import_file=url))
    assert [f.check for f in found.findings if "by this process alone" in f.detail] == ["corpus", "augmentations"]


def test_the_model_that_completes_imports_must_be_on_each_node(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made.jsonl"
    made.write_text('{"id": "1", "qa": [{"question": "Who?", "answer": "Ada", "full_answer": "Ada."}]}\n')
    completed = changed(config, augment__import_file=str(made), augment__generator="transformers")
    assert [f.detail for f in check_node(completed, "") if f.outcome == "failed"] == []
    # As where the project was installed without the small model's package.
    monkeypatch.setitem(checkpoint.PACKAGED, "smollm2-135m-instruct", ("no_such_package", "model.gguf"))
    monkeypatch.setenv("PRAG_CACHE", str(tmp_path / "cache"))
    (failed,) = [f for f in check_node(completed, "") if f.outcome == "failed"]
    assert failed.check == "model"
    assert "the package no_such_package is not installed" in failed.detail
    assert "augment.complete_imports = false" in failed.remedy
    for does_without in (config, changed(completed, augment__complete_imports=False)):
        assert [f.detail for f in check_node(does_without, "") if f.outcome == "failed"] == []


def test_the_first_record_of_each_kind_of_file_is_read(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "A"}\n')
    (folder / "b.jsonl.gz").write_text("not gzipped")
    checked = changed(config, corpus__path=str(folder))
    for failed in (check_here(checked).findings, check_node(checked, "")):
        (detail,) = [f.detail for f in failed if f.outcome == "failed"]
        assert "b.jsonl.gz: cannot be read" in detail
    with serve_folder(tmp_path) as url:
        served = changed(config, corpus__path=f"{url}/corpus.jsonl", augment__import_file=f"{url}/none.jsonl")
        outcomes = {f.check: f.outcome for f in check_here(served).findings}
        assert (outcomes["corpus"], outcomes["augmentations"]) == ("ok", "failed")
        assert [f.detail for f in check_node(served, "") if f.outcome == "failed"] == [
            f"{url}/none.jsonl: no such file"
        ]


def test_a_single_error_is_raised_as_it_is(config: Config, tmp_path: Path) -> None:
    with pytest.raises(PragError, match=r"none\.jsonl") as raised:
        check_here(changed(config, corpus__path=str(tmp_path / "none.jsonl"))).raise_errors()
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("url", "reason"),
    [("dir::memory://preflight", "no conditional write"), ("memory://preflight", "this process alone")],
)
def test_a_store_that_several_processes_cannot_share_is_refused(config: Config, url: str, reason: str) -> None:
    found = check_here(changed(config, store=url))
    (failed,) = [finding for finding in found.findings if finding.outcome == "failed"]
    assert failed.check == "store"
    assert reason in failed.detail


@pytest.mark.slow
def test_the_conditional_writes_of_a_real_s3_server_are_tried(config: Config, s3_server) -> None:
    url = f"s3://{s3_server.bucket}/preflight"
    found = check_here(changed(config, store=url))
    assert [f.outcome for f in found.findings if f.check == "store"] == ["ok"]
    assert Store(url).list("", "") == []
    missing = check_here(changed(config, store="s3://no-such-bucket/x"))
    assert [f.outcome for f in missing.findings if f.check == "store"] == ["failed"]


def test_versions_must_agree() -> None:
    here = versions(PACKAGES)
    assert here["python"].startswith("3.11")
    assert here["torch"] == "2.13.0" or here["torch"].startswith("2.13.0+")
    other = {**here, "torch": "2.13.0+cu130", "ray": "2.59.0", "peft": "missing"}
    findings = compare_versions(here, [node("a", here), node("b", other)])
    assert [(f.outcome, f.where) for f in findings] == [("failed", "b")]
    assert "ray 2.59.0, here 2.60.0" in findings[0].detail
    assert "peft missing" in findings[0].detail
    assert "torch" not in findings[0].detail  # one release, built for another machine
    assert [f.outcome for f in compare_versions(here, [node("a", here)])] == ["ok"]


def test_missing_and_useless_gpus_are_found() -> None:
    def outcomes(**of_node: object) -> list[str]:
        return [f"{f.outcome} {f.detail}" for f in check_gpus([node(**of_node)])]

    assert outcomes() == ["ok torch computes on each GPU of 1 nodes"]
    assert outcomes(gpus=()) == ["failed Ray counts 1 GPUs, the driver shows none"]
    old = "The NVIDIA driver on your system is too old (found version 12020)."
    assert outcomes(usable_gpus=0, gpu_error=old) == [f"failed Ray counts 1 GPUs, torch can compute on 0: {old}"]
    two = {"resources": {"CPU": 8.0, "GPU": 2.0}, "gpus": (GPU, GPU)}
    (one_fails,) = outcomes(gpu_error="cuda:1: no kernel image is available", **two)
    assert one_fails.startswith("failed Ray counts 2 GPUs, torch can compute on 1: cuda:1: no kernel image")
    assert outcomes(**two) == ["warning Ray counts 2 GPUs, torch sees 1"]
    assert outcomes(resources={"CPU": 4.0}) == ["skipped no node with a GPU is running"]


def test_small_gpus_are_found() -> None:
    def outcomes(*nodes: NodeReport, needed: int = 20_000_000_000) -> list[str]:
        return [f"{f.outcome} {f.detail}" for f in check_gpu_memory(needed, "weights", "less", nodes)]

    assert outcomes(node())[0].startswith("ok")
    assert outcomes(node(), needed=30_000_000_000)[0].startswith("failed 24.0 GB, at least 30.0 GB needed")
    assert outcomes(node(resources={"CPU": 4.0})) == []


def test_a_product_is_computed_on_a_device() -> None:
    assert failure_on("cpu") == ""
    assert failure_on("meta") != ""  # what it computes cannot be read
    assert failure_on("cuda:99") != ""


def test_a_device_whose_memory_others_fill_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch, "ones", full)
    assert failure_on("cuda:0") == ""


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_gpus_are_tried_in_another_process_that_says_why_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable, error = probe_gpus()
    assert usable == 0
    assert error
    assert "product has not ended in 0 s" in probe_gpus(timeout_s=0.01)[1]
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('a damaged torch')\n")
    monkeypatch.setattr(gpu_probe, "__file__", str(broken))
    assert probe_gpus()[1].endswith("ended with exit code 1: ImportError: a damaged torch")


def test_a_step_that_does_not_fit_names_a_size_that_does(config: Config) -> None:
    on_gpus = changed(config, run__profile="gpu", run__tokens_per_step=10_000_000)
    layout = check_here(config).layout
    assert layout is not None
    # Three layers with the outputs of gate, up and down: 48 + 48 + 32 numbers of two bytes for each token.
    (finding,) = _gpu_memory(on_gpus, profile_of(on_gpus), layout, [node(gpus=(Gpu("small", 2_000_000_000, 0),))])
    assert finding.outcome == "failed"
    assert "10,000,000 tokens 7.7 GB" in finding.detail
    fitting = int(finding.remedy.partition("run.tokens_per_step=")[2])
    fits = changed(on_gpus, run__tokens_per_step=fitting)
    (finding,) = _gpu_memory(fits, profile_of(fits), layout, [node(gpus=(Gpu("small", 2_000_000_000, 0),))])
    assert finding.outcome == "ok"


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize("profile", ["laptop", "gpu"])
def test_a_device_that_this_machine_lacks_is_found_before_the_run(config: Config, profile: str) -> None:
    found = check_here(changed(config, model__device="cuda", run__profile=profile))
    failed = {finding.check: finding for finding in found.findings if finding.outcome == "failed"}
    assert "torch can use no GPU of this machine: " in failed["device"].detail
    assert "model.device to auto" in failed["device"].remedy


def test_a_device_that_a_node_lacks_is_found_before_the_run() -> None:
    bare, lost = (
        node("b", gpus=(), usable_gpus=0),
        node("c", findings=(CheckResult("node", "warning", "lost"),), gpus=()),
    )
    assert [(f.outcome, f.where) for f in check_cuda([node("a"), bare, lost])] == [("failed", "b")]
    assert [(f.outcome, f.where) for f in check_cuda([node("a", usable_gpus=0)])] == [("failed", "a")]
    assert [f.outcome for f in check_cuda([node("a")])] == ["ok"]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("folder", ["x" * 80, "ü", "file/x"])
def test_a_folder_in_which_ray_cannot_start_is_said_and_another_used(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(name, str(tmp_path / folder))
    found = {finding.check: finding for finding in check_here(config).findings}
    assert (found["sockets"].outcome, "Ray's files go to /tmp: the path" in found["sockets"].detail) == (
        "warning",
        True,
    )
    monkeypatch.setattr("cluster.session._SHORT_FOLDERS", ())
    with pytest.raises(PragError, match=r"sockets: no folder can hold Ray's sockets: .*\n.*set RAY_TMPDIR"):
        check_here(config).raise_errors()


def test_an_actor_that_fits_no_node_gives_a_warning() -> None:
    assert check_resources(8, 1, "an actor", [node()]).outcome == "ok"
    assert check_resources(9, 1, "an actor", [node()]).outcome == "warning"
    assert check_resources(1, 2, "an actor", [node()]).outcome == "warning"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"run__profile": "gpu", "run__actor_gpus": 64}, "Training needs 64 GPUs; PyTorch sees "),
        ({"run__profile": "gpu", "run__actor_cpus": 1}, "Training needs 1 GPU; PyTorch sees none here"),
        ({"run__actor_cpus": 3}, "Training needs 3 CPUs; the profile laptop has 2 of this machine"),
    ],
)
def test_a_machine_that_can_never_hold_an_actor_is_refused(config: Config, settings: dict, said: str) -> None:
    found = check_here(changed(config, **settings))
    (failed,) = [finding for finding in found.findings if finding.outcome == "failed"]
    assert failed.check == "resources"
    assert said in failed.detail


def test_a_gpu_that_the_profile_does_not_use_is_said(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'a card, 81559, 81008'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (said,) = [f for f in check_here(config).findings if f.check == "device"]
    assert (said.outcome, said.remedy) == ("warning", "use --profile gpu, or model.device=cpu")
    assert not [f for f in check_here(changed(config, model__device="cpu")).findings if f.check == "device"]


def test_torch_is_not_loaded_if_no_gpu_is_wanted(config: Config, tmp_path: Path) -> None:
    assert check_here(config).errors == []  # what is known of the model is in the cache from here on
    (tmp_path / "config.yaml").write_text(dump_config(config))
    code = (
        "import sys; from pathlib import Path; from pipelines.planning.preflight import check_here\n"
        "from prag_core.config_file import load_config\n"
        "found = check_here(load_config(Path('config.yaml')))\n"
        "print(found.errors, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == "[] []\n"


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81008'\n")
    program.chmod(0o755)
    assert gpus() == (Gpu("NVIDIA H100 80GB HBM3", 81559 * 1024**2, 81008 * 1024**2),)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == ()


def test_a_finding_of_a_node_becomes_an_error_that_names_it() -> None:
    found = PreflightReport()
    found.add([CheckResult("store", "failed", "another one", "mount it", "10.0.0.3")])
    with pytest.raises(PragError, match=r"store on 10\.0\.0\.3: another one"):
        found.raise_errors()
