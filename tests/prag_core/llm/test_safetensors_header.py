"""The header of a safetensors file, as somebody may have made it to do harm."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prag_core.llm.safetensors_header import read_header

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(8)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_a_header_of_absurd_length_is_not_read(length: int) -> None:
    asked: list[tuple[int, int]] = []

    def read(begin: int, end: int) -> bytes:
        asked.append((begin, end))
        return file_of(b"{}", length)[begin:end]

    with pytest.raises(ValueError, match="no safetensors header"):
        read_header(read)
    assert asked == [(0, 8)]


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "data_offsets": [-8, 0]},
        {**GOOD, "data_offsets": [8, 0]},
        {**GOOD, "data_offsets": [0.0, 8]},
        {**GOOD, "data_offsets": [0, 8, 16]},
        {**GOOD, "data_offsets": "08"},
        {**GOOD, "shape": [-1]},
        {**GOOD, "shape": "12"},
        {**GOOD, "shape": [[2]]},
        {"dtype": "F32"},
        [],
        None,
    ],
)
def test_an_impossible_tensor_is_refused(entry: Any) -> None:
    data = file_of(json.dumps({"a": entry}).encode())
    with pytest.raises(ValueError, match="no safetensors header"):
        read_header(lambda begin, end: data[begin:end])


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b"[]", b"5", b"\xff", b"", b'{"a": 1, "a": 2}', b"{" + b'"a":{' * 100_000]
)
def test_what_is_no_object_is_refused(text: bytes) -> None:
    data = file_of(text)
    with pytest.raises(ValueError, match="no safetensors header"):
        read_header(lambda begin, end: data[begin:end])
