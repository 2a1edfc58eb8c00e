"""Which thread of a process computes, and on how many cores.

torch computes with OpenMP (libgomp). Each thread that calls torch gets a team of OpenMP threads of its own. While all
teams of a process together have no more threads than there are cores, a team's threads spin between two products, and
a product starts at once. With one thread more they sleep, and each product waits some 100 µs for them to wake; a
decoding step has about 200 products. So one thread of a process computes with all of its cores, and every other
thread with one. Processes that share a machine's cores get a part of the cores each.
"""

from __future__ import annotations

import os
import threading

from prag_core.errors import ConfigError


def available_cores() -> int:
    """Return how many cores this process may use: PRAG_CORES if it is set, else all that the system grants.

    Set it where the machine also works for others: threads that spin would wait for their cores.

    Raises:
        ConfigError: when PRAG_CORES is no positive whole number.
    """
    if chosen := os.environ.get("PRAG_CORES"):
        if chosen.isdecimal() and int(chosen) > 0:
            return int(chosen)
        raise ConfigError(f"PRAG_CORES = {chosen!r}: not a positive whole number", "name a number of cores")
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_here(cores: int | None = None) -> None:
    """Let the calling thread compute on `cores` cores (None: all), and each thread that starts later on one.

    Call it before the thread's first product, and in one thread of a process: two teams slow each other down.
    """
    import torch

    cores = available_cores() if cores is None else cores
    torch.set_num_threads(cores)
    # A thread takes the process's number at its first use of torch, which for this thread is here, and keeps it.
    torch.get_num_threads()
    if cores > 1:
        # Setting it has set the process's number too, which later threads take. Another thread takes that back.
        other = threading.Thread(target=torch.set_num_threads, args=(1,), name="one-core")
        other.start()
        other.join()


def compute_elsewhere() -> None:
    """Let the calling thread, and each thread that starts later, compute on one core.

    A process calls it first of all, when a thread that it starts later is the one to compute (`compute_here`).
    """
    import torch

    torch.set_num_threads(1)
