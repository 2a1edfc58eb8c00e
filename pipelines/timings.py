"""What batches took, as the store says; light to import, since Ray's tasks are in it."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.resources import Profile
from pipelines.estimate import Moments
from prag_core.records import from_dict
from prag_core.store import Store


def batches_of(store: Store, folder: str, units: str | None, profile: Profile) -> Moments:
    """Return what stored batches took: of each part the seconds, and its units (None: its rows)."""
    parts = [{"part": part} for part in store.list(folder, ".parquet")]
    if not parts:
        return Moments()
    rows = ray.data.from_items(parts, override_num_blocks=min(profile.partitions, len(parts))).map_batches(
        _moments, batch_size=None, batch_format="pyarrow", fn_kwargs={"store": store, "units": units}
    )
    return sum((from_dict(Moments, row) for row in rows.take_all()), Moments())


def _moments(table: pa.Table, store: Store, units: str | None) -> pa.Table:
    def batch(part: str) -> tuple[float, float]:
        columns = store.get_columns(part, [*([units] if units else []), "seconds"])
        return float(pc.sum(columns[units]).as_py() or 0) if units else columns.num_rows, float(
            pc.sum(columns["seconds"]).as_py() or 0
        )

    return pa.Table.from_pylist([asdict(Moments.of(batch(part) for part in table["part"].to_pylist()))])
