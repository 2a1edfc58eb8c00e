"""The store: Parquet parts that are whole and unaltered, and URLs without secrets."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prag_core.errors import StoreError
from prag_core.records import Passage, to_table
from prag_core.store.objects import Store
from tests.helpers.passages import make_passage


def test_the_same_table_is_one_part(store: Store) -> None:
    table = to_table(Passage, [make_passage(n) for n in range(5)])
    assert store.put_table("corpus/v", table) == store.put_table("corpus/v", table)
    assert store.get_table(Passage, store.list("corpus", ".parquet")).equals(table)
    store.put("corpus/v/part-x.parquet", b"PAR1 but not really")
    with pytest.raises(StoreError, match=r"part-x\.parquet: not a readable Parquet part"):
        store.get_table(Passage, store.list("corpus", ".parquet"))


@pytest.mark.parametrize("whole_part_bytes", [1 << 20, 0])
def test_altered_columns_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_part_bytes: int) -> None:
    """Read whole, the name is the checksum; by ranges, as a big part is, each page has one of its own."""
    monkeypatch.setattr("prag_core.store.objects.WHOLE_PART_BYTES", whole_part_bytes)
    store, dice = Store(str(tmp_path / "store")), random.Random(4)
    table = pa.table({"key": [f"{dice.getrandbits(128):032x}" for _ in range(500)], "value": list(range(500))})
    part = store.put_table("parts", table)
    data = store.get(part)
    chunk = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    # A page's own header, some tens of bytes before it, is not under its checksum.
    for place in dice.sample(range(chunk.dictionary_page_offset + 100, chunk.data_page_offset), 100):
        store.put(part, data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"altered or cut short|not a readable Parquet part"):
            store.get_columns(part, ["key"])
    store.put(part, data)
    assert store.get_columns(part, ["key"]).equals(table.select(["key"]))


def test_a_part_is_read_without_a_dataset(tmp_path: Path) -> None:
    """Its threads may still hold the part's bytes when the process ends, and then they abort it, now and then."""
    store = Store(str(tmp_path))
    part = store.put_table("t", pa.table({"key": ["a"], "text": ["b"]}))
    code = f"""
import sys
from prag_core.store.objects import Store
store = Store({store.url!r})
assert store.get_part({part!r}).num_rows == store.get_columns({part!r}, ["key"]).num_rows == 1
print("pyarrow.dataset" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://key:sec/ret@bucket", "http://me:secret@host/x"])
def test_a_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(StoreError, match="holds credentials") as caught:
        Store(url)
    assert "sec" not in str(caught.value).replace("section", "")
