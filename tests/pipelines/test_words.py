"""Counts and times as people write them."""

from __future__ import annotations

from pipelines.words import counted, duration


def test_one_has_no_plural() -> None:
    assert [counted(n, "passage") for n in (0, 1, 2, 1234)] == [
        "0 passages",
        "1 passage",
        "2 passages",
        "1,234 passages",
    ]
    assert [counted(n, "loss", "losses") for n in (1, 2)] == ["1 loss", "2 losses"]


def test_times_have_the_unit_that_fits() -> None:
    shown = {0.0: "0.00 s", 0.042: "0.04 s", 3.64: "3.6 s", 42.4: "42 s", 250: "4 min", 9000: "2.5 h"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
