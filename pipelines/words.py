"""How counts and times are written for people; `rich.filesize.decimal` writes bytes."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, as in `1 passage` or `1,234 passages`; `plural` is for one that takes no `s`."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """Return a time with two or three digits in the unit that people would use: `0.04 s`, `3.6 s`, `4 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
