"""How many threads torch computes with in this process."""

from __future__ import annotations

import os


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads in this actor; None means all cores (Ray gives each actor one by default)."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
