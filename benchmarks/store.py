"""Measure the store: adapter sizes, fetching, storing, opening and planning a million: `python benchmarks/store.py`.

Adapters have the small model's shapes. Those whose int8 error is measured are trained on the example corpus; the others
are random. The million rows of the ledger, of augmentations and of passages are made up: random keys, in parts of ten
thousand rows as compaction leaves them, with no shards behind them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measure import machine, peak_mb

ROOT = Path(__file__).parent.parent
K = 3
PART_ROWS = 10_000
SHARD_ROWS = 168  # bf16 adapters of the small model in 128 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model: a name or a folder")
    parser.add_argument("--adapters", type=int, default=336, help="adapters to store and fetch")
    parser.add_argument("--trained", type=int, default=4, help="adapters to train, for the error of int8")
    parser.add_argument("--fetches", type=int, default=200, help=f"fetches of {K} adapters")
    parser.add_argument("--rows", type=int, default=1_000_000, help="passages of the made-up corpus")
    parser.add_argument("--missing", type=int, default=1_000, help="how many of the passages have no adapter")
    parser.add_argument("--child", choices=["open", "plan"], help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps({"open": open_million, "plan": plan_million}[arguments.child](arguments)))
        return
    print(machine())
    with tempfile.TemporaryDirectory(prefix="prag-bench-") as folder:
        found = {**measure_adapters(arguments, Path(folder)), **measure_million(arguments, Path(folder))}
    print(json.dumps({**found, "machine": machine()}))


# ---- adapters


def measure_adapters(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from prag_core.config import AugmentConfig, ModelConfig, TrainConfig, augment_recipe, train_recipe
    from prag_core.llm.base_model import load_base_model
    from prag_core.llm.lora import find_targets
    from prag_core.llm.peft import export_peft, import_peft, peft_base
    from prag_core.maintenance.verify import check_shards, ledger_rows
    from prag_core.recipe import Recipe
    from prag_core.store.adapters import AdapterStore
    from prag_core.store.objects import Store
    from prag_core.store.shard_codec import pack_shard

    base = load_base_model(ModelConfig(name=arguments.model, device="cpu"))
    train = train_recipe(TrainConfig())
    layout, _ = find_targets(base.model, train)
    peft = peft_base(arguments.model)
    recipe = Recipe(base.fingerprint, augment_recipe(AugmentConfig(), "none", train), train)
    made = [(secrets.token_hex(16), random_factors(layout, n)) for n in range(arguments.adapters)]

    # 1. Bytes an adapter, file overhead included, against the folder that the paper's code writes.
    sample = made[: min(64, len(made))]
    stored = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
    sizes = {name: len(pack_shard(layout, sample, dtype, {})[0]) / len(sample) for name, dtype in stored.items()}
    for n in range(K):
        export_peft(layout, made[n][1], folder / f"peft{n}", peft)
    peft_bytes = sum(file.stat().st_size for file in (folder / "peft0").iterdir())
    overhead = sizes["bf16"] / (2 * layout.parameters) - 1
    print(f"a PEFT folder: {peft_bytes:,} bytes; file overhead of a bf16 shard {overhead:.2%}")
    for name, size in sizes.items():
        print(f"{name}: {size:,.0f} bytes an adapter, {size / peft_bytes:.3f} of the folder")

    # 2. The error of int8 on trained adapters.
    error = int8_error(base, layout, arguments.trained)

    # 3. Storing and fetching, from a folder and from a real S3 server on this machine.
    sys.path.append(str(ROOT))
    from tests.helpers.s3 import S3Server

    with S3Server(folder / "s3", "prag-bench", secrets.token_hex(16)) as server:
        os.environ.update(server.environment)
        stores = {"folder": Store(str(folder / "store")), "s3": Store(f"s3://{server.bucket}/bench")}
        fetched: dict[str, list[float]] = {}
        for name, store in stores.items():
            adapters = AdapterStore(store, recipe, layout)
            adapters.describe()
            seconds, size_bytes, rows = 0.0, 0, []
            for begin in range(0, len(made), SHARD_ROWS):
                shard = [(trained_adapter(key, factors), "digest") for key, factors in made[begin : begin + SHARD_ROWS]]
                begun = time.perf_counter()
                rows += adapters.commit(shard)
                seconds += time.perf_counter() - begun
                size_bytes += sum(row.length for row in rows[begin:])
            put = size_bytes / seconds / 1e6
            table = pa.concat_tables([ledger_rows(store, part) for part in adapters.ledger_parts()])
            begun = time.perf_counter()
            if check_shards(store, table, full=True):
                raise RuntimeError("damage was found")
            verify = size_bytes / (time.perf_counter() - begun) / 1e6
            fetched[name] = fetch_ms(adapters, [key for key, _ in made], arguments.fetches)
            print(f"{name}: put {put:.0f} MB/s, packing and checksums included")
            print(f"{name}: verified in full {verify:.0f} MB/s, by one process")
            print(f"{name}: {K} adapters in {statistics.median(fetched[name]):.1f} ms (median)")

    # 4. The same adapters in the paper's way: local folders, through PEFT.
    peft_ms = statistics.median(timed(lambda: load_peft(base.model, folder)) for _ in range(10))
    read_ms = statistics.median(
        timed(lambda: [import_peft(layout, folder / f"peft{n}", peft) for n in range(K)]) for _ in range(20)
    )
    print(f"{K} PEFT folders: {peft_ms:.0f} ms through PEFT, {read_ms:.1f} ms to read their tensors alone")
    return {
        "bytes_per_adapter": {name: round(size) for name, size in sizes.items()},
        "int8_dw_error": error,
        "fetch_ms": {
            "folder_p50": round(statistics.median(fetched["folder"]), 2),
            "s3_p50": round(statistics.median(fetched["s3"]), 2),
            "s3_p95": round(float(np.quantile(fetched["s3"], 0.95)), 2),
        },
        "peft_dir_fetch_ms": round(peft_ms, 1),
        "put_mb_s": round(put, 1),
        "verify_mb_s": round(verify, 1),
    }


def random_factors(layout: Any, seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in layout.tensor_shapes.items()}


def trained_adapter(key: str, factors: dict[str, Any]) -> Any:
    from prag_core.llm.lora import TrainedAdapter

    return TrainedAdapter(key, factors, 20, 3000, 3.0, 0.5, 1.0)


def int8_error(base: Any, layout: Any, count: int) -> float | None:
    """Return the mean relative error of ΔW, over the modules of adapters trained on the example corpus."""
    import torch
    from train import from_atlas, jobs_of

    from prag_core.config import TrainConfig, train_recipe
    from prag_core.store.shard_codec import pack_shard, unpack_adapter
    from prag_core.training.trainer import Trainer

    if not count:
        return None
    trainer = Trainer(base, train_recipe(TrainConfig()))
    trained = list(trainer.train(jobs_of(base, from_atlas(), count), tokens_per_step=1024))
    trainer.close()
    errors = []
    for adapter in trained:
        data, (place,) = pack_shard(layout, [(adapter.key, adapter.factors)], "int8", {})
        got = unpack_adapter(layout, data[place.offset :], "int8", adapter.key, place.checksum)
        for target in layout.targets:
            true, stored = (torch.matmul(f[f"{target}.B"], f[f"{target}.A"]) for f in (adapter.factors, got))
            errors += ((true - stored).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).tolist()
    print(f"int8: ΔW of {len(trained)} trained adapters is off by {np.mean(errors):.3%}, at most {max(errors):.3%}")
    return round(float(np.mean(errors)), 5)


def fetch_ms(adapters: Any, keys: Sequence[str], fetches: int) -> list[float]:
    """Return the milliseconds of each fetch of K random adapters at once, each verified."""
    from prag_core.store.adapters import LedgerSource

    source = LedgerSource(adapters, adapters.ledger_parts())
    dice = np.random.default_rng(0)
    with ThreadPoolExecutor(K) as pool:
        wanted = [[keys[n] for n in dice.choice(len(keys), K, replace=False)] for _ in range(fetches)]
        return [timed(lambda some=some: list(pool.map(source.get, some))) for some in wanted]


def load_peft(model: Any, folder: Path) -> None:
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model, folder / "peft0", adapter_name="0")
    for n in range(1, K):
        loaded.load_adapter(folder / f"peft{n}", adapter_name=str(n))
    loaded.unload()


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


# ---- a million rows


def measure_million(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    url = str(folder / "million")
    begun = time.perf_counter()
    write_million(url, arguments.rows, arguments.missing)
    print(f"{arguments.rows:,} made-up rows written in {time.perf_counter() - begun:.0f} s", flush=True)
    opened = in_process(arguments, "open", url)
    print(
        f"opened in {opened['seconds']:.2f} s, {opened['mb']:.0f} MB more than before ({opened['peak_mb']:.0f} in all)"
    )
    planned = in_process(arguments, "plan", url)
    print(f"planned in {planned['seconds']:.1f} s, {planned['peak_mb']:.0f} MB in the driver: {planned['counts']}")
    return {
        "open_1m_s": round(opened["seconds"], 2),
        "open_1m_mb": round(opened["mb"]),
        "plan_1m_s": round(planned["seconds"], 1),
        "plan_1m_driver_mb": round(planned["peak_mb"]),
    }


def in_process(arguments: argparse.Namespace, child: str, url: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", child, "--store", url, "--rows", str(arguments.rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def recipe_of_million() -> Any:
    from prag_core.config import AugmentConfig, TrainConfig, augment_recipe, train_recipe
    from prag_core.recipe import Recipe

    train = train_recipe(TrainConfig())
    return Recipe("base", augment_recipe(AugmentConfig(), "none", train), train)


def write_million(url: str, rows: int, missing: int) -> None:
    from prag_core.records import Augmentation, LedgerRow, Passage, schema
    from prag_core.store.objects import Store

    store, recipe = Store(url), recipe_of_million()
    adapters = f"adapters/{recipe.fingerprint}"
    dice = np.random.default_rng(0)

    def hexadecimal(count: int, size: int) -> list[str]:
        text = dice.bytes(count * size).hex()
        return [text[i : i + 2 * size] for i in range(0, len(text), 2 * size)]

    for begin in range(0, rows, PART_ROWS):
        count = min(PART_ROWS, rows - begin)
        done = max(0, min(count, rows - missing - begin))
        keys, digests = hexadecimal(count, 16), hexadecimal(count, 8)
        nothing = pa.array([[]] * count, pa.list_(pa.string()))
        passages = {"key": keys, "title": ["made up"] * count, "text": ["a text"] * count}
        passages |= {"sources": nothing, "access": nothing}
        store.put_table("corpus/million", pa.table(passages, schema=schema(Passage)))
        blank = Augmentation("", (), (), "imported")
        texts = pa.Table.from_pylist(
            [{"key": key, "rewrites": [], "pairs": [], "origin": blank.origin} for key in keys], schema(Augmentation)
        )
        store.put_table(
            f"augmentations/{recipe.augment.fingerprint}", texts.append_column("digest", pa.array(digests, pa.string()))
        )
        if not done:
            continue
        shards = [f"{adapters}/shards/{name}.safetensors" for name in hexadecimal(-(-done // SHARD_ROWS), 16)]
        place = np.arange(done)
        ledger = {
            "key": keys[:done],
            "recipe": [recipe.fingerprint] * done,
            "augmentation": digests[:done],
            "shard": [shards[n // SHARD_ROWS] for n in range(done)],
            "offset": place % SHARD_ROWS * 760_320 + 50_000,
            "length": np.full(done, 760_320),
            "checksum": hexadecimal(done, 16),
            "dtype": ["bfloat16"] * done,
            "steps": np.full(done, 20),
            "tokens": np.full(done, 3000),
            "first_loss": dice.random(done) + 2,
            "last_loss": dice.random(done),
            "seconds": dice.random(done),
            "created": place + 1.7e9,
        }
        store.put_table(f"{adapters}/ledger", pa.table(ledger, schema=schema(LedgerRow)))


def open_million(arguments: argparse.Namespace) -> dict[str, Any]:
    from prag_core.llm.layout import LoraLayout
    from prag_core.store.adapters import AdapterStore, LedgerSource
    from prag_core.store.objects import Store

    layout = LoraLayout(2, 16.0, (0,), ("up_proj",), ((8, 8),))
    adapters = AdapterStore(Store(arguments.store), recipe_of_million(), layout)
    parts = adapters.ledger_parts()
    before, begun = peak_mb(), time.perf_counter()
    source = LedgerSource(adapters, parts)
    seconds = time.perf_counter() - begun
    first = adapters.store.get_columns(parts[0], ["key"])["key"][0].as_py()
    if first not in source or "0" * 32 in source:
        raise RuntimeError("the snapshot was not opened rightly")
    return {"seconds": seconds, "mb": peak_mb() - before, "peak_mb": peak_mb()}


def plan_million(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.resources import PROFILES
    from cluster.session import ray_session
    from pipelines.execution.survey import survey
    from pipelines.execution.tables import read_parts
    from prag_core.store.objects import Store

    profile, store = PROFILES["laptop"], Store(arguments.store)
    with ray_session(profile):
        begun = time.perf_counter()
        passages = read_parts(store, "corpus/million", ["key"], profile.partitions)
        found = survey(store, passages, arguments.rows, recipe_of_million(), profile)
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_mb": peak_mb(), "counts": dict(found.counts)}


if __name__ == "__main__":
    main()
