"""The adapters of one recipe in the store: shards, and the ledger that makes them exist.

Whoever reads the ledger alone needs no torch; it is imported where tensors are packed and unpacked.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from prag_core.errors import AdapterError, StoreError, UnreachableError
from prag_core.identity import checksum, is_intact, seal
from prag_core.llm.layout import LoraLayout
from prag_core.recipe import Recipe, TrainRecipe
from prag_core.records import LedgerRow, from_table, to_table
from prag_core.store.ledger import LedgerColumns, Located, visible_parts
from prag_core.store.objects import Store

if TYPE_CHECKING:
    from torch import Tensor

    from prag_core.llm.lora import Factors, TrainedAdapter


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
            self.store.put_json(name, seal({"recipe": self.recipe.to_json(), "layout": asdict(self.layout)}))

    def committed(self, task: str) -> list[LedgerRow]:
        """Return what was committed for a task so far; mostly nothing, unless it is tried again.

        Raises:
            StoreError: when the store cannot be read.
        """
        parts = self.store.list(f"{self.folder}/ledger/{task}", ".parquet")
        return from_table(LedgerRow, self.store.get_table(LedgerRow, parts))

    def commit(self, adapters: Sequence[tuple[TrainedAdapter, str]], task: str = "") -> list[LedgerRow]:
        """Store adapters, each with the digest of its augmentation: first their shard, then the ledger part.

        `task` names what they were trained for; under it, `committed` finds them.

        Raises:
            AdapterError: when one does not fit the layout; nothing is stored then.
        """
        from prag_core.store.shard_codec import pack_shard

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
        self.store.put_table(posixpath.join(self.folder, "ledger", task).rstrip("/"), to_table(LedgerRow, rows))
        return rows

    def ledger_parts(self) -> list[str]:
        """Return the names of the ledger parts that count now: none that a compaction has replaced."""
        return visible_parts(self.store, self.recipe.fingerprint)

    def fetch(self, row: LedgerRow | Located) -> dict[str, Tensor]:
        """Return one adapter's factors by one ranged read, verified.

        Raises:
            AdapterError: when the shard is missing, cut short, altered, or not of this layout.
        """
        return self.unpack(row, self.read(row))

    def read(self, row: LedgerRow | Located) -> bytes:
        """Return the bytes of one adapter by one ranged read, as they are.

        Raises:
            AdapterError: when the shard is missing or cut short, or the store cannot be asked.
        """
        try:
            return self.store.get(row.shard, row.offset, row.offset + row.length)
        except UnreachableError as error:
            raise AdapterError(f"adapter {row.key}: {error.message}", error.remedy) from None
        except StoreError as error:
            raise AdapterError(f"adapter {row.key}: {error.message}", "run `prag run` again to make it") from None

    def unpack(self, row: LedgerRow | Located, data: bytes) -> dict[str, Tensor]:
        """Return the factors that an adapter's bytes hold, verified.

        Raises:
            AdapterError: when they are altered, or not of this layout.
        """
        from prag_core.store.shard_codec import unpack_adapter

        return unpack_adapter(self.layout, data, row.dtype, row.key, row.checksum)


def start_fingerprint(factors: Factors) -> str:
    """Name the factors that a recipe's adapters start from: the hash of their bytes."""
    return checksum(b"".join(factors[name].float().contiguous().numpy().tobytes() for name in sorted(factors)))


def put_start(store: Store, layout: LoraLayout, factors: Factors) -> str:
    """Store the factors that a recipe's adapters start from, and return their fingerprint."""
    from prag_core.store.shard_codec import pack_shard

    name = start_fingerprint(factors)
    data, _ = pack_shard(layout, [("start", factors)], "float32", {})
    if not store.exists(f"starts/{name}.safetensors"):
        store.put(f"starts/{name}.safetensors", data)
    return name


def get_start(store: Store, name: str) -> dict[str, Tensor]:
    """Return the factors that `put_start` stored under a name.

    Raises:
        AdapterError: when they are missing or altered.
        UnreachableError: when the store cannot be asked.
    """
    import safetensors.torch

    try:
        data = store.get(f"starts/{name}.safetensors")
        tensors = {key.removeprefix("start/"): tensor for key, tensor in safetensors.torch.load(data).items()}
    except UnreachableError:
        raise
    except (StoreError, safetensors.SafetensorError) as error:
        raise AdapterError(f"start {name}: {error}", "run `prag run` with its train.initial_adapter again") from None
    if start_fingerprint(tensors) != name:
        raise AdapterError(
            f"start {name}: was altered in the store", "run `prag run` with its train.initial_adapter again"
        )
    return tensors


class LedgerSource:
    """Adapters by key, as the ledger parts of a snapshot name them; see `LedgerColumns`."""

    def __init__(self, adapters: AdapterStore, parts: Sequence[str]) -> None:
        self._adapters = adapters
        self._ledger = LedgerColumns(adapters.store, parts)

    @property
    def recipe(self) -> str:
        """The fingerprint of the recipe of all these adapters."""
        return self._adapters.recipe.fingerprint

    def __contains__(self, key: str) -> bool:
        return self._ledger.find(key) is not None

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the verified factors of a passage.

        Raises:
            AdapterError: when the snapshot has none for it, or its bytes are missing or broken.
        """
        return self._adapters.fetch(self.row(key))

    def row(self, key: str) -> Located:
        """Return what the ledger says about where a passage's adapter lies.

        Raises:
            AdapterError: when the snapshot has none for it.
        """
        located = self._ledger.find(key)
        if located is None:
            raise AdapterError(f"adapter {key}: the snapshot has none", "see `prag rejects` for the reason")
        return located

    def read(self, row: Located) -> bytes:
        """Return an adapter's bytes as they are in the store; see `AdapterStore.read`."""
        return self._adapters.read(row)

    def unpack(self, row: Located, data: bytes) -> dict[str, Tensor]:
        """Return the verified factors of an adapter's bytes; see `AdapterStore.unpack`."""
        return self._adapters.unpack(row, data)


def find_row(store: Store, parts: Sequence[str], key: str) -> LedgerRow:
    """Return the row of a passage's adapter, as the ledger parts of a snapshot name it; reads one part at a time.

    Raises:
        AdapterError: when they name none.
        StoreError: when a part cannot be read.
    """
    found: list[LedgerRow] = []
    for part in parts:
        table = store.get_table(LedgerRow, [part])
        found += from_table(LedgerRow, table.filter(pc.equal(table["key"], key)))
    if not found:
        raise AdapterError(f"adapter {key}: the snapshot has none", "see `prag rejects` for the reason")
    return max(found, key=lambda row: row.created)


def open_adapters(store: Store, fingerprint: str) -> tuple[AdapterStore, TrainRecipe]:
    """Return the adapters of a recipe by its fingerprint, and how they were trained.

    Raises:
        StoreError: when the recipe that must lie beside them is missing, altered or another one.
    """
    document = store.get_json(f"adapters/{fingerprint}/recipe.json")
    if not is_intact(document):
        raise StoreError(f"{store.url}/adapters/{fingerprint}/recipe.json: altered", "run `prag repair`")
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
