"""S3 that fails: passing failures are retried, lasting ones become one error, and half a body is never data."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from botocore.retries.standard import ExponentialBackoff

from prag_core.config_file import parse_config
from prag_core.errors import ConflictError, DamagedError, StoreError, UnreachableError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.lora import find_targets
from prag_core.maintenance.garbage import find_garbage
from prag_core.maintenance.repair import repair
from prag_core.records import LedgerRow, from_table
from prag_core.store.adapters import put_start
from prag_core.store.objects import Store, open_store
from prag_core.store.runs import RunInputs, put_inputs
from prag_core.store.s3 import S3Backend
from prag_core.store.snapshot import load_snapshot
from tests.helpers.adapters import random_adapter
from tests.helpers.faulty_proxy import Fault, FaultyProxy, Kind
from tests.helpers.s3 import S3Server
from tests.helpers.stores import RECIPE, SEEDS, VERSION, all_snapshots, run_again, served, verify

pytestmark = pytest.mark.slow

RETRIES = 2
TIMEOUT_S = 0.5
DATA = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are a tenth as long as in use."""
    pause = ExponentialBackoff.delay_amount
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: pause(self, context) / 10)
    monkeypatch.setattr("prag_core.store.s3.MAX_PAUSE_S", 0.2)


@pytest.fixture
def store(proxy: FaultyProxy, s3_server: S3Server, short_pauses: None) -> Store:
    proxy.fail()
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    return Store(url, {"endpoint_url": proxy.endpoint}, RETRIES, TIMEOUT_S)


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("there"),
    "range": lambda store: store.get("there", 1000, 60_000),
    "put": lambda store: store.put("new", DATA),
    "create": lambda store: store.swap("new", None, DATA),
    "replace": lambda store: store.swap("there", DATA, b"replaced"),
    "exists": lambda store: (store.exists("there"), store.exists("nowhere")),
    "list": lambda store: store.list("", "there"),
}
RESULTS = {"get": DATA, "range": DATA[1000:60_000], "exists": (True, False), "list": ["there"]}


PASSING: list[tuple[str, Kind]] = [
    *((operation, kind) for operation in OPERATIONS for kind in ("503", "reset", "late")),
    *((operation, "500") for operation in ("get", "put")),
    *((operation, "truncated") for operation in ("get", "range", "list")),
    *((operation, "lost answer") for operation in ("put", "create", "replace")),
]


@pytest.mark.parametrize(("operation", "kind"), PASSING)
def test_passing_failures_are_retried(store: Store, proxy: FaultyProxy, operation: str, kind: Kind) -> None:
    store.put("there", DATA)
    times = RETRIES if operation in ("get", "put") else 1
    proxy.fail(Fault(kind, times=times))
    assert OPERATIONS[operation](store) == RESULTS.get(operation)
    assert len(proxy.seen) > times
    proxy.fail()
    if operation in ("put", "create"):
        assert store.get("new") == DATA
    assert store.get("there") == (b"replaced" if operation == "replace" else DATA)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("500", r"the server answered 500 \(InternalError\), after up to 3 tries\n.*wait until the store is well"),
        ("503", r"the server answered 503 \(SlowDown\), after up to 3 tries\n.*wait until the store is well"),
        ("reset", r"the connection failed, after up to 3 tries\n.*check that the store is up"),
        ("late", r"no answer within 0\.5 s, after up to 3 tries\n.*raise storage\.timeout_s"),
    ],
)
@pytest.mark.parametrize("operation", ["range", "put", "replace", "list"])
def test_lasting_failures_become_one_error_within_a_bounded_time(
    store: Store, proxy: FaultyProxy, operation: str, kind: Kind, cause: str
) -> None:
    store.put("there", DATA)
    proxy.fail(Fault(kind))
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=rf"{store.url}/\w*: cannot be [\w ]+: {cause}"):
        OPERATIONS[operation](store)
    # 3 tries, the pauses between them (up to 0.1 and 0.2 s), and some room for a busy machine.
    assert time.monotonic() - begun < 3 * TIMEOUT_S + 0.3 + 3
    # The client's HTTP library sends a request again by itself when a connection that it kept was closed.
    # A range is first asked for by obstore.
    most = (RETRIES + 1 + (operation == "range")) * (2 if kind == "reset" else 1)
    assert RETRIES < len(proxy.seen) <= most


@contextlib.contextmanager
def obstore_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here s3fs reads nothing."""
    with monkeypatch.context() as patch:
        patch.delattr(S3Backend, "_read")
        yield


@pytest.mark.parametrize("prefix", ["", "a b/ü%20+~'(1)"])
def test_ranges_come_through_obstore(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}{prefix}", retries=0)
    store.put("there", DATA)
    copy = pickle.loads(pickle.dumps(store))
    with obstore_alone(monkeypatch):
        for opened in (store, copy):
            assert opened.get("there", 1000, 60_000) == DATA[1000:60_000]
            assert opened.get("there", 0, len(DATA)) == DATA


@pytest.mark.parametrize(
    "options",
    [{"range_reads": "s3fs"}, {"client_kwargs": {"region_name": "us-east-1", "verify": False}}],
    ids=["as the setting says", "an option that obstore does not know"],
)
def test_ranges_can_come_through_s3fs(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", options)
    store.put("there", DATA)
    monkeypatch.setattr("obstore.get_range", None)
    assert store.get("there", 1000, 60_000) == DATA[1000:60_000]


def test_what_obstore_cannot_read_is_left_to_s3fs_for_a_while(
    store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("there", DATA)
    monkeypatch.setattr("prag_core.store.range_reader.PAUSE_S", 0.3)
    proxy.fail(Fault("503", times=1, methods=("GET",)))
    assert store.get("there", 5, 9) == DATA[5:9]
    with pytest.raises(AttributeError), obstore_alone(monkeypatch):
        store.get("there", 5, 9)
    time.sleep(0.4)
    with obstore_alone(monkeypatch):
        assert store.get("there", 5, 9) == DATA[5:9]
    # An object that is missing says nothing against obstore.
    with pytest.raises(DamagedError):
        store.get("nowhere", 5, 9)
    with obstore_alone(monkeypatch):
        assert store.get("there", 5, 9) == DATA[5:9]


def test_a_slow_range_is_asked_for_again(proxy: FaultyProxy, s3_server: S3Server) -> None:
    proxy.fail()
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", {"endpoint_url": proxy.endpoint})
    store.put("there", DATA)
    for _ in range(60):
        store.get("there", 5, 9)
    # 1. One slow answer of several: the second one comes first.
    proxy.fail(Fault("late", times=1))
    begun = time.monotonic()
    assert store.get("there", 1000, 60_000) == DATA[1000:60_000]
    assert time.monotonic() - begun < 5
    assert proxy.seen == ["GET"] * 2
    # 2. A server that is slow as a whole does not get each read twice.
    proxy.fail(Fault("late", late_s=0.1))
    for _ in range(20):
        assert store.get("there", 5, 9) == DATA[5:9]
    assert 20 <= len(proxy.seen) <= 28


@pytest.mark.parametrize("kind", ["truncated", "short"])
@pytest.mark.parametrize("cut", [(None, None), (1000, 60_000), (1000, None)])
def test_half_a_body_is_never_data(
    store: Store, proxy: FaultyProxy, kind: Kind, cut: tuple[int | None, int | None]
) -> None:
    store.put("there", DATA)
    proxy.fail(Fault(kind, methods=("GET",)))
    with pytest.raises(StoreError, match=r"there: cannot be read: .*after up to 3 tries"):
        store.get("there", *cut)
    proxy.fail(Fault(kind, times=RETRIES, methods=("GET",)))
    assert store.get("there", *cut) == DATA[slice(*cut)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_denied_request_is_not_tried_again_and_tells_no_secret(
    store: Store, proxy: FaultyProxy, operation: str
) -> None:
    store.put("there", DATA)
    proxy.fail(Fault("403"))
    with pytest.raises(
        UnreachableError, match=r"access denied \((403|AccessDenied)\)\n.*check the credentials"
    ) as caught:
        OPERATIONS[operation](store)
    assert len(proxy.seen) == 1 + (operation == "range")  # by obstore, and then by s3fs, which can say why
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"], "Signature"]
    assert not [secret for secret in secrets if secret in repr(caught.value) + str(caught.value)]
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_said_at_once(proxy: FaultyProxy, operation: str) -> None:
    proxy.fail()
    store = Store("s3://no-such-bucket/x", {"endpoint_url": proxy.endpoint}, RETRIES, TIMEOUT_S)
    with pytest.raises(UnreachableError, match=r"there is no such bucket\n.*create it"):
        OPERATIONS[operation](store)
    assert len(proxy.seen) <= 2


def test_a_store_that_is_away_is_named(s3_server: S3Server) -> None:
    store = Store(f"s3://{s3_server.bucket}/x", {"endpoint_url": "http://127.0.0.1:9"}, 1, TIMEOUT_S)
    with pytest.raises(StoreError, match="the connection failed, after up to 2 tries"):
        store.check_writable()


def test_a_lost_answer_does_not_hide_who_won(store: Store, proxy: FaultyProxy) -> None:
    proxy.fail(Fault("lost answer", times=1, methods=("PUT",)))
    store.swap("CURRENT", None, b"first")
    assert proxy.seen.count("PUT") == 2  # the second was refused by the first one's success
    proxy.fail(Fault("lost answer", times=1, methods=("PUT",)))
    store.swap("CURRENT", b"first", b"second")
    proxy.fail()
    assert store.get("CURRENT") == b"second"
    with pytest.raises(ConflictError):
        store.swap("CURRENT", b"first", b"second")


def test_a_lost_answer_at_the_last_try_is_resolved(store: Store, proxy: FaultyProxy) -> None:
    proxy.fail(Fault("lost answer", methods=("PUT",)))
    store.swap("CURRENT", None, b"first")
    proxy.fail()
    assert store.get("CURRENT") == b"first"


@pytest.mark.parametrize("kind", ["503", "reset", "truncated"])
def test_files_and_columns_are_retried_too(
    store: Store, proxy: FaultyProxy, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(DATA)
    table = pa.table({"key": [f"{n:032x}" for n in range(5000)], "value": list(range(5000))})
    once = Fault(kind, times=1)
    proxy.fail(once)
    store.put_file("file", tmp_path / "file")
    proxy.fail(once)
    assert (store.size("file"), store.size("nothing")) == (len(DATA), None)
    proxy.fail(once)
    with store.open("file") as stream:
        stream.seek(1000)
        assert stream.read(500) == DATA[1000:1500]
    part = store.put_table("parts", table)
    for whole_part_bytes in (1 << 20, 0):  # read whole, and by the ranges of its columns
        monkeypatch.setattr("prag_core.store.objects.WHOLE_PART_BYTES", whole_part_bytes)
        proxy.fail(once)
        assert store.get_columns(part, ["value"]).equals(table.select(["value"]))
        proxy.fail(Fault(kind, methods=("GET",)))
        with pytest.raises(StoreError, match=r"parts/part-\w+\.parquet: cannot be read: .*after up to 3 tries"):
            store.get_columns(part, ["value"])


def test_an_outage_is_not_taken_for_damage(store: Store, proxy: FaultyProxy, tiny_session: BaseModel) -> None:
    """Whichever request the server fails at: nothing intact is found damaged, and no good adapter is removed."""
    layout = find_targets(tiny_session.model, RECIPE.train)[0]
    store = Store(store.url, store.options, 0, TIMEOUT_S)
    put_inputs(store, "run0", RunInputs(VERSION, RECIPE.fingerprint))
    put_start(store, layout, random_adapter(layout, 1))
    run_again(store, layout)
    victim = from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))[1]
    data = bytearray(store.get(victim.shard))
    data[victim.offset + 5] ^= 64
    store.put(victim.shard, bytes(data))
    good, objects, kept = {*SEEDS} - {victim.key}, store.objects(), all_snapshots(store)

    def is_cut_off(after: int, work: Callable[..., object], *arguments: object) -> bool:
        proxy.fail(Fault("503", after=after))
        try:
            work(*arguments)
        except UnreachableError:
            return True
        finally:
            proxy.fail()
        return False

    # 1. A check or a search for garbage ends with UnreachableError, and with nothing else.
    found = verify(store)
    assert [finding.name for finding in found] == [victim.shard]
    for look in (lambda: verify(store), lambda: find_garbage(store, objects, kept, grace_s=0)):
        after = 0
        while is_cut_off(after, look):
            after += 3
        assert after > 10
    # 2. A repair keeps every good adapter, and ends the same when the store is back.
    after = 0
    while is_cut_off(after, repair, store, found):
        assert good <= {*served(store)}, after
        found, after = verify(store), after + 3
    assert after > 10
    repair(store, verify(store))
    assert verify(store) == []
    assert {*served(store)} == good


def test_a_restarted_server_is_waited_for(s3_server: S3Server) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", retries=8)
    store.put("before", DATA)
    s3_server.kill()
    back = threading.Timer(1.0, s3_server.start)
    back.start()
    store.put("after", DATA)
    back.join()
    assert store.get("before") == store.get("after") == DATA


def test_the_configuration_reaches_the_store(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    storage = {"endpoint_url": s3_server.endpoint, "region": "us-east-1", "retries": 1, "timeout_s": 3}
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    store = open_store(parse_config({"store": url, "storage": storage, "corpus": {"path": "x"}}))
    store.put("x", b"1")
    assert store.get("x") == b"1"
    assert (store.retries, store.timeout_s) == (1, 3)


def test_credentials_come_from_a_profile(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("aws")
    key, secret = (os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    file = folder / "credentials"
    file.write_text(f"[mine]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    settings = {"store": url, "corpus": {"path": "x"}}
    # An option of their own makes these stores open a new connection, which looks for its credentials anew.
    config = parse_config({**settings, "storage": {"profile": "mine", "timeout_s": 4}})
    open_store(config).put("x", b"123")
    with obstore_alone(monkeypatch):
        assert open_store(config).get("x", 1, 3) == b"23"
    for storage, cause in [({"timeout_s": 5}, "no usable AWS credentials"), ({"profile": "other"}, "other")]:
        with pytest.raises(StoreError, match=cause):
            open_store(parse_config({**settings, "storage": storage})).put("x", b"1")
