"""The run lease: one run at a time, free again after a crash, and its loss is noticed; on a folder and on S3."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from prag_core.errors import LeaseError, StoreError
from prag_core.store.objects import Store
from prag_core.store.runs import (
    LEASE,
    LeaseRecord,
    RunInputs,
    RunLease,
    acquire_lease,
    check_holder,
    find_config,
    hold_lease,
    put_config,
    put_inputs,
    read_lease,
    wait_for_lease,
)

TTL_S = 1.5


def elsewhere(now: float, **changes: object) -> LeaseRecord:
    """What another machine's run wrote."""
    record = LeaseRecord("t", "run-7", "far-host", 4711, "", since=now - 100, heartbeat=now, ttl_s=TTL_S)
    return replace(record, **changes)  # type: ignore[arg-type]


def write(store: Store, record: LeaseRecord) -> None:
    store.put(LEASE, json.dumps(asdict(record)).encode())


def wait_until(lease: RunLease, lost: bool) -> None:
    deadline = time.monotonic() + 10
    while lease.lost != lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_is_told_who_holds_it(store: Store) -> None:
    with hold_lease(store, "run-1") as lease:
        lease.check()
        with pytest.raises(LeaseError) as caught:
            acquire_lease(store, "run-2")
    message = str(caught.value)
    assert f"run run-1: process {os.getpid()} on {lease.record.host}, since 20" in message
    for part in ("last heartbeat 20", "expires 20", "can be taken after 20", "--take-over"):
        assert part in message
    assert pickle.loads(pickle.dumps(caught.value)).exit_code == 10
    with hold_lease(store, "run-2"):
        pass
    record = read_lease(store)
    assert record is not None
    assert record.released


@pytest.mark.parametrize("changed", [{"heartbeat": "x"}, {"pid": "1"}, {"released": 1}, {"ttl_s": True}])
def test_a_damaged_lease_is_named_and_can_be_taken_over(store: Store, changed: dict[str, object]) -> None:
    with hold_lease(store, "run-1"):
        pass
    store.put_json("runs/lease.json", {**store.get_json("runs/lease.json"), "released": False, **changed})
    with pytest.raises(StoreError, match=r"lease\.json: not a lease: .* is of the wrong type\n.*--take-over"):
        acquire_lease(store, "run-2")
    acquire_lease(store, "run-2", take_over=True).release()


def test_a_heartbeat_after_the_last_date_is_told(store: Store) -> None:
    with hold_lease(store, "run-1"):
        pass
    far = {"released": False, "machine": "another", "heartbeat": 1e300}
    store.put_json("runs/lease.json", {**store.get_json("runs/lease.json"), **far})
    with pytest.raises(LeaseError, match="last heartbeat 9999-12-31"):
        acquire_lease(store, "run-2")


def test_of_several_runs_one_gets_the_lease(store: Store) -> None:
    def take(run: int) -> RunLease | str:
        try:
            return acquire_lease(store, f"run-{run}")
        except LeaseError as error:
            return error.message

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take, range(4)))
    (winner,) = (lease for lease in taken if isinstance(lease, RunLease))
    assert read_lease(store) == winner.record
    told = f"store = {store.url!r} is in use by run {winner.record.run}:"
    assert sum(isinstance(said, str) and said.startswith(told) for said in taken) == 3
    winner.release()


def test_heartbeats_extend_the_lease(store: Store) -> None:
    with hold_lease(store, "run-1", ttl_s=TTL_S) as lease:
        first = lease.record
        time.sleep(2 * TTL_S)
        lease.check()
        record = read_lease(store)
        assert record is not None
        assert record.heartbeat > first.expires
        assert (record.since, record.token) == (first.since, first.token)
        with pytest.raises(LeaseError):
            acquire_lease(store, "run-2", skew_s=0)


def test_an_expired_lease_is_free_only_after_the_skew(store: Store) -> None:
    write(store, elsewhere(time.time() - TTL_S - 5))
    with pytest.raises(LeaseError, match=r"run run-7: process 4711 on far-host"):
        acquire_lease(store, "run-8", skew_s=60)
    with hold_lease(store, "run-8", skew_s=1):
        record = read_lease(store)
        assert record is not None
        assert record.run == "run-8"


def test_waiting_ends_when_the_lease_expires_or_the_time_is_up(store: Store) -> None:
    assert wait_for_lease(store, 0) is None
    write(store, elsewhere(time.time()))
    held = wait_for_lease(store, 0.1, look_every_s=0.05)
    assert held is not None
    assert held.run == "run-7"
    # Nobody renews it, so it expires while it is waited for.
    assert wait_for_lease(store, 60, skew_s=0.1, look_every_s=0.05) is None
    with hold_lease(store, "run-8", skew_s=0.1):
        held = wait_for_lease(store, 0)
        assert held is not None
        assert held.run == "run-8"
    assert wait_for_lease(store, 0) is None


def test_a_lease_can_be_taken_over_and_its_holder_notices(store: Store) -> None:
    first = acquire_lease(store, "run-1", ttl_s=TTL_S)
    with hold_lease(store, "run-2", take_over=True) as second:
        wait_until(first, lost=True)
        with pytest.raises(LeaseError, match=r"run-1 was taken over by run run-2: process .*\n.*running again resumes"):
            first.check()
        first.release()  # who lost it does not give another's back
        assert read_lease(store) == second.record
        second.check()


def test_a_block_that_lost_its_lease_ends_with_that_error(store: Store) -> None:
    def work() -> None:
        with hold_lease(store, "run-1", ttl_s=TTL_S) as lease:
            write(store, elsewhere(time.time()))
            wait_until(lease, lost=True)

    with pytest.raises(LeaseError, match="run-1 was taken over by run run-7"):
        work()


def test_a_lease_that_was_removed_is_lost(store: Store) -> None:
    lease = acquire_lease(store, "run-1", ttl_s=TTL_S)
    store.remove(LEASE)
    wait_until(lease, lost=True)
    with pytest.raises(LeaseError, match="was removed"):
        lease.check()
    lease.release()
    assert read_lease(store) is None


def test_a_heartbeat_whose_answer_was_lost_keeps_the_lease(store: Store) -> None:
    lease = acquire_lease(store, "run-1", ttl_s=TTL_S)
    write(store, replace(lease.record, heartbeat=lease.record.heartbeat + 0.01))
    time.sleep(TTL_S)
    lease.check()
    lease.release()
    record = read_lease(store)
    assert record is not None
    assert record.released


def test_the_error_of_the_work_is_not_hidden(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), hold_lease(store, "run-1"):
        raise ZeroDivisionError
    with hold_lease(store, "run-2"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which processes can be seen")
def test_the_lease_of_a_dead_process_on_this_machine_is_free_at_once(store: Store) -> None:
    code = (
        "import os, pickle, sys; from prag_core.store.runs import acquire_lease\n"
        "acquire_lease(pickle.loads(bytes.fromhex(sys.argv[1])), 'run-1', ttl_s=1000); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, pickle.dumps(store).hex()], timeout=60, check=False)
    record = read_lease(store)
    assert record is not None
    assert (record.run, record.released) == ("run-1", False)
    # The same process on another machine, or one that lives here, is waited for.
    write(store, replace(record, machine="another"))
    with pytest.raises(LeaseError):
        acquire_lease(store, "run-2")
    write(store, replace(record, pid=os.getppid(), started=""))
    with pytest.raises(LeaseError):
        acquire_lease(store, "run-2")
    # A process that lives here now, but began at another time than the holder, is not the holder.
    for gone in (record, replace(record, pid=os.getppid())):
        write(store, gone)
        with hold_lease(store, "run-2"):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which processes can be seen")
def test_a_zombie_process_counts_as_dead(store: Store) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with hold_lease(store, "run-1") as lease:
        write(store, replace(lease.record, pid=process.pid, started="", token="its own"))
        with pytest.raises(LeaseError):
            acquire_lease(store, "run-2")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and stays a zombie
        acquire_lease(store, "run-2").release()
        process.communicate()


def test_a_worker_sees_that_another_run_has_the_lease(store: Store) -> None:
    check_holder(store, "run-1")  # nobody ever took it
    with hold_lease(store, "run-1"):
        check_holder(store, "run-1")
        with pytest.raises(LeaseError, match=r"the lease of run run-0 was taken over by run run-1: process"):
            check_holder(store, "run-0")


@pytest.mark.slow
def test_the_lease_counts_as_lost_while_the_store_is_unreachable(s3_server) -> None:
    store = Store(f"s3://{s3_server.bucket}/lease-{os.getpid()}", {}, 0, 0.5)
    lease = acquire_lease(store, "run-1", ttl_s=TTL_S)
    s3_server.kill()
    try:
        wait_until(lease, lost=True)
        with pytest.raises(LeaseError, match=r"could not be renewed for \d+ s"):
            lease.check()
    finally:
        s3_server.start()
    wait_until(lease, lost=False)
    lease.check()
    lease.release()


def test_the_configuration_of_the_newest_run_on_the_same_inputs_is_found(store: Store) -> None:
    wanted = RunInputs("v1", "recipe")
    assert find_config(store, wanted) is None
    runs = {
        "20260101T000000-aaaaaa": wanted,
        "20260103T000000-bbbbbb": RunInputs("v2", "recipe"),
        "reindex-20260102T000000-cccccc": wanted,
        "20260104T000000-dddddd": RunInputs("v1", "another"),
    }
    for run, inputs in runs.items():
        put_config(store, run, f"store: é {run}\n")
        put_inputs(store, run, inputs)
    put_config(store, "20260105T000000-eeeeee", "store: x\n")  # it ended before it knew its inputs
    found = "reindex-20260102T000000-cccccc"
    assert find_config(store, wanted) == (found, f"store: é {found}\n")
