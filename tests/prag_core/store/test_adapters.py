"""Adapters in a store come back bit by bit, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from prag_core.config import AugmentConfig, TrainConfig, augment_recipe, train_recipe
from prag_core.errors import AdapterError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import adapter_size_bytes
from prag_core.llm.lora import Injector, TrainedAdapter, find_targets
from prag_core.llm.peft import export_peft, peft_base
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, to_table
from prag_core.store.adapters import (
    AdapterStore,
    LedgerSource,
    find_row,
    get_start,
    open_adapters,
    put_start,
    start_fingerprint,
)
from prag_core.store.objects import Store
from tests.helpers.adapters import random_adapter, stack_rows

TRAIN = train_recipe(TrainConfig())
RECIPE = Recipe("base", augment_recipe(AugmentConfig(), "generator", TRAIN), TRAIN)
KEY = "0c" * 16


@pytest.fixture
def adapters(store: Store, tiny_session: BaseModel) -> AdapterStore:
    layout, _ = find_targets(tiny_session.model, RECIPE.train)
    made = AdapterStore(store, RECIPE, layout, "float32")
    made.describe()
    return made


def trained(adapters: AdapterStore, key: str, seed: int) -> TrainedAdapter:
    return TrainedAdapter(key, random_adapter(adapters.layout, seed), 20, 500, 3.0, 0.5, 1.5)


def test_adapters_come_back_bit_by_bit(adapters: AdapterStore) -> None:
    made = [trained(adapters, f"{n:032x}", n) for n in range(4)]
    rows = adapters.commit([(adapter, f"digest{n}") for n, adapter in enumerate(made)])
    reopened, train = open_adapters(adapters.store, RECIPE.fingerprint)
    assert train == RECIPE.train
    assert reopened.layout == adapters.layout
    source = LedgerSource(reopened, adapters.ledger_parts())
    for row, adapter in zip(rows, made, strict=True):
        got = source.get(row.key)
        assert all(torch.equal(got[name], adapter.factors[name]) for name in got)
    assert len({row.shard for row in rows}) == 1
    with pytest.raises(AdapterError, match="the snapshot has none"):
        source.get("unknown")
    assert find_row(adapters.store, adapters.ledger_parts(), rows[1].key) == rows[1]
    with pytest.raises(AdapterError, match="the snapshot has none"):
        find_row(adapters.store, adapters.ledger_parts(), "f" * 32)


def test_each_row_is_read_as_it_was_stored(adapters: AdapterStore) -> None:
    made = trained(adapters, KEY, 1)
    assert made.factors is not None
    for dtype in ("int8", "bfloat16", "float32"):
        (row,) = AdapterStore(adapters.store, RECIPE, adapters.layout, dtype).commit([(made, "d")])
        got = adapters.fetch(row)
        assert row.dtype == dtype
        assert row.length == adapter_size_bytes(adapters.layout, dtype)
        assert all(torch.allclose(got[name].float(), made.factors[name], rtol=0.01, atol=0.02) for name in got)


def test_a_later_row_replaces_an_earlier_one(adapters: AdapterStore) -> None:
    adapters.commit([(trained(adapters, KEY, 1), "old")])
    adapters.commit([(trained(adapters, KEY, 2), "new")])
    got = LedgerSource(adapters, adapters.ledger_parts()).get(KEY)
    assert torch.equal(got["up_proj.A"], random_adapter(adapters.layout, 2)["up_proj.A"])


def test_a_shard_without_a_ledger_part_does_not_exist(adapters: AdapterStore) -> None:
    adapters.commit([(trained(adapters, KEY, 1), "d")])
    for part in adapters.ledger_parts():
        adapters.store.remove(part)
    assert KEY not in LedgerSource(adapters, adapters.ledger_parts())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_bytes_are_never_an_adapter(adapters: AdapterStore, damage: str) -> None:
    (row,) = adapters.commit([(trained(adapters, KEY, 1), "d")])
    data = bytearray(adapters.store.get(row.shard))
    if damage == "flip":
        data[row.offset + row.length // 2] ^= 1
    adapters.store.put(row.shard, bytes(data[: row.offset + row.length - 1] if damage == "cut" else data))
    if damage == "remove":
        adapters.store.remove(row.shard)
    with pytest.raises(AdapterError, match=f"adapter {KEY}"):
        LedgerSource(adapters, adapters.ledger_parts()).get(KEY)


def test_a_row_that_claims_too_many_bytes_is_refused_before_they_are_read(adapters: AdapterStore) -> None:
    (row,) = adapters.commit([(trained(adapters, KEY, 1), "d")])
    for wrong in (replace(row, length=2**62), replace(row, length=row.length - 1), replace(row, dtype="float64")):
        part = adapters.store.put_table(f"{adapters.folder}/ledger", to_table(LedgerRow, [wrong]))
        with pytest.raises(AdapterError, match=r"the layout wants|cannot be stored as 'float64'"):
            LedgerSource(adapters, [part]).get(KEY)


def test_an_exported_adapter_is_the_same_to_peft(adapters: AdapterStore, tiny: BaseModel, tmp_path: Path) -> None:
    factors = random_adapter(adapters.layout, 3)
    export_peft(adapters.layout, factors, tmp_path / "peft", peft_base(tiny.name))
    ids = torch.arange(3, 20)[None]
    injector = Injector(tiny.model, RECIPE.train)
    with torch.no_grad(), injector.active(stack_rows(adapters.layout, [[(factors, 1.0)]])):
        ours = tiny.model(input_ids=ids).logits
    injector.close()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny.model, tmp_path / "peft")(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_ledger_rows_name_what_they_hold(adapters: AdapterStore) -> None:
    (row,) = adapters.commit([(trained(adapters, KEY, 1), "digest")])
    table = adapters.store.get_table(LedgerRow, adapters.ledger_parts())
    assert table.column("augmentation").to_pylist() == ["digest"]
    assert row.length == adapters.layout.parameters * 4
    assert row.recipe == RECIPE.fingerprint
    with pytest.raises(AdapterError, match="not finite"):
        adapters.commit(
            [
                (
                    TrainedAdapter(
                        "bad", {k: v / 0 for k, v in random_adapter(adapters.layout, 1).items()}, 1, 1, 1.0, 1.0, 1.0
                    ),
                    "d",
                )
            ]
        )


def test_an_adapter_that_changes_nothing_is_not_stored(adapters: AdapterStore) -> None:
    zero = {n: f if n.endswith(".A") else 0 * f for n, f in random_adapter(adapters.layout, 1).items()}
    with pytest.raises(AdapterError, match="its B is zero"):
        adapters.commit([(trained(adapters, KEY, 1), "d"), (TrainedAdapter("z", zero, 1, 1, 1.0, 1.0, 1.0), "d")])
    assert adapters.store.list("adapters", ".parquet") == []


def test_an_initial_adapter_is_kept_under_its_fingerprint(tiny_session: BaseModel, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    layout, _ = find_targets(tiny_session.model, RECIPE.train)
    factors = random_adapter(layout, 1)
    name = put_start(store, layout, factors)
    assert name == start_fingerprint(factors) == put_start(store, layout, factors)
    again = get_start(store, name)
    assert all(torch.equal(again[key], factors[key]) for key in factors)
    path = tmp_path / "store" / "starts" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"start \w+: was altered in the store"):
        get_start(store, name)
    with pytest.raises(AdapterError, match=r"no such object"):
        get_start(store, "nothing")
