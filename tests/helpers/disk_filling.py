"""What a process does to a shared disk cache; a module of its own, so that the process imports nothing heavy."""

from __future__ import annotations

import random
from pathlib import Path

from prag_core.inference.disk_cache import DiskCache


def fill_disk(folder: str, seed: int) -> None:
    rng = random.Random(seed)
    disk = DiskCache(Path(folder), 20_000)
    for _ in range(200):
        number = rng.randrange(60)
        data = disk.get("g", str(number))
        assert data in (None, bytes([number]) * 1000)
        disk.put("g", str(number), bytes([number]) * 1000)
