"""Which errors mean that memory is short, and what a process that holds a part of a GPU may take.

No GPU is needed: what CUDA raises is given by its text, and torch's functions are replaced where they need a card.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from prag_core.errors import ModelError
from prag_core.llm.memory import free_unused, is_out_of_memory, prepare_cuda

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.OutOfMemoryError("in other words"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        MemoryError(),
    ],
)
def test_memory_that_is_short_is_recognized(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        ValueError("this text speaks of being out of memory"),
        ModelError("out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_an_allocation_that_fails_on_the_cpu_is_recognized() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.int8)
    assert is_out_of_memory(raised.value)


def test_unused_memory_of_a_device_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    free_unused(torch.device("cpu"))
    assert not emptied
    free_unused(torch.device("cuda"))
    assert emptied


def test_a_part_of_a_gpu_is_a_part_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    card = SimpleNamespace(total_memory=10_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that what is set here ends with the test
        monkeypatch.delenv(name)
    prepare_cuda(1)
    prepare_cuda(2)
    assert fractions == []
    prepare_cuda(0.25)
    # Four such processes with their contexts are one card.
    assert fractions == pytest.approx([0.2])
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_the_users_settings_of_the_allocator_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ALLOCATOR:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    prepare_cuda(1)
    assert {n: os.environ[n] for n in ALLOCATOR if n in os.environ} == {name: "max_split_size_mb:128"}
