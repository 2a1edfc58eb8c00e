"""The adapters of one recipe in the store: shards, and the ledger that makes them exist.

Reading the ledger needs no torch. It is imported only where tensors are packed and unpacked.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from prag_core.errors import REPAIR, AdapterError, DamagedError, StoreError, UnreachableError
from prag_core.identity import checksum, seal
from prag_core.llm.layout import LoraLayout, check_length
from prag_core.recipe import Recipe, TrainRecipe
from prag_core.records import LedgerRow, from_dict, from_table, to_table
from prag_core.store.ledger import AdapterLocation, LedgerColumns, visible_parts
from prag_core.store.objects import Store

if TYPE_CHECKING:
    from torch import Tensor

    from prag_core.llm.lora import Factors, TrainedAdapter


class AdapterStore:
    """The adapters of one recipe. An adapter exists when a ledger part names it.

    Args:
        store: The store.
        recipe: The recipe.
        layout: The shapes of the recipe's adapters.
        dtype: How new adapters are stored: `bfloat16`, `float32` or `int8`. Existing adapters are read with the
            dtype in their ledger rows.
    """

    def __init__(self, store: Store, recipe: Recipe, layout: LoraLayout, dtype: str = "bfloat16") -> None:
        self.store = store
        self.recipe = recipe
        self.layout = layout
        self.dtype = dtype
        self.folder = f"adapters/{recipe.fingerprint}"

    def describe(self) -> None:
        """Store the recipe and the layout in full beside the adapters."""
        name = f"{self.folder}/recipe.json"
        if not self.store.exists(name):
            self.store.put_json(name, seal({"recipe": self.recipe.to_json(), "layout": asdict(self.layout)}))

    def committed(self, task: str) -> list[LedgerRow]:
        """Return the rows that a task has committed; none, unless an earlier attempt of the task was lost."""
        parts = self.store.list(f"{self.folder}/ledger/{task}", ".parquet")
        return from_table(LedgerRow, self.store.get_table(LedgerRow, parts))

    def commit(self, adapters: Sequence[tuple[TrainedAdapter, str]], task: str = "") -> list[LedgerRow]:
        """Store adapters: first their shard, then the ledger part, which makes them exist.

        Args:
            adapters: Adapters, each with the digest of its augmentation.
            task: The training task, under whose name `committed` finds the rows.

        Returns:
            The rows of the ledger part.

        Raises:
            AdapterError: if an adapter does not fit the layout, or changes nothing because its B is zero; nothing is
                stored then.
            StoreError: if the store cannot be written.
        """
        from prag_core.llm.lora import changes_nothing
        from prag_core.store.shard_codec import pack_shard

        factors = [(a.key, a.factors) for a, _ in adapters if a.factors is not None]
        for key, tensors in factors:
            if changes_nothing(tensors):
                raise AdapterError(
                    f"adapter {key}: its B is zero, so it changes nothing", "train it before it is stored"
                )
        metadata = {
            "base_model": self.recipe.base_model,
            "recipe": self.recipe.fingerprint,
            "modules": str(len(self.layout.layers) * len(self.layout.targets)),
        }
        data, packed = pack_shard(self.layout, factors, self.dtype, metadata)
        shard = f"{self.folder}/shards/{checksum(data)}.safetensors"
        created = time.time()
        rows = [
            LedgerRow(
                **asdict(place),
                recipe=self.recipe.fingerprint,
                augmentation=digest,
                shard=shard,
                dtype=self.dtype,
                steps=adapter.steps,
                tokens=adapter.tokens,
                first_loss=adapter.first_loss,
                last_loss=adapter.last_loss,
                seconds=adapter.seconds,
                created=created,
            )
            for place, (adapter, digest) in zip(packed, adapters, strict=True)
        ]
        self.store.put(shard, data)
        self.store.put_table(posixpath.join(self.folder, "ledger", task).rstrip("/"), to_table(LedgerRow, rows))
        return rows

    def ledger_parts(self) -> list[str]:
        """Return the names of the ledger parts that count now: all that no compaction has replaced."""
        return visible_parts(self.store, self.recipe.fingerprint)

    def fetch(self, row: LedgerRow | AdapterLocation) -> dict[str, Tensor]:
        """Read one adapter by one ranged read, and return its verified factors.

        Raises:
            AdapterError: if its bytes are missing, cut short or altered, do not fit the layout, or the store does
                not answer.
        """
        return self.unpack(row, self.read(row))

    def read(self, row: LedgerRow | AdapterLocation) -> bytes:
        """Return the bytes of one adapter by one ranged read, unverified.

        Raises:
            AdapterError: if the shard is missing or cut short, the row does not fit the layout, or the store does not
                answer.
        """
        # Before the bytes are in memory: a row may claim any number of them.
        check_length(self.layout, row.length, row.dtype, row.key)
        try:
            return self.store.get(row.shard, row.offset, row.offset + row.length)
        except UnreachableError as error:
            raise AdapterError(f"adapter {row.key}: {error.message}", error.remedy) from None
        except StoreError as error:
            raise AdapterError(f"adapter {row.key}: {error.message}", REPAIR) from None

    def unpack(self, row: LedgerRow | AdapterLocation, data: bytes) -> dict[str, Tensor]:
        """Return the verified factors of an adapter's bytes.

        Raises:
            AdapterError: if the bytes are altered, or do not fit the layout.
        """
        from prag_core.store.shard_codec import unpack_adapter

        return unpack_adapter(self.layout, data, row.dtype, row.key, row.checksum)


def start_fingerprint(factors: Factors) -> str:
    """Return the fingerprint of the factors that a recipe's adapters start from: the checksum of their fp32 bytes."""
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
    """Return the factors that `put_start` stored under a fingerprint.

    Raises:
        AdapterError: if they are missing or altered.
        UnreachableError: if the store does not answer.
    """
    import safetensors.torch

    remedy = "run `prag run` with its train.initial_adapter again"
    try:
        data = store.get(f"starts/{name}.safetensors")
        tensors = {key.removeprefix("start/"): tensor for key, tensor in safetensors.torch.load(data).items()}
    except (DamagedError, safetensors.SafetensorError) as error:
        raise AdapterError(f"start {name}: {error}", remedy) from None
    if start_fingerprint(tensors) != name:
        raise AdapterError(f"start {name}: was altered in the store", remedy)
    return tensors


class LedgerSource:
    """The adapters that the ledger parts of a snapshot name, by key; see `LedgerColumns`."""

    def __init__(self, adapters: AdapterStore, parts: Sequence[str]) -> None:
        self._adapters = adapters
        self._ledger = LedgerColumns(adapters.store, parts)

    @property
    def recipe(self) -> str:
        """The fingerprint of the recipe of all these adapters."""
        return self._adapters.recipe.fingerprint

    @property
    def layout(self) -> LoraLayout:
        """The layout of all these adapters."""
        return self._adapters.layout

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the verified factors of a passage's adapter.

        Raises:
            AdapterError: if the snapshot has no adapter for it, or `AdapterStore.fetch` fails.
        """
        return self._adapters.fetch(self.row(key))

    def row(self, key: str) -> AdapterLocation:
        """Return where the bytes of a passage's adapter lie.

        Raises:
            AdapterError: if the snapshot has no adapter for it.
        """
        located = self.find(key)
        if located is None:
            raise AdapterError(f"adapter {key}: the snapshot has none", "see `prag rejects` for the reason")
        return located

    def find(self, key: str) -> AdapterLocation | None:
        """Return where the bytes of a passage's adapter lie and how it was trained, or None if there is none."""
        return self._ledger.find(key)

    def read(self, row: AdapterLocation) -> bytes:
        """Return the unverified bytes of an adapter; see `AdapterStore.read`."""
        return self._adapters.read(row)

    def unpack(self, row: AdapterLocation, data: bytes) -> dict[str, Tensor]:
        """Return the verified factors of an adapter's bytes; see `AdapterStore.unpack`."""
        return self._adapters.unpack(row, data)


def find_row(store: Store, parts: Sequence[str], key: str) -> LedgerRow:
    """Return the ledger row of a passage's adapter from the ledger parts of a snapshot, reading one part at a time.

    Raises:
        AdapterError: if no part names the passage.
        StoreError: if a part cannot be read.
    """
    found: list[LedgerRow] = []
    for part in parts:
        table = store.get_table(LedgerRow, [part])
        found += from_table(LedgerRow, table.filter(pc.equal(table["key"], key)))
    if not found:
        raise AdapterError(f"adapter {key}: the snapshot has none", "see `prag rejects` for the reason")
    return max(found, key=lambda row: row.created)


def open_adapters(store: Store, fingerprint: str) -> tuple[AdapterStore, TrainRecipe]:
    """Return the adapters of the recipe with this fingerprint, and how they were trained.

    Raises:
        StoreError: if the recipe beside them is missing, altered or a different one.
    """
    name = f"adapters/{fingerprint}/recipe.json"
    document = store.get_sealed(name, "recipe", "layout")
    recipe = Recipe.from_json(document["recipe"])
    if recipe.fingerprint != fingerprint:
        raise DamagedError(f"{store.url}/{name}: holds the recipe {recipe.fingerprint}")
    layout = from_dict(LoraLayout, document["layout"])
    return AdapterStore(store, recipe, layout), recipe.train
