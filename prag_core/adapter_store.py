"""The adapters of one recipe in the store: shards, and the ledger that makes them exist."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import safetensors.torch
from torch import Tensor

from prag_core.adapter_io import pack_shard, unpack_adapter
from prag_core.errors import AdapterError, StoreError
from prag_core.identity import checksum
from prag_core.lora import Factors, LoraLayout
from prag_core.recipe import Recipe, TrainRecipe
from prag_core.records import LedgerRow, from_table, to_table
from prag_core.store import Store
from prag_core.trainer import TrainedAdapter


class AdapterStore:
    """The adapters of one recipe: shards, and the ledger that makes them exist.

    Args:
        store: Where they lie.
        recipe: Which made them.
        layout: Their shapes.
        dtype: How new ones are stored: `bfloat16`, `float32` or `int8`. Old ones are read as their rows say.
    """

    def __init__(self, store: Store, recipe: Recipe, layout: LoraLayout, dtype: str = "bfloat16") -> None:
        self.store = store
        self.recipe = recipe
        self.layout = layout
        self.dtype = dtype
        self.folder = f"adapters/{recipe.fingerprint}"

    def describe(self) -> None:
        """Write the recipe and the layout in full beside what they make."""
        name = f"{self.folder}/recipe.json"
        if not self.store.exists(name):
            self.store.put_json(name, {"recipe": self.recipe.to_json(), "layout": asdict(self.layout)})

    def commit(self, adapters: Sequence[tuple[TrainedAdapter, str]]) -> list[LedgerRow]:
        """Store adapters, each with the digest of its augmentation: first their shard, then the ledger part.

        Raises:
            AdapterError: when one does not fit the layout; nothing is stored then.
        """
        factors = [(a.key, a.factors) for a, _ in adapters if a.factors is not None]
        metadata = {
            "base_model": self.recipe.base_model,
            "recipe": self.recipe.fingerprint,
            "modules": str(len(self.layout.layers) * len(self.layout.targets)),
        }
        data, placed = pack_shard(self.layout, factors, self.dtype, metadata)
        shard = f"{self.folder}/shards/{checksum(data)}.safetensors"
        created = time.time()
        rows = [
            LedgerRow(
                key=place.key,
                recipe=self.recipe.fingerprint,
                augmentation=digest,
                shard=shard,
                offset=place.offset,
                length=place.length,
                checksum=place.checksum,
                dtype=self.dtype,
                steps=adapter.steps,
                tokens=adapter.tokens,
                first_loss=adapter.first_loss,
                last_loss=adapter.last_loss,
                seconds=adapter.seconds,
                created=created,
            )
            for place, (adapter, digest) in zip(placed, adapters, strict=True)
        ]
        self.store.put(shard, data)
        self.store.put_table(f"{self.folder}/ledger", to_table(LedgerRow, rows))
        return rows

    def ledger_parts(self) -> list[str]:
        """Return the names of the ledger parts that there are now."""
        return self.store.list(f"{self.folder}/ledger", ".parquet")

    def fetch(self, row: LedgerRow) -> dict[str, Tensor]:
        """Return one adapter's factors by one ranged read, verified.

        Raises:
            AdapterError: when the shard is missing, cut short, altered, or not of this layout.
        """
        return self.unpack(row, self.read(row))

    def read(self, row: LedgerRow) -> bytes:
        """Return the bytes of one adapter by one ranged read, as they are.

        Raises:
            AdapterError: when the shard is missing or cut short.
        """
        try:
            return self.store.get(row.shard, row.offset, row.offset + row.length)
        except StoreError as error:
            raise AdapterError(f"adapter {row.key}: {error.message}", "run `prag run` again to make it") from None

    def unpack(self, row: LedgerRow, data: bytes) -> dict[str, Tensor]:
        """Return the factors that an adapter's bytes hold, verified.

        Raises:
            AdapterError: when they are altered, or not of this layout.
        """
        return unpack_adapter(self.layout, data, row.dtype, row.key, row.checksum)


def start_fingerprint(factors: Factors) -> str:
    """Name the factors that a recipe's adapters start from: the hash of their bytes."""
    return checksum(b"".join(factors[name].float().contiguous().numpy().tobytes() for name in sorted(factors)))


def put_start(store: Store, layout: LoraLayout, factors: Factors) -> str:
    """Store the factors that a recipe's adapters start from, and return their fingerprint."""
    name = start_fingerprint(factors)
    data, _ = pack_shard(layout, [("start", factors)], "float32", {})
    if not store.exists(f"starts/{name}.safetensors"):
        store.put(f"starts/{name}.safetensors", data)
    return name


def get_start(store: Store, name: str) -> dict[str, Tensor]:
    """Return the factors that `put_start` stored under a name.

    Raises:
        AdapterError: when they are missing or altered.
    """
    try:
        data = store.get(f"starts/{name}.safetensors")
        tensors = {key.removeprefix("start/"): tensor for key, tensor in safetensors.torch.load(data).items()}
    except (StoreError, safetensors.SafetensorError) as error:
        raise AdapterError(f"start {name}: {error}", "run `prag run` with its train.start again") from None
    if start_fingerprint(tensors) != name:
        raise AdapterError(f"start {name}: was altered in the store", "run `prag run` with its train.start again")
    return tensors


def latest_rows(table: pa.Table) -> dict[str, int]:
    """Return the position of each key's latest ledger row: a changed augmentation adds a row, it edits none."""
    keys = table.column("key").to_pylist()
    created = table.column("created").to_pylist()
    latest: dict[str, int] = {}
    for position, key in enumerate(keys):
        if key not in latest or created[position] > created[latest[key]]:
            latest[key] = position
    return latest


class LedgerSource:
    """Adapters by key, as the ledger parts of a snapshot name them."""

    def __init__(self, adapters: AdapterStore, parts: Sequence[str]) -> None:
        self._adapters = adapters
        self._table = adapters.store.get_table(LedgerRow, parts)
        self._positions = latest_rows(self._table)

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the verified factors of a passage.

        Raises:
            AdapterError: when the snapshot has none for it, or its bytes are missing or broken.
        """
        return self._adapters.fetch(self.row(key))

    def row(self, key: str) -> LedgerRow:
        """Return what the ledger says about a passage's adapter.

        Raises:
            AdapterError: when the snapshot has none for it.
        """
        if key not in self._positions:
            raise AdapterError(f"adapter {key}: the snapshot has none", "see `prag rejects` for the reason")
        return from_table(LedgerRow, self._table.slice(self._positions[key], 1))[0]

    def read(self, row: LedgerRow) -> bytes:
        """Return an adapter's bytes as they are in the store; see `AdapterStore.read`."""
        return self._adapters.read(row)

    def unpack(self, row: LedgerRow, data: bytes) -> dict[str, Tensor]:
        """Return the verified factors of an adapter's bytes; see `AdapterStore.unpack`."""
        return self._adapters.unpack(row, data)


def open_adapters(store: Store, fingerprint: str) -> tuple[AdapterStore, TrainRecipe]:
    """Return the adapters of a recipe by its fingerprint, and how they were trained.

    Raises:
        StoreError: when the recipe that must lie beside them is missing or another one.
    """
    document = store.get_json(f"adapters/{fingerprint}/recipe.json")
    recipe, shape = Recipe.from_json(document["recipe"]), document["layout"]
    if recipe.fingerprint != fingerprint:
        raise StoreError(f"{store.url}/adapters/{fingerprint}/recipe.json: says it is {recipe.fingerprint}")
    layout = LoraLayout(
        rank=shape["rank"],
        scale=shape["scale"],
        layers=tuple(shape["layers"]),
        targets=tuple(shape["targets"]),
        shapes=tuple((inputs, outputs) for inputs, outputs in shape["shapes"]),
    )
    return AdapterStore(store, recipe, layout), recipe.train
