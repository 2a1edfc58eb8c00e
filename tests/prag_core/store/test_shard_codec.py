"""Adapters as bytes: the precision of each storage dtype, and one contiguous range for each adapter."""

from __future__ import annotations

import itertools
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prag_core.errors import AdapterError
from prag_core.llm.layout import INT8, LoraLayout, adapter_size_bytes
from prag_core.store.shard_codec import DTYPES, pack_shard, unpack_adapter

# 576, 1536 are the small model's; 10 and 33 make groups that do not come out even.
SMALL = LoraLayout(2, 16.0, (0, 1, 2), ("gate_proj", "up_proj", "down_proj"), ((576, 1536), (576, 1536), (1536, 576)))
UNEVEN = LoraLayout(3, 4.0, (0, 5), ("up_proj", "down_proj"), ((10, 33), (33, 10)))


def random_factors(layout: LoraLayout, seed: int, size_a: float = 1.0, size_b: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (size_a if name.endswith(".A") else size_b)
        for name, shape in layout.tensor_shapes.items()
    }


def worst_delta_error(layout: LoraLayout, left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest relative Frobenius error of ΔW = scale · B A over the modules."""
    worst = 0.0
    for target in layout.targets:
        for layer in range(len(layout.layers)):
            true, got = (
                layout.scale * f[f"{target}.B"][layer].double() @ f[f"{target}.A"][layer].double()
                for f in (left, right)
            )
            worst = max(worst, float((true - got).norm() / true.norm()))
    return worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("layout", [SMALL, UNEVEN], ids=["small", "uneven"])
def test_each_adapter_is_one_range_and_comes_back(layout: LoraLayout, dtype: str) -> None:
    made = {key: random_factors(layout, seed) for seed, key in enumerate(["k3", "k1", "k2"])}
    data, placed = pack_shard(layout, list(made.items()), dtype, {"base_model": "b"})
    assert [place.key for place in placed] == list(made)
    for place in placed:
        assert place.length == adapter_size_bytes(layout, dtype)
        part = data[place.offset : place.offset + place.length]
        got = unpack_adapter(layout, part, dtype, place.key, place.checksum)
        if dtype == INT8:
            assert {tensor.dtype for tensor in got.values()} == {torch.float32}
            assert worst_delta_error(layout, made[place.key], got) < 0.02
        else:
            assert all(torch.equal(got[name], made[place.key][name].to(DTYPES[dtype])) for name in got)
    covered = sorted((place.offset, place.offset + place.length) for place in placed)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))
    assert covered[-1][1] == len(data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shard_is_a_safetensors_file_whatever_the_order_of_its_adapters(dtype: str) -> None:
    made = {key: random_factors(UNEVEN, seed) for seed, key in enumerate(["k3", "k1", "k2"])}
    data, placed = pack_shard(UNEVEN, list(made.items()), dtype, {"base_model": "b"})
    tensors = safetensors.torch.load(data)
    expected = {f"{key}/{name}": t.to(DTYPES[dtype]) for key, factors in made.items() for name, t in factors.items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    again, replaced = pack_shard(UNEVEN, list(made.items())[::-1], dtype, {"base_model": "b"})
    assert again == data
    assert replaced == placed[::-1]


@pytest.mark.parametrize(("size_a", "size_b"), [(1.0, 1.0), (0.02, 1e-3), (0.02, 1e-5), (10.0, 10.0)])
def test_int8_keeps_delta_w_within_one_percent(size_a: float, size_b: float) -> None:
    factors = random_factors(SMALL, 1, size_a, size_b)
    data, (place,) = pack_shard(SMALL, [("key", factors)], INT8, {})
    got = unpack_adapter(SMALL, data[place.offset :], INT8, "key", place.checksum)
    assert worst_delta_error(SMALL, factors, got) < 0.01
    assert place.length < 0.27 * SMALL.parameters * 4


def test_int8_keeps_zeros_and_very_small_values() -> None:
    factors = random_factors(UNEVEN, 1)
    factors["up_proj.B"].zero_()
    factors["down_proj.B"].fill_(1e-30)
    data, (place,) = pack_shard(UNEVEN, [("key", factors)], INT8, {})
    got = unpack_adapter(UNEVEN, data[place.offset :], INT8, "key", place.checksum)
    assert not got["up_proj.B"].any()
    assert not got["down_proj.B"].any()


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-9, 400), st.integers(0, 10))
def test_int8_is_never_off_by_more_than_half_a_step(size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (torch.rand(shape, generator=generator) * 2 - 1) * size for name, shape in UNEVEN.tensor_shapes.items()
    }
    data, (place,) = pack_shard(UNEVEN, [("key", factors)], INT8, {})
    got = unpack_adapter(UNEVEN, data[place.offset :], INT8, "key", place.checksum)
    for name, tensor in factors.items():
        # Half a step of the largest value's, the scale's own rounding (2^-11, more where fp16 thins out) besides.
        allowed = size / 127 * (0.5 + 127 * 2**-11) + 2.0**-14 * 2.0**-25 * 127
        assert float((got[name] - tensor).abs().max()) <= allowed


def test_the_shards_header_describes_its_layout() -> None:
    data, _ = pack_shard(UNEVEN, [("key", random_factors(UNEVEN, 1))], INT8, {"base_model": "b"})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    described = header["__metadata__"]
    assert header["key"]["dtype"] == "U8"
    assert (described["base_model"], described["dtype"], described["group"]) == ("b", "int8", "64")
    assert json.loads(described["tensors"]) == {name: list(shape) for name, shape in UNEVEN.tensor_shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_values_that_cannot_be_stored_are_refused(dtype: str) -> None:
    factors = random_factors(UNEVEN, 1)
    for bad in (float("nan"), float("inf")):
        broken = {**factors, "up_proj.A": factors["up_proj.A"] * bad}
        with pytest.raises(AdapterError, match=r"adapter key: up_proj\.A holds values that are not finite"):
            pack_shard(UNEVEN, [("key", broken)], dtype, {})
    with pytest.raises(AdapterError, match="adapter key: has tensors"):
        pack_shard(UNEVEN, [("key", {})], dtype, {})


def test_an_error_names_values_too_large_for_int8_and_unknown_dtypes() -> None:
    big = {name: tensor * 1e4 for name, tensor in random_factors(UNEVEN, 1).items()}
    with pytest.raises(AdapterError, match=r"adapter key: .* too large for int8\n.*bfloat16"):
        pack_shard(UNEVEN, [("key", big)], INT8, {})
    with pytest.raises(AdapterError, match="cannot be stored as 'int4'"):
        pack_shard(UNEVEN, [], "int4", {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_altered_bytes_are_refused(dtype: str) -> None:
    data, (place,) = pack_shard(UNEVEN, [("key", random_factors(UNEVEN, 1))], dtype, {})
    part = data[place.offset :]
    for wrong in (part[:-1], part + b"0", bytes([part[0] ^ 1]) + part[1:], b""):
        with pytest.raises(AdapterError, match="the ledger says"):
            unpack_adapter(UNEVEN, wrong, dtype, "key", place.checksum)
    with pytest.raises(AdapterError, match=rf"adapter key: \d+ bytes, as {dtype} the layout wants \d+"):
        unpack_adapter(SMALL, part, dtype, "key", place.checksum)
    with pytest.raises(AdapterError, match="cannot be stored as 'int4'"):
        unpack_adapter(UNEVEN, part, "int4", "key", place.checksum)
