"""Corpus files in each format, and how the library reads them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.config import CorpusConfig, StorageConfig
from prag_core.data.corpus import Piece, read_records
from prag_core.data.listing import list_files
from prag_core.records import Reject

ROWS = [
    {"id": "a", "title": "Otters", "text": "Otters hold hands.\nThey sleep afloat."},
    {"id": "b", "title": 'The "Sea" Otter', "text": 'It is called "the old man of the sea".\tIt uses tools.'},
    {"id": "c", "title": "カワウソ", "text": "カワウソは川に住む。魚を食べる。"},
]


def config_of(path: Path | str, **settings: Any) -> CorpusConfig:
    return CorpusConfig(path=str(path), **settings)


def read(path: Path | str, storage: StorageConfig | None = None, **settings: Any) -> tuple[list[Piece], list[Reject]]:
    config = config_of(path, **settings)
    out = [item for file in list_files(config, storage).files for item in read_records(file, config, storage)]
    return [p for p in out if isinstance(p, Piece)], [r for r in out if isinstance(r, Reject)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS, columns: tuple[str, ...] = ("id", "text", "title")) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    if ".parquet" in path.name:
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".tsv" in path.name:
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([row[c] for c in columns] for row in rows)
    else:
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def jsonl(path: Path, *lines: bytes | str) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path
