"""Exit codes: each means one thing, and the command line and the documents list all of them."""

from __future__ import annotations

import pickle
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from prag_core import errors
from prag_core.errors import EXIT_CODES, DamagedError, OverloadedError, PragError

ROOT = Path(__file__).parents[2]


def subclasses(base: type[PragError] = PragError) -> Iterator[type[PragError]]:
    for child in base.__subclasses__():
        yield child
        yield from subclasses(child)


def test_each_exit_code_belongs_to_one_class_and_each_class_is_in_the_table() -> None:
    codes = {cls: cls.__dict__["exit_code"] for cls in (PragError, *subclasses()) if "exit_code" in cls.__dict__}
    assert len(codes) > 10
    assert [code for code, count in Counter(codes.values()).items() if count > 1] == []
    stopped = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    assert {*codes.values(), 0} | stopped == {*EXIT_CODES}
    assert {cls.__module__ for cls in subclasses()} == {
        errors.__name__
    }  # else a class could bring a code from elsewhere


@pytest.mark.parametrize("cls", sorted(subclasses(), key=lambda cls: cls.__name__))
def test_errors_pickle(cls: type[PragError]) -> None:
    error = cls("what", 2.0) if cls is OverloadedError else cls("what", "do this")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (cls, str(error))


def test_every_damage_has_the_remedy_of_an_operator() -> None:
    """Whatever the place, the way is the same: look at all damage, then repair it."""
    error = DamagedError("store/x.parquet: no such object")
    assert "`prag verify --full`" in error.remedy
    assert "`prag repair`" in error.remedy
    assert pickle.loads(pickle.dumps(error)).remedy == error.remedy
    for path in sorted((ROOT / "prag_core").rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            # No other text sends to one of the two alone.
            if path.name != "errors.py" and '"' in line and '"""' not in line:
                assert "prag repair`" not in line, f"{path}: {line}"
