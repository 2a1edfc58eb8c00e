"""The command line called in this process, which has paid for the imports already."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.cli import terminal
from pipelines.cli.app import main


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it wrote to standard output and to standard error."""

    code: int
    out: str
    err: str


def prag(folder: Path | str, *arguments: str) -> Ended:
    """Run a command in a folder. An error that the command line does not expect is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(terminal.out, "file", sys.stdout)  # it is bound when its module is imported
        patch.setattr(sys, "argv", ["prag", *arguments])
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())
