"""Compute a product on each GPU that torch sees, and print what came of it as JSON.

`cluster.preflight` runs this file in a process of its own: a process that has used a GPU keeps some of its memory.
"""

from __future__ import annotations

import json


def failure_on(device: str) -> str:
    """Return why torch cannot compute on a device; empty when it can, or when other processes fill its memory."""
    import torch

    try:
        ones = torch.ones(64, 64, device=device)
        total = (ones @ ones).sum().item()
    except (RuntimeError, AssertionError) as error:
        # A card that another job uses at present is a card that works.
        return "" if "out of memory" in str(error) else _first_line(error)
    return "" if total == 64**3 else f"a product is wrong: {total:g} instead of {64**3}"


def probe() -> tuple[int, str]:
    """Return how many GPUs torch can compute on, and why it cannot on another one or on any."""
    try:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        failures = {f"cuda:{n}": failure_on(f"cuda:{n}") for n in range(torch.cuda.device_count())}
    except (ImportError, RuntimeError, AssertionError) as error:
        return 0, _first_line(error)
    failed = {device: failure for device, failure in failures.items() if failure}
    return len(failures) - len(failed), "; ".join(f"{device}: {failure}" for device, failure in failed.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    print(json.dumps(probe()))
