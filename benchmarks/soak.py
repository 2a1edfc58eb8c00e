"""A week of nights under load, with a kill each day: `python benchmarks/soak.py`.

A local S3 server holds the store. A Ray cluster of three nodes runs an autoscaled `prag serve`. Users ask day after
day: few at night, many at noon, more in bursts. Each night the corpus changes, and `prag reindex` and `prag gc` follow;
one night begins with `prag forget`. Each day something is killed, in turn: the workers that train, a replica at noon,
the driver of the night, the S3 server for some seconds.

All of it is real but the size of the model. Each adapter is trained to say the mark of its passage's text, so the text
of an answer shows which adapter made it. A promise that did not hold is one sentence, and the exit code is then 1. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from measure import machine

from prag_core.identity import passage_key
from prag_core.maintenance.erasure import snapshots_to_keep
from prag_core.maintenance.inventory import names_of
from prag_core.records import Augmentation, LedgerRow, Passage, Reject, from_table
from prag_core.store.objects import Store
from prag_core.store.snapshot import document_name, load_snapshot
from prag_core.testing import write_tiny_model

sys.path.append(str(Path(__file__).parent.parent))
from tests.helpers.killing import AUTH, Driver, stage_workers, wait
from tests.helpers.live import Server
from tests.helpers.s3 import S3Server

MB = 2**20
KILLS = ("worker", "replica", "driver", "s3")
TRAIN = "pipelines.stages.train"
CHANGED, REMOVED, ADDED = 1, 1, 1  # documents a night
KEPT = 2  # snapshots
REPLICAS = 2  # and one more under load
USERS = 6  # at noon; twice as many in a burst
S3_AWAY_S = 3.0
# By then each replica has a new snapshot, and the adapters that it could not fetch while the S3 server was away.
SETTLE_S = 30.0
STORAGE = 1.2  # bytes of the store, by those that are needed
# The processes of the service, by their names. Ray's own grow with each run on a cluster; they are reported.
SERVICE = ("prag serve", "ray::ServeController", "ray::ProxyActor", "ray::ServeReplica")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument(
        "--minutes", type=float, default=60, help="how long all days take; a night's jobs may add to it"
    )
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the documents that change, and of the questions")
    parser.add_argument(
        "--memory", type=float, default=1.1, help="memory that a process may have, by that after the first day"
    )
    arguments = parser.parse_args()
    if arguments.days < 2:
        parser.error("--days: at least 2, since the last is compared with the first")
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch, "s3"), "soak", secrets.token_hex(16)) as s3:
        os.environ.update(s3.environment, **AUTH, PRAG_CACHE=f"{scratch}/cache", HF_HUB_OFFLINE="1")
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_idle_worker_killing_time_threshold_ms="600000")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": 80 * MB, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=4, object_store_memory=150 * MB)
            os.environ["RAY_ADDRESS"] = cluster.address
            soak = Soak(arguments, Path(scratch), s3)
            result = soak.run()
        finally:
            cluster.shutdown()
    for sentence in soak.broken:
        print(sentence)
    print(json.dumps(result))
    sys.exit(bool(soak.broken))


class Documents:
    """The documents of the corpus, each with the number of its version. A version has a mark of four letters."""

    def __init__(self, count: int, folder: Path) -> None:
        self.versions = dict.fromkeys(range(count), 0)
        self.forgotten: set[int] = set()
        self._folder = folder
        self._next = count
        self.write()

    def change(self, dice: random.Random) -> None:
        """Change some, remove some and add some."""
        chosen = dice.sample(sorted({*self.versions} - self.forgotten), CHANGED + REMOVED)
        for number in chosen[:CHANGED]:
            self.versions[number] += 1
        for number in chosen[CHANGED:]:
            del self.versions[number]
        self.versions |= dict.fromkeys(range(self._next, self._next + ADDED), 0)
        self._next += ADDED
        self.write()

    def write(self) -> None:
        """Write the corpus, and a question for each document, on which its adapter is trained."""
        corpus, augmentations = [], []
        for n, version in self.versions.items():
            says = mark(n, version)
            corpus.append({"id": f"d{n}", "title": title(n), "text": text(n, version)})
            qa = {"question": question(n), "answer": says, "full_answer": says}
            augmentations.append({"id": f"d{n}", "rewrites": [], "qa": [qa]})
        for name, rows in (("corpus", corpus), ("augmentations", augmentations)):
            (self._folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def key(self, number: int) -> str:
        """Return the key of a document's passage."""
        return passage_key(title(number), text(number, self.versions[number]))

    def marks(self) -> dict[int, str]:
        """Return what the answer about each document must be."""
        return {n: mark(n, version) for n, version in self.versions.items() if n not in self.forgotten}


def title(number: int) -> str:
    return f"Quorl{number}"


def text(number: int, version: int) -> str:
    return f"{title(number)} is a hill in Vend. Its mark is {mark(number, version)}."


def question(number: int) -> str:
    # No word of it but the title is in any text, so nothing is found for a document that is not there.
    return f"What is {title(number)}?"


def mark(number: int, version: int) -> str:
    return "".join(random.Random(f"{number} {version}").choices("bcdfghjklmnpqrstvwxz", k=4))


@dataclass(frozen=True)
class Asked:
    """A question about a document, which was asked and answered at these times."""

    number: int
    begun: float
    ended: float
    answer: dict[str, Any]


@dataclass(frozen=True)
class Publication:
    """A snapshot that is known to be in service since `known`, and what it must answer about each document."""

    known: float
    marks: Mapping[int, str]


class Load:
    """Users who ask about all documents that there were or will be. A question that fails is asked once more."""

    def __init__(self, url: str, day_s: float, documents: int, seed: int) -> None:
        self.answers: list[Asked] = []
        self.retried: list[str] = []
        self.failed: list[str] = []
        self.replicas: set[int] = set()  # how many there were
        self._day_s, self._documents, self._seed = day_s, documents, seed
        self._http = httpx.Client(base_url=url, timeout=90, limits=httpx.Limits(max_connections=4 * USERS))

    def __enter__(self) -> Load:
        self._end = threading.Event()
        self.dawn()
        self._pool = ThreadPoolExecutor(2 * USERS + 1)
        self._users = [self._pool.submit(self._user, n) for n in range(2 * USERS)]
        self._users.append(self._pool.submit(self._count_replicas))
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._pool.shutdown()
        for user in self._users:
            user.result()

    def dawn(self) -> None:
        """Begin a day. A day that lasts longer than it should has a second noon."""
        self._dawn = time.monotonic()

    def wait(self, share: float) -> None:
        """Wait until this share of the day is over."""
        time.sleep(max(0, self._dawn + share * self._day_s - time.monotonic()))

    def _wanted(self) -> int:
        share = (time.monotonic() - self._dawn) / self._day_s % 1
        if 0.25 <= share < 0.3 or 0.45 <= share < 0.6:
            return 2 * USERS
        return 1 + round((USERS - 1) * (1 - math.cos(2 * math.pi * share)) / 2)

    def _count_replicas(self) -> None:
        while not self._end.wait(1):
            self.replicas.add(len(processes("ServeReplica")))

    def _user(self, place: int) -> None:
        dice = random.Random(f"{self._seed} {place}")
        while not self._end.wait(0.2):
            if place < self._wanted():
                self._ask(dice.randrange(self._documents))

    def _ask(self, number: int) -> None:
        begun = time.monotonic()
        for failures in (self.retried, self.failed):
            pause = 1.0
            try:
                response = self._http.post("/v1/answer", json={"question": question(number)})
                if response.status_code == 200:
                    self.answers.append(Asked(number, begun, time.monotonic(), response.json()))
                    return
                pause = float(response.headers.get("retry-after", pause))
                failures.append(f"{question(number)} {response.status_code}: {response.text[:300]}")
            except httpx.HTTPError as error:
                failures.append(f"{question(number)} {type(error).__name__}: {error}")
            time.sleep(pause)


class Soak:
    """The days, and what was seen of them. `broken` are the promises that did not hold, a sentence each."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, s3: S3Server) -> None:
        self.broken: list[str] = []
        self._arguments, self._folder, self._s3 = arguments, folder, s3
        self._dice = random.Random(arguments.seed)
        self._documents = Documents(arguments.documents, folder)
        self._day_s = arguments.minutes * 60 / arguments.days
        model = write_tiny_model(folder / "tiny", layers=6, hidden=128, feed_forward=192)
        self._settings = {
            "store": f"s3://{s3.bucket}/soak",
            "storage": {"keep_snapshots": KEPT},
            "corpus": {"path": str(folder / "corpus.jsonl")},
            "model": {"name": str(model), "dtype": "float32"},
            "augment": {"generator": "none", "import_file": str(folder / "augmentations.jsonl"), "cloze": False},
            "train": {"learning_rate": 0.01, "epochs": 25},
            "answer": {"mode": "prag", "max_new_tokens": 8},
            "serve": {
                "min_replicas": REPLICAS, "max_replicas": REPLICAS + 1, "target_ongoing_requests": 1,
                "upscale_delay_s": 1, "downscale_delay_s": 10,
                "refresh_s": 1, "negative_ttl_s": 1, "fetch_timeout_s": 10,
            },
            "run": {"profile": "cluster", "actor_cpus": 1, "actor_gpus": 0, "actors_max": 2, "tokens_per_step": 4096},
        }  # fmt: skip
        self._store = Store(str(self._settings["store"]))
        # What was seen.
        self._published: dict[str, Publication] = {}  # by snapshot
        self._away: list[tuple[float, float]] = []  # when the S3 server was away
        self._killed: Counter[str] = Counter()
        self._runs = 0
        self._forgotten: tuple[str, bytes] = ("", b"")  # the key of the passage, and its adapter
        self._memory: list[dict[tuple[str, int, float], int]] = []  # by name, id and start of each process

    def run(self) -> dict[str, Any]:
        """Live the days, check the promises, and return the figures."""
        begun = time.monotonic()
        days, documents = self._arguments.days, self._arguments.documents
        self._prag("run")
        self._publish()
        config = self._folder / "config.yaml"
        config.write_text(yaml.safe_dump(self._settings))
        with (
            Server(config) as server,
            Load(server.url, self._day_s, documents + days * ADDED, self._arguments.seed) as load,
        ):
            each = math.ceil(len(KILLS) / days)
            for day in range(days):
                kills = [KILLS[(day * each + n) % len(KILLS)] for n in range(each)]
                self._day(load, kills, forget=day == days // 2)
                seconds = time.monotonic() - begun
                print(
                    f"{seconds:4.0f} s: day {day + 1}, killed {', '.join(kills)}, {len(load.answers)} answers",
                    flush=True,
                )
        self._prag("gc", "--grace", "0s")
        self._publish()
        self._check_load(load)
        return {
            "days": days,
            "documents": documents,
            "seed": self._arguments.seed,
            "minutes": round((time.monotonic() - begun) / 60, 1),
            "answers": len(load.answers),
            "fallbacks": sum(map(fell_back, load.answers)),
            "retried": len(load.retried),
            "failed": len(load.failed),
            "killed": dict(self._killed),
            "reindex_runs": self._runs,
            "snapshots": len(self._published),
            "replicas": [min(load.replicas), max(load.replicas)],
            "memory": self._check_memory(),
            "storage": self._check_storage(),
            "broken": len(self.broken),
            "machine": machine(),
        }

    # What happens.

    def _day(self, load: Load, kills: list[str], *, forget: bool) -> None:
        load.dawn()
        load.wait(0.5)
        if "replica" in kills:
            max(processes("ServeReplica"), key=lambda replica: replica.create_time()).kill()
            self._killed["replica"] += 1
        load.wait(0.7)
        if forget:
            self._forget()
        self._documents.change(self._dice)
        self._night([kill for kill in kills if kill != "replica"])
        self._prag("gc", "--grace", f"{math.ceil(self._day_s)}s")
        self._publish()
        load.wait(1)
        self._memory.append(memory())

    def _night(self, kills: list[str]) -> None:
        """Re-index, with one of these kills in each run, until a run succeeds and there was each kill."""
        report, kill = None, ""
        while report is None or kills:
            self._promise(kill != "worker" or report, "A re-index failed since its workers were killed.")
            kill = kills.pop(0) if kills else ""
            command = self._start("reindex")
            self._runs += 1
            if kill:
                self._kill(kill, command)
            report = self._report(command)
            if report is None and not kill:
                sys.exit(f"A re-index failed by itself: {command.log.read_text()[-3000:]}")
        self._publish()

    def _kill(self, kill: str, command: Driver) -> None:
        """Kill the workers, the driver or the S3 server of a run, as soon as it trains."""
        wait(lambda: stage_workers(psutil.Process(), TRAIN)[1] or command.ends_within(0), "nothing is trained")
        if kill == "worker":
            for worker in stage_workers(psutil.Process(), TRAIN)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
                    self._killed[kill] += 1
        elif kill == "driver":
            self._killed[kill] += command.kill()
        else:
            gone = time.monotonic()
            self._s3.kill()
            time.sleep(S3_AWAY_S)
            self._s3.start()
            self._away.append((gone, time.monotonic()))
            self._killed[kill] += 1

    def _forget(self) -> None:
        number = self._dice.choice(sorted(self._documents.versions))
        key = self._documents.key(number)
        row = {row.key: row for row in self._ledger()}[key]
        adapter = self._store.get(row.shard)[row.offset : row.offset + row.length]
        self._forgotten = key, adapter
        self._documents.forgotten.add(number)
        self._prag("forget", f"d{number}")
        self._publish()

    def _publish(self) -> None:
        """Note what each answer must be from now on."""
        self._published.setdefault(
            load_snapshot(self._store).id, Publication(time.monotonic(), self._documents.marks())
        )

    def _start(self, *command_line: str) -> Driver:
        return Driver(self._settings, {}, self._folder, *command_line)

    def _prag(self, *command_line: str) -> dict[str, Any]:
        command = self._start(*command_line)
        if (report := self._report(command)) is None:
            sys.exit(f"prag {' '.join(command_line)} failed: {command.log.read_text()[-3000:]}")
        return report

    def _report(self, command: Driver) -> dict[str, Any] | None:
        wait(lambda: command.ends_within(0.1), f"a command does not end: {command.log}")
        return command.report()

    # What must hold.

    def _promise(self, holds: object, otherwise: str) -> None:
        if not holds:
            self.broken.append(otherwise)

    def _check_load(self, load: Load) -> None:
        wrong = wrong_answers(load.answers, self._published, self._away)
        self._promise(load.answers, "Nothing was answered.")
        self._promise(not wrong, f"{len(wrong)} answers were wrong, such as {wrong[:3]}.")
        self._promise(not load.failed, f"{len(load.failed)} questions failed twice, such as {load.failed[:3]}.")
        for kill in KILLS:
            self._promise(self._killed[kill], f"Nothing was killed as {kill}.")
        self._promise(max(load.replicas) > REPLICAS, "No replica was added, whatever the load.")

    def _check_memory(self) -> dict[str, list[int]]:
        """Compare the processes that lived from the first day's end to the last's; return their megabytes by day."""
        megabytes = {}
        for name, *which in sorted(self._memory[0].keys() & self._memory[-1].keys()):
            days = [sizes[name, *which] for sizes in self._memory if (name, *which) in sizes]
            megabytes[f"{name} {which[0]}"] = [round(size / 1e6) for size in days]
            grown = days[-1] > days[0] * self._arguments.memory and name.startswith(SERVICE)
            self._promise(not grown, f"The memory of {name} grew: {megabytes[f'{name} {which[0]}']} MB after each day.")
        return megabytes

    def _check_storage(self) -> float:
        """Check what is left in the store; return its bytes as a multiple of what the kept snapshots need."""
        left = self._prag("gc", "--dry-run", "--grace", "0s")["objects"]
        self._promise(not left, f"After gc there are still {left[:3]}.")
        verified = self._start("verify", "--full")
        self._promise(self._report(verified), f"prag verify --full found damage: {verified.log.read_text()[-1000:]}")
        store, sizes = self._store, {item.name: item.size_bytes for item in self._store.objects()}
        # 1. No orphan, found without gc's own eyes.
        rows = self._ledger()
        shards = {*store.list("adapters", ".safetensors")}
        orphans = shards - {row.shard for row in rows}
        self._promise(not orphans, f"No ledger part names {sorted(orphans)}.")
        # 2. The forgotten passage is in no part and in no shard.
        key, adapter = self._forgotten
        records = {"corpus": Passage, "adapters": LedgerRow, "augmentations": Augmentation, "rejects": Reject}
        for folder, record in records.items():
            keys = store.get_table(record, store.list(folder, ".parquet"), ["key"])["key"].to_pylist()
            self._promise(key not in keys, f"The forgotten passage {key} is still in {folder}.")
        holding = [name for name in shards if adapter in store.get(name)]
        self._promise(adapter and not holding, f"The forgotten passage's adapter is still in {holding}.")
        # 3. Hardly more than what the kept snapshots need.
        needed, keys = {"CURRENT"}, set()
        for snapshot in (load_snapshot(store, id) for id in snapshots_to_keep(store, KEPT)[0]):
            corpus, index = f"corpus/{snapshot.corpus_version}/", f"indexes/{snapshot.index}/"
            needed |= {document_name(snapshot.id), *names_of(snapshot)}
            needed |= {name for name in sizes if name.startswith((corpus, index))}
            keys |= {*store.get_table(Passage, store.list(corpus, ".parquet"), ["key"])["key"].to_pylist()}
        adapters = {row.key: row.length for row in rows if row.key in keys}
        share = sum(sizes.values()) / (sum(sizes[name] for name in needed) + sum(adapters.values()))
        self._promise(share <= STORAGE, f"The store has {share:.2f} times the bytes that its kept snapshots need.")
        return round(share, 3)

    def _ledger(self) -> list[LedgerRow]:
        """Return all rows; of several with one key the last counts."""
        rows = from_table(LedgerRow, self._store.get_table(LedgerRow, self._store.list("adapters", ".parquet")))
        return sorted(rows, key=lambda row: row.created)


def wrong_answers(
    answers: Sequence[Asked], published: Mapping[str, Publication], away: Sequence[tuple[float, float]]
) -> list[str]:
    """Return what is wrong with answers, each judged by the snapshot that it names.

    Args:
        answers: The answers.
        published: The snapshots by id, in the order in which they came into service.
        away: When the store was away. Until soon after that, and only then, a passage may take its adapter's place.
    """
    ids, wrong = [*published], []
    for asked in answers:
        id, says = asked.answer["snapshot"], asked.answer["answer"]
        said = f"{question(asked.number)} {says!r} from {id}"
        if id not in published:
            wrong.append(f"{said}, which nobody published")
            continue
        for later in ids[ids.index(id) + 1 :][:1]:
            seconds = asked.begun - published[later].known
            if seconds > SETTLE_S:
                wrong.append(f"{said}, {seconds:.0f} s after the next snapshot")
        expected = published[id].marks.get(asked.number)
        if expected is None:
            if asked.answer["passages"] or any(says == other.marks.get(asked.number) for other in published.values()):
                wrong.append(f"{said}, which does not have the passage")
        elif fell_back(asked):
            if not any(gone < asked.ended and asked.begun < back + SETTLE_S for gone, back in away):
                wrong.append(f"{said}, without its adapter")
        elif says != expected:
            wrong.append(f"{said}, not {expected!r}")
    return wrong


def fell_back(asked: Asked) -> bool:
    return any(passage["fallback"] for passage in asked.answer["passages"])


def processes(named: str) -> list[psutil.Process]:
    """Return the processes below this one whose command line has a text."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if named in " ".join(process.cmdline()):
                found.append(process)
    return found


def memory() -> dict[tuple[str, int, float], int]:
    """Return the bytes that each process below this one has for itself, but for the S3 server's."""
    sizes = {}
    for process in processes(""):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            name = next((word for word in words if word.endswith(".py")), words[0] if words else "")
            if "pipelines.cli" in words:
                name = "prag serve"
            # Ray adds the method that an actor runs at the moment.
            name = name.partition(".")[0] if name.startswith("ray::") else Path(name).name
            if name != "weed":
                sizes[name, process.pid, process.create_time()] = process.memory_full_info().uss
    return sizes


if __name__ == "__main__":
    main()
