"""The service answers each request as if it were alone, from one snapshot, whatever else happens."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prag_core.config_file import parse_config
from prag_core.errors import (
    DeadlineError,
    EngineStuckError,
    GenerationError,
    NotFiniteError,
    OverloadedError,
    PromptTooLongError,
    RetrievalError,
    StoreError,
)
from prag_core.inference.detokenizer import StreamingDetokenizer
from prag_core.inference.engine import Engine
from prag_core.inference.loaded_snapshot import open_snapshot
from prag_core.inference.processor import Found, PreparedRequest, RequestProcessor
from prag_core.inference.request import Request
from prag_core.inference.service import Service
from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import DecodeRequest
from prag_core.llm.decoder import Decoder
from prag_core.llm.lora import Injector
from prag_core.prompts import final_answer
from prag_core.recipe import RECIPES
from prag_core.records import MODES, Answer, Hit, Route
from prag_core.store.adapters import LedgerSource
from prag_core.store.snapshot import load_snapshot, publish, with_ledger, with_route, with_tombstones
from tests.helpers.adapters import random_flat
from tests.helpers.scripted_model import follow, with_tokens
from tests.helpers.serving import LETTERS, PASSAGES, ByNumber, Hold, World, held, marker_adapter, named

RECIPE = RECIPES["recall"]


@pytest.fixture(scope="module")
def world(tiny_session: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tiny_session, tmp_path_factory.mktemp("world"))
    made.publish()
    return made


@pytest.fixture
def service(world: World) -> Iterator[Service]:
    with world.service() as made:
        yield made


def random_requests(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            f"{'x' * rng.randint(1, 60)} of {named(rng.sample(range(len(PASSAGES)), 3))}",
            rng.choice(MODES),
            rng.randint(1, 3),
            rng.choice(["sum", "mean", "score"]),
            max_new_tokens=rng.randint(1, 9),
            temperature=rng.choice([0.0, 0.0, 1.5]),
            top_p=rng.choice([1.0, 0.8]),
            seed=rng.randrange(100),
            stop=rng.choice([(), ("e", "0")]),
            history=rng.choice([(), (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"))]),
        )
        for _ in range(count)
    ]


async def answers(service: Service, requests: list[Request], at_once: int = 16) -> list[Answer]:
    """Answer the requests of this many users, each of whom waits for an answer before the next question."""
    gate = asyncio.Semaphore(at_once)

    async def ask(request: Request) -> Answer:
        async with gate:
            return await service.answer(request)

    return await asyncio.gather(*map(ask, requests))


async def collect(pieces) -> list[object]:
    return [piece async for piece in pieces]


def same(answer: Answer) -> tuple[object, ...]:
    return answer.question, answer.mode, answer.text, answer.passages, answer.new_tokens, answer.finish, answer.snapshot


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# --- a row is its own -------------------------------------------------------------------------------------------


class Weak:
    """Adapters that change the model only a little, so that all logits matter."""

    def __init__(self, injector: Injector) -> None:
        self.layout = injector.layout

    def prepared(self, processor: RequestProcessor, request: Request) -> PreparedRequest:
        found = processor.search(request)
        numbers = {passage.key: n for n, passage in enumerate(PASSAGES)}
        adapters = {h.passage.key: random_flat(self.layout, numbers[h.passage.key]) for h in found.hits}
        return processor.build(found, adapters, {})


def logits_of(base: BaseModel, injector: Injector, prepared: list[PreparedRequest], slots: int) -> list[torch.Tensor]:
    """Return the logits `[tokens, vocabulary]` by which each request's tokens were chosen."""
    seen: list[torch.Tensor] = []
    # The forward passes that choose tokens have one column, and give each live row's event in order.
    handle = base.model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[:, -1].clone()))
    decoder = Decoder(base, injector, slots=slots, prefill_chunk=64)
    rows: dict[int, list[torch.Tensor]] = {decoder.submit(item.decode): [] for item in prepared}
    while decoder.busy:
        events = decoder.step()
        # A step that only reads prompts chooses nothing.
        for event, row in zip(events, seen[-1] if events else (), strict=False):
            rows[event.id].append(row)
    handle.remove()
    return [torch.stack(row) for row in rows.values()]


def test_each_row_of_a_mixed_batch_has_the_logits_that_it_has_alone(tiny_session: BaseModel) -> None:
    injector = Injector(tiny_session.model, RECIPE)
    processor = RequestProcessor(tiny_session, ByNumber())
    weak = Weak(injector)
    prepared = [weak.prepared(processor, replace(r, temperature=0.0, stop=())) for r in random_requests(24, seed=1)]
    together = logits_of(tiny_session, injector, prepared, slots=7)
    for item, logits in zip(prepared, together, strict=True):
        alone = logits_of(tiny_session, injector, [item], slots=1)[0]
        assert logits.shape == alone.shape
        assert (logits - alone).abs().max() < 1e-4
    injector.close()


def test_a_served_answer_equals_the_engines(world: World, service: Service) -> None:
    opened = world.open()
    requests = random_requests(60, seed=2)
    served = asyncio.run(answers(service, requests))
    engine = Engine(world.base, opened.recipe, opened.processor, opened.source)
    alone = [engine.answer(request) for request in requests]
    engine.close()
    assert [same(answer) for answer in served] == [same(answer) for answer in alone]
    assert len({answer.text for answer in served}) > 30


def test_auto_in_the_service_follows_the_thresholds_of_its_snapshot(tiny_session: BaseModel, tmp_path: Path) -> None:
    world = World(tiny_session, tmp_path)
    plain = world.publish(count=4)  # the other passages have no adapter
    route = Route(closed_below=2.0, prag_score=9.5, prag_next=0.95, otherwise="rag")
    # Passages score 10, 9, … in the order in which they are named.
    requests = [Request(question, "auto", 1) for question in ("Who?", named([7, 1]), named([2, 3]), named([1]))]
    with world.service() as service:
        before = asyncio.run(answers(service, requests))
        publish(world.store, with_route(plain, route))
        assert asyncio.run(service.refresh())
        after = asyncio.run(answers(service, requests))
        direct = asyncio.run(answers(service, [replace(r, mode=a.mode) for r, a in zip(requests, after, strict=True)]))
        assert service.stats().requests == {
            ("auto", "ok"): 8, ("closed", "ok"): 1, ("rag", "ok"): 1, ("prag", "ok"): 2
        }  # fmt: skip
        assert service.stats().cache.pinned_bytes == 0
    assert [answer.mode for answer in before] == ["closed", "rag", "combine", "combine"]
    assert all("no thresholds were fitted" in answer.why for answer in before)
    assert [answer.mode for answer in after] == ["closed", "rag", "prag", "prag"]
    assert "1.1 times the next one" in after[2].why
    assert [same(answer) for answer in after] == [same(answer) for answer in direct]
    assert after[2].text == LETTERS[2] * 4
    opened = world.open()
    engine = Engine(world.base, opened.recipe, opened.processor, opened.source)
    assert [same(engine.answer(request)) for request in requests] == [same(answer) for answer in after]
    engine.close()


@pytest.mark.slow
def test_no_answer_uses_the_adapters_of_another_request(world: World) -> None:
    """While slots are reused and adapters are evicted and loaded again, each answer is its own passage's letter."""
    rng = random.Random(3)
    asked = [(rng.randrange(62), rng.choice(["prag", "prag", "combine", "closed"])) for _ in range(1000)]
    requests = [Request(named([n]), mode, 1, max_new_tokens=rng.randint(1, 5)) for n, mode in asked]
    one = world.open().source.row(PASSAGES[0].key).length
    with world.service(slots=8, cache_bytes=10 * one, max_queue=100) as service:
        got = asyncio.run(answers(service, requests, at_once=40))
        stats = service.stats()
    for (n, mode), request, answer in zip(asked, requests, got, strict=True):
        if mode == "closed":
            assert not answer.passages
        else:
            assert answer.text == LETTERS[n] * (request.max_new_tokens or 0)
            assert [p.title for p in answer.passages if p.in_weights] == [PASSAGES[n].title]
    assert stats.cache.evictions > 100
    assert stats.requests == {(mode, "ok"): sum(m == mode for _, m in asked) for mode in ("prag", "combine", "closed")}
    assert (stats.open, stats.waiting, stats.running, stats.cache.pinned_bytes) == (0, 0, 0, 0)


def test_an_adapter_that_was_evicted_and_loaded_again_gives_the_same_answer(world: World) -> None:
    requests = [Request(named([n, n + 1]), "prag", 2) for n in (1, 20, 40, 1, 20, 40)]
    with world.service(cache_bytes=0) as small, world.service() as large:
        first = asyncio.run(answers(large, requests))
        second = asyncio.run(answers(small, requests, at_once=1))
        assert [same(answer) for answer in first] == [same(answer) for answer in second]
        assert small.stats().cache.evictions == small.stats().cache.misses == 12
        assert small.stats().cache.size_bytes == 0
        assert large.stats().cache.misses == 6
        assert large.stats().cache.hits == 6


# --- what cannot be had ------------------------------------------------------------------------------------------


def test_a_late_adapter_leaves_its_passage_in_the_prompt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    read = LedgerSource.read

    def slow(self: LedgerSource, row):
        if row.key == PASSAGES[1].key:
            let_go.wait()
        return read(self, row)

    monkeypatch.setattr(LedgerSource, "read", slow)
    with world.service(fetch_timeout_s=0.5) as service:
        late = asyncio.run(service.answer(Request(named([0, 1]), "prag", 2)))
        let_go.set()
        assert [(p.in_weights, p.in_prompt) for p in late.passages] == [(True, False), (False, True)]
        assert late.passages[1].note == f"adapter {PASSAGES[1].key}: was not loaded within 0.5 s"
        assert service.stats().fallbacks == 1
        asyncio.run(until(lambda: service.stats().cache.entries == 2))
        there = asyncio.run(service.answer(Request(named([0, 1]), "prag", 2)))
        assert all(p.in_weights and not p.in_prompt for p in there.passages)


def test_a_damaged_adapter_fails_no_request(tiny_session: BaseModel, tmp_path) -> None:
    world = World(tiny_session, tmp_path)
    world.publish(count=4)
    row = world.open().source.row(PASSAGES[2].key)
    shard = tmp_path / "store" / row.shard
    data = bytearray(shard.read_bytes())
    data[row.offset + 5] ^= 1
    shard.write_bytes(data)
    with world.service() as service:
        answer = asyncio.run(service.answer(Request(named([2, 1, 50]), "prag", 3)))
        notes = [passage.note for passage in answer.passages]
        assert "checksum" in notes[0]
        assert notes[1] == ""
        assert "the snapshot has none" in notes[2]
        assert answer.text == LETTERS[1] * 4
        failures = service.stats().cache.failures
        asyncio.run(service.answer(Request(named([2]), "prag", 1)))
        assert service.stats().cache.failures == failures == 1  # it is remembered


def test_hidden_passages_are_not_used(tiny_session: BaseModel, tmp_path) -> None:
    world = World(tiny_session, tmp_path)
    publish(world.store, with_tombstones(world.publish(count=4), [PASSAGES[0].key]))
    with world.service() as service:
        answer = asyncio.run(service.answer(Request(named([0, 1, 2, 3]), "combine", 2)))
        assert [p.title for p in answer.passages] == [PASSAGES[1].title, PASSAGES[2].title]
        given = Request(named([0]), "rag", hits=(Hit(PASSAGES[0], 1.0),))
        assert asyncio.run(service.answer(given)).passages == ()


def test_a_running_service_stops_using_what_is_forgotten(tiny_session: BaseModel, tmp_path) -> None:
    world = World(tiny_session, tmp_path)
    first = world.publish(count=3)
    asked = Request(named([0, 1]), "combine", 1)

    async def forget_while_it_runs(service: Service) -> list[str]:
        before = await service.answer(asked)
        publish(world.store, with_tombstones(first, [PASSAGES[0].key]))
        assert await service.refresh()
        after = await service.answer(asked)
        return [passage.title for answer in (before, after) for passage in answer.passages]

    with world.service() as service:
        assert asyncio.run(forget_while_it_runs(service)) == [PASSAGES[0].title, PASSAGES[1].title]


def test_passages_that_the_asker_may_not_read_are_not_used(world: World) -> None:
    """The best two of four passages are for other askers; they do not count among the top k, in any mode."""
    tags = {0: ("hr",), 1: ("board", "hr"), 2: (), 3: ("it",)}

    class Tagged(ByNumber):
        def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
            hits = super().search(question, top_k, min_score)
            return [Hit(replace(h.passage, access=tags[PASSAGES.index(h.passage)]), h.score) for h in hits]

    processor = RequestProcessor(world.base, Tagged(), max_new_tokens=4)
    engine = Engine(world.base, RECIPE, processor, world.open().source)
    seen = {None: [0, 1], frozenset(): [2], frozenset({"it"}): [2, 3], frozenset({"board", "x"}): [1, 2]}
    for access, numbers in seen.items():
        for mode in ("rag", "prag", "combine"):
            request = Request(named([0, 1, 2, 3]), mode, 2, access=access)
            assert [p.title for p in engine.answer(request).passages] == [PASSAGES[n].title for n in numbers]
            # Asked again when it is fetched: what somebody hands in is no way around it.
            given = replace(request, hits=tuple(Tagged().search(request.question, 4)))
            assert len(engine.answer(given).passages) == sum(
                access is None or not held or not access.isdisjoint(held) for held in tags.values()
            )
    handed = tuple(Tagged().search(named([0, 1, 2]), 3))
    built = processor.build(Found(Request("Who?", "rag", access=frozenset()), handed, "rag"), {}, {})
    assert [p.title for p in built.passages] == [PASSAGES[2].title]
    # A tag is the same however its letters are composed.
    accented = (Hit(replace(PASSAGES[0], access=("cafe\u0301",)), 1.0),)
    built = processor.build(Found(Request("Who?", "rag", access=frozenset({"caf\u00e9"})), accented, "rag"), {}, {})
    assert [p.title for p in built.passages] == [PASSAGES[0].title]
    engine.close()


def test_without_relevant_passages_no_adapter_is_used(service: Service) -> None:
    answer = asyncio.run(service.answer(Request(named([3, 4]), "prag", 2, min_score=9.5)))
    assert [p.title for p in answer.passages] == [PASSAGES[3].title]
    nothing = asyncio.run(service.answer(Request(named([3, 4]), "prag", 2, min_score=99.0)))
    closed = asyncio.run(service.answer(Request(named([3, 4]), "closed")))
    assert (nothing.passages, nothing.text) == ((), closed.text)


# --- streaming, cancelling, deadlines, the queue -------------------------------------------------------------------


def test_the_pieces_of_a_stream_are_the_answer(world: World, service: Service) -> None:
    async def stream(request: Request) -> tuple[list[str], Answer]:
        *pieces, last = [piece async for piece in service.stream(request)]
        return pieces, last

    async def all_streams(requests: list[Request]) -> list[tuple[list[str], Answer]]:
        return await asyncio.gather(*map(stream, requests))

    requests = [*random_requests(20, seed=4), Request(named([5]), "prag", 1, max_new_tokens=30)]
    streamed = asyncio.run(all_streams(requests))
    whole = asyncio.run(answers(service, requests))
    for (pieces, last), answer in zip(streamed, whole, strict=True):
        assert "".join(pieces) == last.text
        assert same(last) == same(answer)
    assert streamed[-1][0] == ["f"] * 30


@pytest.mark.parametrize("template", ["direct", "chain_of_thought"])
def test_no_piece_ever_has_to_be_changed(tiny_session: BaseModel, template: str) -> None:
    reasoned = " so. The answer is x. So the answer is Mora STOP no"
    asked = DecodeRequest([1], 99, stop_strings=("STOP", "no"), one_line=True)
    for text in ("One. Two is é 東. And 3.5", " : One: two.", reasoned, "STSTOP", "a ST", ":\n\n One"):
        ids = tiny_session.tokenizer.encode(text, add_special_tokens=False)
        stream = StreamingDetokenizer(tiny_session.tokenizer, asked, template)
        pieces = [stream.add(ids[:end]) for end in range(1, len(ids) + 1)]
        whole = final_answer(text.split("no")[0].split("STOP")[0], template)
        assert "".join([*pieces, stream.end(whole)]) == whole
        assert any(pieces) == (template == "direct" and len(whole) > 0)


def test_a_stream_ends_at_the_line_end_inside_a_token(tiny_session: BaseModel, tmp_path: Path) -> None:
    base = with_tokens(tiny_session, tmp_path / "model", ["ĊX"])
    world = World(base, tmp_path)
    world.publish()
    ids = base.tokenizer.convert_tokens_to_ids
    handle = follow(base, "The answer is", [ids("P"), ids("a"), ids("ĊX")])

    async def collect() -> list[str | Answer]:
        return [piece async for piece in service.stream(Request(named([1]), "closed"))]

    with world.service() as service:
        *pieces, last = asyncio.run(collect())
    handle.remove()
    assert isinstance(last, Answer)
    assert "".join(map(str, pieces)) == last.text == "Pa"


def test_closing_a_stream_frees_its_slot(world: World) -> None:
    async def run(service: Service) -> None:
        stream = service.stream(Request(named([5]), "prag", 1, max_new_tokens=2000))
        assert await anext(stream) == "f"
        await stream.aclose()
        await until(lambda: service.stats().running == 0)

    with world.service(slots=1) as service:
        asyncio.run(run(service))
        assert service.stats().requests == {("prag", "cancelled"): 1}
        assert service.stats().cache.pinned_bytes == 0
        assert asyncio.run(service.answer(Request(named([6]), "prag", 1))).text == "gggg"


def test_a_cancelled_caller_frees_the_slot(world: World) -> None:
    async def run(service: Service, hold: Hold) -> Answer:
        tasks = [asyncio.create_task(service.answer(Request(named([n]), "prag", 1))) for n in (1, 2, 3)]
        await until(lambda: hold.entered.is_set() and service.stats().open == 3)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait(tasks[:2])
        hold.let_go()
        return await tasks[2]

    with held(world.base) as hold, world.service(slots=1) as service:
        assert asyncio.run(run(service, hold)).text == "dddd"
        assert service.stats().requests == {("prag", "cancelled"): 2, ("prag", "ok"): 1}
        asyncio.run(until(lambda: service.stats().running == 0))


def test_a_deadline_drops_the_request(world: World) -> None:
    with world.service(slots=1) as service:
        with pytest.raises(DeadlineError):
            asyncio.run(service.answer(Request(named([1]), "prag", 1), deadline_s=0.0))
        with held(world.base), pytest.raises(DeadlineError):
            asyncio.run(service.answer(Request(named([1]), "prag", 1), deadline_s=0.1))
        asyncio.run(until(lambda: service.stats().running == 0))
        assert asyncio.run(service.answer(Request(named([6]), "prag", 1), deadline_s=60.0)).text == "gggg"
        assert service.stats().requests == {("prag", "deadline"): 2, ("prag", "ok"): 1}


def test_a_full_queue_refuses_requests_and_says_when_to_retry(world: World) -> None:
    async def run(service: Service, hold: Hold) -> list[Answer]:
        tasks = [asyncio.create_task(service.answer(Request(named([n]), "prag", 1))) for n in range(3)]
        await until(lambda: service.stats().open == 3)
        with pytest.raises(OverloadedError) as refused:
            await service.answer(Request(named([4]), "prag", 1))
        assert 1.0 <= refused.value.retry_after_s <= 30.0
        hold.let_go()
        return await asyncio.gather(*tasks)

    with held(world.base) as hold, world.service(slots=2, max_queue=1) as service:
        assert [answer.text for answer in asyncio.run(run(service, hold))] == ["aaaa", "bbbb", "cccc"]
        assert service.stats().requests == {("prag", "overloaded"): 1, ("prag", "ok"): 3}


def test_in_overload_accepted_requests_take_at_most_twice_as_long(world: World) -> None:
    """Compare 16 users with 160, in decoding steps, which do not depend on the machine."""

    async def user(service: Service, n: int) -> int:
        while True:
            begun = service.stats().steps
            try:
                await service.answer(Request(named([n % 62]), "prag", 1, max_new_tokens=8))
                return service.stats().steps - begun
            except OverloadedError:
                await asyncio.sleep(0.05)

    async def median(service: Service, users: int) -> float:
        return statistics.median(await asyncio.gather(*(user(service, n) for n in range(users))))

    with world.service() as service:
        slots = service.stats().slots
        full = asyncio.run(median(service, slots))
        assert asyncio.run(median(service, 10 * slots)) <= 2 * full
        assert service.stats().requests["prag", "overloaded"] > 0


def test_draining_finishes_running_requests_and_refuses_new_ones(world: World) -> None:
    async def run(service: Service, hold: Hold) -> str:
        task = asyncio.create_task(service.answer(Request(named([1]), "prag", 1)))
        await until(hold.entered.is_set)
        draining = asyncio.create_task(service.drain())
        await until(lambda: service._draining)
        with pytest.raises(OverloadedError):
            await service.answer(Request(named([2]), "prag", 1))
        assert not draining.done()
        hold.let_go()
        await draining
        return (await task).text

    with held(world.base) as hold, world.service() as service:
        assert asyncio.run(run(service, hold)) == "bbbb"


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_prompt_too_long_fails_alone(world: World, service: Service) -> None:
    long = Request("x" * 5000, "closed")
    with pytest.raises(PromptTooLongError):
        asyncio.run(service.answer(long))
    assert service.stats().requests == {("closed", "too_long"): 1}
    opened = world.open()
    engine = Engine(world.base, opened.recipe, opened.processor, opened.source)
    first, second = engine.answer_batch([long, Request(named([1]), "prag", 1)])
    with pytest.raises(PromptTooLongError):
        engine.answer(long)
    engine.close()
    assert (first.text, first.finish) == ("", "error")
    assert "exceed the context" in first.error
    assert (second.text, second.finish, second.error) == ("bbbb", "length", "")


def test_adapters_whose_sum_is_too_large_leave_their_passages_in_the_prompt(
    tiny_session: BaseModel, tmp_path, monkeypatch
) -> None:
    """Each adapter is finite, and the other rows of the batch are unaffected."""
    marker = marker_adapter

    def huge(base, layout, letter):
        if letter == LETTERS[0]:
            return {name: torch.full(shape, 1e30) for name, shape in layout.tensor_shapes.items()}
        return marker(base, layout, letter)

    monkeypatch.setattr("tests.helpers.serving.marker_adapter", huge)
    world = World(tiny_session, tmp_path)
    world.publish(count=4)
    requests = [Request(named(numbers), "prag", 2) for numbers in ([1], [0, 2], [3])]
    with world.service() as service:
        served = asyncio.run(answers(service, requests))
        streamed = asyncio.run(collect(service.stream(requests[1])))
        expected = asyncio.run(service.answer(Request(named([0, 2]), "rag", 2)))
        assert service.stats().fallbacks == 4
    opened = world.open()
    engine = Engine(world.base, opened.recipe, opened.processor, opened.source)
    assert [same(answer) for answer in engine.answer_batch(requests)] == [same(answer) for answer in served]
    engine.close()
    assert [answer.text for answer in served] == ["bbbb", expected.text, "dddd"]
    assert [(p.in_weights, p.in_prompt, p.note) for p in served[1].passages] == [
        (False, True, "the sum of this question's adapters is too large")
    ] * 2
    assert "".join(streamed[:-1]) == expected.text


def test_output_that_is_not_finite_is_an_error(world: World) -> None:
    """For a broken model, and for a stream of which a part was already sent."""

    breaks = threading.Event()

    def not_a_number(module, inputs, output) -> None:
        if breaks.is_set():
            output.logits.fill_(torch.nan)

    async def stream(service: Service) -> list[object]:
        pieces = service.stream(Request(named([1]), "prag", 1, max_new_tokens=2000))
        got = [await anext(pieces)]
        breaks.set()
        with pytest.raises(NotFiniteError, match="not finite with the adapters of Quorl 1"):
            got += await collect(pieces)
        return got

    handle = world.base.model.register_forward_hook(not_a_number)
    with world.service() as service:
        assert asyncio.run(stream(service)) == ["b"]
        with pytest.raises(NotFiniteError, match="not finite with the adapters of no passage"):
            asyncio.run(service.answer(Request(named([1]), "prag", 1)))
        opened = world.open()
        engine = Engine(world.base, opened.recipe, opened.processor, opened.source)
        broken = engine.answer_batch([Request("Who?", "closed")])[0]
        engine.close()
    handle.remove()
    assert (broken.text, broken.finish) == ("", "error")
    assert "not finite" in broken.error


def test_a_failing_step_fails_its_own_requests_only(world: World, service: Service) -> None:
    fails = iter([True])

    def fail(*_) -> None:
        if next(fails, False):
            raise RuntimeError("out of memory")

    handle = world.base.model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(GenerationError, match="out of memory"):
        asyncio.run(service.answer(Request(named([1]), "prag", 1)))
    handle.remove()
    service.check()
    assert asyncio.run(service.answer(Request(named([2]), "prag", 1))).text == "cccc"


def test_after_a_step_without_memory_its_tensors_are_freed_and_the_rest_given_back(
    world: World, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref] = []
    alive: list[bool] = []

    def fail(*_) -> None:
        large = torch.ones(3)
        held.append(weakref.ref(large))
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    # On a CPU it has nothing to give back; what counts is that it comes last. pytest keeps what is logged alive.
    monkeypatch.setattr("prag_core.inference.decode_thread.free_unused", lambda _: alive.append(held[0]() is not None))
    monkeypatch.setattr("prag_core.inference.decode_thread.log.disabled", True)
    handle = world.base.model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(GenerationError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        asyncio.run(service.answer(Request(named([1]), "prag", 1)))
    handle.remove()
    assert asyncio.run(service.answer(Request(named([2]), "prag", 1))).text == "cccc"
    assert alive == [False]


def test_a_stuck_engine_is_noticed(world: World) -> None:
    async def run(service: Service, hold: Hold) -> None:
        service.check()
        task = asyncio.create_task(service.answer(Request(named([1]), "prag", 1)))

        def stuck() -> bool:
            try:
                service.check()
            except EngineStuckError:
                return True
            return False

        await until(stuck)
        hold.let_go()
        await task
        service.check()

    with held(world.base) as hold, world.service(stuck_s=0.05) as service:
        asyncio.run(run(service, hold))


def test_a_dead_decoding_thread_is_noticed(world: World) -> None:
    def die(*_) -> None:
        raise SystemExit

    with world.service() as service:
        handle = world.base.model.get_input_embeddings().register_forward_hook(die)
        with pytest.raises(EngineStuckError):
            asyncio.run(service.answer(Request(named([1]), "prag", 1)))
        handle.remove()
        with pytest.raises(EngineStuckError):
            asyncio.run(service.answer(Request(named([1]), "prag", 1)))
        asyncio.run(until(lambda: not service._decode_thread._thread.is_alive()))
        with pytest.raises(EngineStuckError):
            service.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_get_an_error_before_a_decoder_that_cannot_be_reset_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a lost device, the step fails and so does everything after it."""

    def fail(*_) -> None:
        raise RuntimeError("device lost")

    async def run(service: Service, hold: Hold) -> list[object]:
        tasks = [asyncio.create_task(service.answer(Request(named([n]), "prag", 1))) for n in (1, 2, 3)]
        await until(lambda: hold.entered.is_set() and service.stats().open == 3)
        monkeypatch.setattr(Decoder, "reset", fail)
        handle = world.base.model.register_forward_hook(fail)
        hold.let_go()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        await until(lambda: not service._decode_thread._thread.is_alive())
        handle.remove()
        return found

    with held(world.base) as hold, world.service(slots=1) as service:
        assert {type(error) for error in asyncio.run(run(service, hold))} <= {GenerationError, EngineStuckError}
        with pytest.raises(EngineStuckError, match="has ended"):
            service.check()


def test_a_stuck_search_is_noticed_and_delays_no_other_request(
    tiny_session: BaseModel, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    class Stuck(ByNumber):
        def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
            let_go.wait()
            return super().search(question, top_k, min_score)

    closed: list[bool] = []
    world = World(tiny_session, tmp_path)
    world.retriever = Stuck()
    world.on_close = lambda: closed.append(True)
    world.publish(count=2)
    monkeypatch.setattr("prag_core.inference.service._CLOSE_S", 0.05)
    with world.service(stuck_s=0.05) as service:
        service.check()
        for mode in ("rag", "closed"):  # the second one waits behind the first one's search
            with pytest.raises(DeadlineError):
                asyncio.run(service.answer(Request(named([1]), mode, 1), deadline_s=0.1))
        with pytest.raises(EngineStuckError, match="a search has not ended"):
            service.check()
        assert service.stats().open == 0
        service.close()
        assert not closed  # closing an index would wait for the search
        let_go.set()


# --- snapshots -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_snapshots_change_while_requests_run(tiny_session: BaseModel, tmp_path) -> None:
    """Snapshots with different adapters for the same keys, some by other recipes: each answer is its snapshot's."""
    world = World(tiny_session, tmp_path)
    world.publish()
    recipes = [RECIPE, replace(RECIPE, rank=3), replace(RECIPE, learning_rate=1.0), replace(RECIPE, alpha=64.0)]
    rng = random.Random(5)
    got: list[tuple[int, Answer]] = []

    async def user(service: Service, stop: asyncio.Event) -> None:
        while not stop.is_set():
            n = rng.randrange(62)
            got.append((n, await service.answer(Request(named([n]), "prag", 1))))

    async def run(service: Service) -> None:
        stop = asyncio.Event()
        users = [asyncio.create_task(user(service, stop)) for _ in range(12)]

        def has_answered(count: int) -> bool:
            for ended in (user for user in users if user.done()):
                ended.result()  # raises, where nobody would answer any more
            return len(got) > count

        for shift in range(1, 9):
            enough = len(got) + 40
            await until(lambda enough=enough: has_answered(enough))
            published = await asyncio.to_thread(world.publish, shift, recipes[shift % 4])
            # Of several at once, one swaps and the others find it done.
            assert sorted(await asyncio.gather(*(service.refresh() for _ in range(3)))) == [False, False, True]
            assert service.snapshot == published.id
        await until(lambda: has_answered(enough + 60))
        stop.set()
        await asyncio.gather(*users)
        assert not await service.refresh()
        await until(lambda: service.stats().snapshots_held == 1 and len(service._decode_thread._batches) == 1)

    with world.service(slots=8) as service:
        asyncio.run(run(service))
        assert service.stats().swaps == 8
    for n, answer in got:
        assert answer.text == world.letters[answer.snapshot](n) * 4
    assert len({answer.snapshot for _, answer in got}) == 9


def test_a_snapshot_that_cannot_be_opened_leaves_the_old_one(tiny_session: BaseModel, tmp_path) -> None:
    world = World(tiny_session, tmp_path)
    first = world.publish(count=3)
    with world.service() as service:
        second = with_ledger(load_snapshot(world.store), ["adapters/none.parquet"], 3)
        publish(world.store, second)
        with pytest.raises(Exception, match="no such object"):
            asyncio.run(service.refresh())
        assert service.snapshot == first.id
        assert asyncio.run(service.answer(Request(named([1]), "prag", 1))).text == "bbbb"
        assert service.stats().snapshots_held == 1


def test_the_index_is_opened_last(world: World, tmp_path) -> None:
    """So that no other error leaves an index open. Here both are missing; the error names the ledger part."""
    config = parse_config({"store": world.store.url, "corpus": {"path": "none.jsonl"}})
    snapshot = replace(load_snapshot(world.store), ledger_parts=("adapters/none.parquet",))
    with pytest.raises(StoreError, match=r"none\.parquet: no such object"):
        open_snapshot(world.base, config, world.store, snapshot)


def test_a_snapshot_that_cannot_be_closed_fails_no_request(tiny_session: BaseModel, tmp_path) -> None:
    closed: list[bool] = []

    def fail() -> None:
        closed.append(True)
        raise RetrievalError("the index cannot be closed")

    world = World(tiny_session, tmp_path)
    world.on_close = fail
    world.publish(count=2)

    async def run(service: Service, hold: Hold) -> str:
        task = asyncio.create_task(service.answer(Request(named([0]), "prag", 1)))
        await until(hold.entered.is_set)
        world.publish(shift=1, train=replace(RECIPE, rank=3), count=2)
        assert await service.refresh()
        hold.let_go()
        return (await task).text

    with held(world.base) as hold, world.service() as service:
        assert asyncio.run(run(service, hold)) == "aaaa"
        asyncio.run(until(lambda: len(service._decode_thread._batches) == 0))  # the old one's hooks were taken off
        assert len(closed) == 1
        service.close()
        service.close()
        assert len(closed) == 2


def test_invalid_requests_are_refused() -> None:
    for wrong in (
        {"mode": "open"},
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"stop": ("",)},
        {"history": (("tool", "x"),)},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            Request("Who?", **wrong)


def test_time_is_counted_by_step(service: Service) -> None:
    begun = time.perf_counter()
    answer = asyncio.run(service.answer(Request(named([1]), "combine", 1)))
    spent = (time.perf_counter() - begun) * 1e3
    assert set(answer.milliseconds) == {"retrieve", "fetch", "prompt", "wait", "inject", "prefill", "decode"}
    assert 0 < sum(answer.milliseconds.values()) <= spent
