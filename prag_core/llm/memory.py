"""A device's memory: which errors say that it is short, how much of it a process may take, and giving it back.

This module imports torch only inside functions: the process that watches over a child has no need of it.
"""

from __future__ import annotations

import os
import re
from typing import Any

# The memory of a CUDA process that torch's allocator does not count: its context and its kernels.
CUDA_CONTEXT_BYTES = 500_000_000
# What torch's own error does not cover: allocations by CUDA, cuBLAS and cuDNN, and those on the CPU.
_SHORT = re.compile(r"out of memory|_STATUS_\w*ALLOC\w*_FAILED|can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was short, on a device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _SHORT.search(str(error)) is not None


def free_unused(device: Any) -> None:
    """Give back the memory of a torch device that torch's allocator keeps without using it.

    Call it after the handler of an out-of-memory error: the error keeps the tensors of what failed alive.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def prepare_cuda(gpus: float) -> None:
    """Set up torch's CUDA allocator, before the first use of CUDA, in a process that holds `gpus` GPUs.

    The lengths of prompts and examples change from step to step. With segments that grow, the allocator's free memory
    is not cut into pieces that fit nothing; another setting in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF counts
    instead. A part of a GPU is a part of its memory too, so that a process cannot take its neighbours' share.
    """
    import torch

    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if 0 < gpus < 1:
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, gpus - CUDA_CONTEXT_BYTES / total))
