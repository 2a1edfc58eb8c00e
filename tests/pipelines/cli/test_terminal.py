"""What command-line options may look like."""

from __future__ import annotations

import pytest

from pipelines.cli.options import parse_age


def test_ages() -> None:
    assert [parse_age(text) for text in ("30s", "90m", "24h", "1.5d")] == [30, 5400, 86_400, 129_600]
    for text in ("", "24", "h", "1w", "-3h"):
        with pytest.raises(ValueError, match="is not an age"):
            parse_age(text)
