"""Compare serving with vLLM on this machine: `python benchmarks/peers.py --vllm COMMAND`.

COMMAND is vLLM's command in an environment of its own; arguments of `vllm serve` may follow. Both serve the same model
in the same dtype and get the same prompts as token ids, greedy, all answers of the same number of tokens. There are as
many sets of passages as `--adapters` says, drawn by Zipf's law for each question. Factors are random, since only time
is measured and whether both give the same text.

- ours, k = 3: the three adapters of a set (rank 2) are fetched from a real S3 server on demand and summed.
- vLLM, k = 3: it takes one adapter a request, so each set is one adapter of rank 6, padded to 8, in a folder on this
  machine, which its API loads when the set is asked for first.
- k = 1: one adapter of rank 2 each; vLLM's lowest rank above 1 is 8, so it is padded too.
- bare: no adapter; vLLM both with adapters enabled and without.

Rounds alternate between ours and vLLM's. A server of vLLM is stopped (SIGSTOP) while it is not its turn: for a second
after an answer its threads go on spinning, and would take the processor from whoever comes next. `x_update` is the time
from a set that was not asked for before to its first token; vLLM's includes writing the set's adapter from the three,
since nobody can have written all sets beforehand. The last line is JSON.

`equal_answers` is the share of answers that are the same text, after both are cleaned as ours are (no leading colon or
white space). Two right decoders in bf16 differ where the two best tokens are about as good, so the margin of vLLM's
first token that differs is printed for each other answer. Where margins are large, the two do not compute the same, and
no other figure counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from measure import machine
from serve import make_passages, publish_all

from prag_core.config import Config
from prag_core.config_file import parse_config
from prag_core.inference.adapter_cache import AdapterCache
from prag_core.inference.loaded_snapshot import LoadedSnapshot, open_snapshot
from prag_core.inference.request import Request
from prag_core.inference.service import Service
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors
from prag_core.llm.peft import export_peft, peft_base
from prag_core.llm.threads import compute_elsewhere
from prag_core.prompts import final_answer
from prag_core.records import Hit, Passage
from prag_core.store.objects import open_store
from prag_core.store.snapshot import current_id, load_snapshot

ROOT = Path(__file__).parent.parent
K = 3
VLLM_RANK = 8
START_S = 900.0
NEW_SETS = 12


@dataclass
class Measured:
    """What requests took: `first` are seconds to the first token, `whole` to the last."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


# Asks one prompt about a set (None: the bare model), and returns the seconds to the first token and the text.
Ask = Callable[[int, int | None], Awaitable[tuple[float, str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="COMMAND", help="vLLM's command, with its arguments")
    parser.add_argument("--model", default=None, help="the model; by default the packaged one")
    parser.add_argument("--adapters", type=int, default=200, help="sets of passages")
    parser.add_argument("--users", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=52, help="words of a question")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, which alternate")
    parser.add_argument("--answers", type=int, default=2, help="answers of each user in a round")
    options = parser.parse_args()
    sys.path.append(str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(options, Path(scratch))))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tests.helpers.s3 import S3Server

    with S3Server(folder / "s3", "prag-bench", secrets.token_hex(16)) as server:
        os.environ.update(server.environment)
        config = parse_config(
            {
                "store": f"s3://{server.bucket}/peers",
                "corpus": {"path": "none.jsonl"},
                "model": {"name": options.model} if options.model else {},
                "augment": {"generator": "none"},
                "answer": {"max_new_tokens": options.new_tokens},
                "serve": {"max_tokens": max(256, options.new_tokens)},
            }
        )
        compute_elsewhere()  # the service's decoding thread is the one that computes
        base = load_base_model(config.model)
        print(f"{machine(base.device)}, {base.model.dtype}; {base.name}")
        _, layout = publish_all(base, config, options.adapters + K, folder)
        ours = Ours(base, config, options, layout)
        try:
            return asyncio.run(compare(options, ours, folder))
        finally:
            ours.service.close()


async def compare(options: argparse.Namespace, ours: Ours, folder: Path) -> dict[str, Any]:
    prompts = ours.prompts()
    print(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {options.new_tokens} new ones")
    async with vllm_server(options, ours, folder, lora=True) as lora, vllm_server(options, ours, folder) as plain:
        sides: dict[str, tuple[Ask, bool, Theirs | None]] = {
            "ours": (ours.asking(K), True, None),
            "vllm": (lora.asking(prompts, K), True, lora),
            "ours_k1": (ours.asking(1), True, None),
            "vllm_k1": (lora.asking(prompts, 1), True, lora),
            "ours_bare": (ours.asking(0), False, None),
            "vllm_bare": (plain.asking(prompts, 0), False, plain),
            "vllm_bare_lora_enabled": (lora.asking(prompts, 0), False, lora),
        }
        # Its adapters lie in folders beforehand; only a set that is new (`new_sets`) has to be written in time.
        for one in range(options.adapters):
            for k in (1, K):
                lora.write(one, k)
        for ask, adapted, server in sides.values():  # the first requests compile and allocate
            with awake(server):
                await rate(ask, 1, 1, options, random.Random(0), adapted)
        found: dict[str, dict[int, list[Measured]]] = {name: {users: [] for users in options.users} for name in sides}
        for turn in range(options.rounds):
            for users in options.users:
                answers = options.answers * (2 if users == 1 else 1)
                for name, (ask, adapted, server) in sides.items():
                    draw = random.Random(1000 * turn + users)  # the same sets for all sides
                    with awake(server):
                        found[name][users].append(await rate(ask, users, answers, options, draw, adapted))
                told = ", ".join(f"{name} {found[name][users][-1].rate:.1f}" for name in sides)
                print(f"round {turn + 1}, {users} users, tokens/s: {told}", flush=True)
        new = await new_sets(ours, lora, prompts, options)
        same, margins = await equal(ours, lora, prompts)
        memory = {"ours": rss_mb(os.getpid()), "vllm": lora.rss_mb(), "vllm_bare": plain.rss_mb()}
    rates = {
        name: {str(users): round(statistics.median(m.rate for m in rounds), 1) for users, rounds in by_users.items()}
        for name, by_users in found.items()
    }
    most = str(max(options.users))
    return {
        "tok_s": rates,
        "ttft_ms": _milliseconds(found, lambda m: m.first, 0.5),
        "latency_p50_ms": _milliseconds(found, lambda m: m.whole, 0.5),
        "latency_p95_ms": _milliseconds(found, lambda m: m.whole, 0.95),
        f"x_tok_s_{most}": round(rates["ours"][most] / rates["vllm"][most], 2),
        f"x_vllm_bare_{most}": round(rates["ours"][most] / rates["vllm_bare"][most], 2),
        f"x_bare_{most}": round(rates["ours_bare"][most] / rates["vllm_bare"][most], 2),
        "x_update": round(new["vllm"] / new["ours"], 1),
        "new_set_ms": {name: round(1e3 * seconds, 1) for name, seconds in new.items()},
        "equal_answers": same,
        "margins_where_they_differ": margins,
        "memory_mb": memory,
        "vllm_settings": lora.command[1:],
        "machine": f"{machine(ours.base.device)}, {ours.base.model.dtype}",
    }


def _milliseconds(
    found: dict[str, dict[int, list[Measured]]], which: Callable[[Measured], list[float]], share: float
) -> dict[str, dict[str, float]]:
    return {
        name: {
            str(users): round(1e3 * float(torch.tensor([s for m in rounds for s in which(m)]).quantile(share)), 1)
            for users, rounds in by_users.items()
        }
        for name, by_users in found.items()
    }


async def rate(
    ask: Ask, users: int, answers: int, options: argparse.Namespace, draw: random.Random, adapted: bool
) -> Measured:
    """Let some users ask one question after the other, each about a set that is drawn by Zipf's law."""
    measured = Measured()
    popularity = [1 / (rank + 1) for rank in range(options.adapters)]

    async def user(chosen: Sequence[int]) -> None:
        for one in chosen:
            begun = time.perf_counter()
            first, _ = await ask(one, one if adapted else None)
            measured.first.append(first)
            measured.whole.append(time.perf_counter() - begun)
            measured.tokens += options.new_tokens

    wanted = [draw.choices(range(options.adapters), popularity, k=answers) for _ in range(users)]
    begun = time.perf_counter()
    await asyncio.gather(*map(user, wanted))
    measured.seconds = time.perf_counter() - begun
    return measured


async def new_sets(
    ours: Ours, theirs: Theirs, prompts: Sequence[Sequence[int]], options: argparse.Namespace
) -> dict[str, float]:
    """Return the median seconds from a set that nobody has asked for to its first token."""
    ours_s, theirs_s = [], []
    for one in range(0, options.adapters, K):
        if len(ours_s) == NEW_SETS or any(one + n in ours.fetched for n in range(K)) or one in theirs.loaded[K]:
            continue
        ours_s.append((await ours.asking(K)(one, one))[0])
        with awake(theirs):
            begun = time.perf_counter()
            theirs.write(one, K)
            first, _ = await theirs.asking(prompts, K)(one, one)
            theirs_s.append(first + time.perf_counter() - begun - theirs.last_answer_s)
    return {"ours": statistics.median(ours_s), "vllm": statistics.median(theirs_s)}


async def equal(ours: Ours, theirs: Theirs, prompts: Sequence[Sequence[int]]) -> tuple[float, list[float]]:
    """Return the share of answers that are the same text; where they differ, the margin of vLLM's first other token."""
    same, margins = 0, []
    for one in range(16):
        _, text = await ours.asking(K)(one, one)
        with awake(theirs):
            await theirs.load(one, K)
            tokens, their_margins = await theirs.explained(prompts[one], theirs.name(one, K))
        begun = [ours.cleaned(tokens[:length]) for length in range(len(tokens) + 1)]
        if text == begun[-1]:
            same += 1
        else:
            # The tokens before it that wrote nothing, such as the end of a turn, may be the ones that differ.
            other = next((n for n, beginning in enumerate(begun) if not text.startswith(beginning)), len(tokens))
            margins.append(round(min(their_margins[begun.index(begun[other - 1]) : other]), 3))
    return round(same / 16, 3), margins


class Ours:
    """The service of this project, in this process, with adapters on S3 and no disk cache."""

    def __init__(self, base: BaseModel, config: Config, options: argparse.Namespace, layout: LoraLayout) -> None:
        self.base, self.config, self.options, self.layout = base, config, options, layout
        store = open_store(config)
        self.opened: LoadedSnapshot = open_snapshot(base, config, store, load_snapshot(store))
        self.passages = make_passages(options.adapters + K)
        self.fetched: set[int] = set()
        settings = config.serve
        cache = AdapterCache(settings.cache_bytes, dtype=base.model.dtype, threads=settings.fetch_threads)
        self.service = Service(base, lambda id: self.opened, lambda: current_id(store), cache, settings)

    def members(self, one: int, k: int) -> list[Passage]:
        """Return the passages of a set."""
        return self.passages[one : one + k]

    def request(self, one: int, k: int) -> Request:
        words = " ".join(self.passages[one].text.split()[: self.options.prompt_words])
        hits = tuple(Hit(passage, 1.0) for passage in self.members(one, k))
        mode = "prag" if k else "closed"
        return Request(words, mode, max(k, 1), "sum", hits, ignore_eos=True, max_new_tokens=self.options.new_tokens)

    def prompts(self) -> list[list[int]]:
        """Return the token ids of each set's prompt, as the service writes them."""
        processor = self.opened.processor
        closed = [replace(self.request(one, 0), hits=()) for one in range(self.options.adapters)]
        return [list(processor.build(processor.search(request), {}, {}).decode.prompt) for request in closed]

    def cleaned(self, tokens: Sequence[int]) -> str:
        """Return the answer that the service makes of these tokens."""
        return final_answer(self.base.tokenizer.decode(tokens, skip_special_tokens=True))

    def asking(self, k: int) -> Ask:
        async def ask(prompt: int, one: int | None) -> tuple[float, str]:
            begun = time.perf_counter()
            if one is not None:
                self.fetched |= set(range(one, one + k))
            answer = await self.service.answer(self.request(prompt, k))
            used = sum(passage.in_weights for passage in answer.passages)
            if used != (k if one is not None else 0) or answer.new_tokens != self.options.new_tokens:
                raise RuntimeError(f"{used} adapters and {answer.new_tokens} tokens: {answer}")
            # What comes after the first token is the time of decoding. A stream would not send leading white space.
            return time.perf_counter() - begun - answer.milliseconds["decode"] / 1e3, answer.text

        return ask


class Theirs:
    """A server of vLLM. `loaded` are the sets that it has loaded, by k."""

    def __init__(
        self, command: list[str], url: str, process: subprocess.Popen[bytes], ours: Ours, folder: Path
    ) -> None:
        self.command, self.process, self.folder = command, process, folder
        self.last_answer_s = 0.0
        self._ours, self._source = ours, ours.opened.source
        self._base = peft_base(ours.config.model.name)
        self._client = httpx.AsyncClient(base_url=url, timeout=600.0, trust_env=False)
        self.loaded: dict[int, set[int]] = {1: set(), K: set()}
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        await self._client.aclose()

    def name(self, one: int, k: int) -> str:
        return f"set{one}-{k}"

    def write(self, one: int, k: int) -> None:
        """Write a set as one PEFT adapter: factors side by side, padded with zeros to vLLM's rank."""
        layout = self._ours.layout
        members = [self._source.get(passage.key) for passage in self._ours.members(one, k)]
        wide = replace(layout, rank=VLLM_RANK)
        export_peft(wide, beside(layout, members), self.folder / self.name(one, k), self._base)

    async def load(self, one: int, k: int) -> None:
        """Have the server load a set once, when it is asked for first; different sets do not wait for each other."""
        name = self.name(one, k)
        if name not in self._loads:
            self._loads[name] = asyncio.create_task(self._load(name))
            self.loaded[k].add(one)
        await self._loads[name]

    async def _load(self, name: str) -> None:
        body = {"lora_name": name, "lora_path": str(self.folder / name)}
        (await self._client.post("/v1/load_lora_adapter", json=body)).raise_for_status()

    def asking(self, prompts: Sequence[Sequence[int]], k: int) -> Ask:
        async def ask(prompt: int, one: int | None) -> tuple[float, str]:
            begun, first, text = time.perf_counter(), 0.0, ""
            if one is not None:
                await self.load(one, k)
            body = self._body(prompts[prompt], "base" if one is None else self.name(one, k))
            async with self._client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - begun
                        text += json.loads(line[6:])["choices"][0]["text"]
            self.last_answer_s = time.perf_counter() - begun
            return first, text

        return ask

    async def explained(self, prompt: Sequence[int], name: str) -> tuple[list[int], list[float]]:
        """Return the tokens of a greedy answer, and for each its margin over the second best."""
        body = {**self._body(prompt, name), "logprobs": 2, "return_token_ids": True}
        reply = await self._client.post("/v1/completions", json=body)
        choice = reply.raise_for_status().json()["choices"][0]
        best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        return choice["token_ids"], [values[0] - values[1] if len(values) > 1 else 0.0 for values in best]

    def _body(self, prompt: Sequence[int], name: str) -> dict[str, Any]:
        tokens = self._ours.options.new_tokens
        return {"model": name, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def rss_mb(self) -> int:
        return sum(rss_mb(process.pid) for process in self.processes())


@contextmanager
def awake(server: Theirs | None) -> Iterator[None]:
    """Let a server run, and stop it again."""
    if server is None:
        yield
        return
    os.killpg(server.process.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGSTOP)


def beside(layout: LoraLayout, members: Sequence[Factors]) -> dict[str, torch.Tensor]:
    """Return the adapter whose product is the sum of the products of some adapters, padded to vLLM's rank."""
    made = {}
    for name in layout.tensor_shapes:
        axis = 1 if name.endswith(".A") else 2
        joined = torch.cat([factors[name].float() for factors in members], axis)
        shape = list(joined.shape)
        shape[axis] = VLLM_RANK - joined.shape[axis]
        made[name] = torch.cat([joined, torch.zeros(shape)], axis)
    return made


@asynccontextmanager
async def vllm_server(
    options: argparse.Namespace, ours: Ours, folder: Path, *, lora: bool = False
) -> AsyncIterator[Theirs]:
    """Start a server of vLLM and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dtype = str(ours.base.model.dtype).removeprefix("torch.")
    model = str(resolve_model(ours.config.model.name))
    command = [*shlex.split(options.vllm), "serve", model, "--served-model-name", "base", "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    command += ["--max-num-seqs", str(max(options.users))]
    if lora:
        command += ["--enable-lora", "--max-lora-rank", str(VLLM_RANK), "--max-loras", str(max(options.users))]
        command += ["--max-cpu-loras", str(2 * options.adapters)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    log = folder / f"vllm-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    theirs = Theirs(command, f"http://127.0.0.1:{port}", process, ours, folder)
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM does not start: {log.read_text(errors='replace')[-2000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0, trust_env=False).is_success:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(1.0)
        os.killpg(process.pid, signal.SIGSTOP)
        yield theirs
    finally:
        await theirs.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rss_mb(pid: int) -> int:
    return round(psutil.Process(pid).memory_info().rss / 1e6)


if __name__ == "__main__":
    main()
