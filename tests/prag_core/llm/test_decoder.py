"""Continuous batching: each row decodes as it does alone, whichever rows join, leave or came before."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.cache_utils import get_layer_types_and_kwargs

from prag_core.errors import ModelError, PromptTooLongError
from prag_core.llm import slots
from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import Decoded, DecodeRequest
from prag_core.llm.decoder import Decoder, context_length
from prag_core.llm.generator import Prompt, TransformersGenerator
from prag_core.llm.lora import AdapterStack, FlatAdapter, Injector, find_targets, stack_adapters
from prag_core.llm.prefix_cache import PrefixCache
from prag_core.llm.slots import SlotAdapters, attention_layers
from prag_core.recipe import RECIPES
from tests.helpers.adapters import random_flat
from tests.helpers.generators import replies

RECIPE = RECIPES["recall"]
VOCABULARY = 259


@pytest.fixture
def injector(tiny_session: BaseModel) -> Iterator[Injector]:
    made = Injector(tiny_session.model, RECIPE)
    yield made
    made.close()


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(length)]


def random_requests(base: BaseModel, count: int, seed: int = 0, longest: int = 60) -> list[DecodeRequest]:
    """Return requests that differ in length, limit, number of adapters (0 to 3) and sampling."""
    rng = random.Random(seed)
    layout, _ = find_targets(base.model, RECIPE)
    return [
        DecodeRequest(
            random_prompt(rng, rng.randint(1, longest)),
            rng.randint(1, 14),
            temperature=rng.choice([0.0, 0.0, 1.0, 1.5]),
            top_k=rng.choice([0, 5, 40]),
            top_p=rng.choice([1.0, 0.7]),
            seed=rng.randrange(100),
            adapters=[
                (random_flat(layout, rng.randrange(1000)), rng.choice([1.0, 0.5])) for _ in range(rng.randint(0, 3))
            ],
        )
        for _ in range(count)
    ]


def alone(base: BaseModel, injector: Injector | None, request: DecodeRequest) -> list[int]:
    return Decoder(base, injector, slots=1).run([request])[0].tokens


def greedy(base: BaseModel, injector: Injector, request: DecodeRequest) -> list[int]:
    """The oracle: read the whole sequence again for each token, without a cache."""
    ids = list(request.prompt)
    stacked = stack_adapters(injector.layout, [request.adapters], dtype=torch.float32)
    rows = stacked.rows() if stacked is not None else None
    for _ in range(request.max_new_tokens):
        with injector.active(rows), torch.inference_mode():
            ids.append(int(base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(request.prompt) :]


@contextmanager
def tokens_read(base: BaseModel) -> Iterator[list[int]]:
    """Collect how many tokens, padding included, each forward pass gets."""
    counts: list[int] = []
    embedding = base.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    yield counts
    handle.remove()


# --- independent rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [8, 128])
def test_rows_that_join_and_leave_decode_as_they_do_alone(
    tiny_session: BaseModel, injector: Injector, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_BLOCK", block)
    rng = random.Random(block)
    requests = random_requests(tiny_session, 24)
    decoder = Decoder(tiny_session, injector, slots=5, prefill_chunk=24)
    waiting = list(enumerate(requests))
    places: dict[int, int] = {}
    streamed: dict[int, list[int]] = {}
    results: dict[int, Decoded] = {}
    while waiting or decoder.busy:
        for _ in range(rng.choice([0, 0, 1, 3]) if decoder.busy else 1):
            if waiting:
                place, request = waiting.pop(0)
                places[decoder.submit(request)] = place
        for event in decoder.step():
            place = places[event.id]
            assert place not in results
            if event.token is not None:
                streamed.setdefault(place, []).append(event.token)
            if event.result is not None:
                results[place] = event.result
    assert len({tuple(result.tokens) for result in results.values()}) > 15
    for place, request in enumerate(requests):
        assert results[place].tokens == streamed[place] == alone(tiny_session, injector, request)
        if request.temperature == 0:
            assert results[place].tokens == greedy(tiny_session, injector, request)


def test_results_come_in_the_order_of_the_requests(tiny_session: BaseModel, injector: Injector) -> None:
    requests = random_requests(tiny_session, 20, seed=1)
    decoder = Decoder(tiny_session, injector, slots=6, max_tokens=150)
    assert [result.tokens for result in decoder.run(requests)] == [
        alone(tiny_session, injector, request) for request in requests
    ]
    assert not decoder.busy


def test_a_slot_keeps_nothing_of_its_former_row(tiny_session: BaseModel, injector: Injector) -> None:
    """The former row's keys, values and adapters are not finite, so that any of them left behind would show."""
    layout = injector.layout
    broken = torch.full((layout.parameters,), float("nan"))
    rng = random.Random(0)

    def request(length: int, *adapters: FlatAdapter) -> DecodeRequest:
        pairs = [(adapter, float("nan") if adapter is broken else 1.0) for adapter in adapters]
        return DecodeRequest(random_prompt(rng, length), 6, adapters=pairs, temperature=1.0)

    one, other = random_flat(layout, 1), random_flat(layout, 2)
    poison = [replace(request(50, broken, broken, broken), temperature=0.0) for _ in range(2)]
    # Longer and shorter than the former rows, with fewer adapters, with others, with none beside one that has some.
    later = [request(9, one), request(70), request(30, other, one), request(3), request(64, one)]
    decoder = Decoder(tiny_session, injector, slots=2)
    for _ in range(2):
        assert len(decoder.run(poison)) == 2
        assert [r.tokens for r in decoder.run(later)] == [alone(tiny_session, injector, r) for r in later]
    # And while a row with adapters stays, so that the tensors do.
    stays = decoder.submit(replace(request(20, one, one, one), max_new_tokens=200))
    for newcomer in later:
        for each in (poison[0], newcomer):
            id = decoder.submit(each)
            events = [event for _ in range(8) for event in decoder.step() if event.id == id]
        assert [event.token for event in events] == alone(tiny_session, injector, newcomer)
    assert decoder.cancel(stays)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_live_rows_hold_exactly_their_own_adapters(injector: Injector, poisoned: None) -> None:
    """Random rows with none to three adapters join and leave; the live ones are as if they were stacked anew."""
    rng = random.Random(0)
    layout = injector.layout
    adapters = [random_flat(layout, seed) for seed in range(5)]
    slots, live = SlotAdapters(6), []
    for _ in range(300):
        if live and (len(live) == 6 or rng.random() < 0.5):
            slot = rng.randrange(len(live))
            slots.leave(slot)
            live[slot] = live[-1]
            live.pop()
        else:
            row = [(rng.choice(adapters), rng.choice([1.0, 0.5])) for _ in range(rng.randint(0, 3))]
            # It was read in a group with another one.
            group = stack_adapters(layout, [row, row[:1]], dtype=torch.float32)
            slots.join(group if row else None, 0)
            live.append(row)
        rows = slots.rows()
        wanted = stack_adapters(layout, live, dtype=torch.float32) if any(live) else None
        assert (rows is None) == (wanted is None)
        if rows is None or wanted is None:
            continue
        assert torch.equal(rows.weights[:, : wanted.weights.shape[1]], wanted.weights)
        for place, pair in wanted.rows().factors.items():
            for found, expected in zip(rows.factors[place], pair, strict=True):
                rank = expected.shape[1]
                assert torch.equal(found[:, :rank], expected)
                assert not found[:, rank:].any()


def test_tensors_for_adapters_are_kept_until_the_rank_changes(injector: Injector) -> None:
    def stack(count: int) -> AdapterStack:
        one = random_flat(injector.layout, 1)
        stacked = stack_adapters(injector.layout, [[(one, 1.0)] * count], dtype=torch.float32)
        assert stacked is not None
        return stacked

    slots, seen = SlotAdapters(4), []
    for count in (3, 3, 1):
        slots.join(None, 0)
        assert slots.rows() is None
        slots.join(stack(count), 0)
        rows = slots.rows()
        assert rows is not None
        seen.append((slots._stack, rows.weights.shape))
        slots.leave(1)
        assert slots.rows() is None
        slots.leave(0)
    rank = injector.layout.rank
    assert [shape for _, shape in seen] == [(2, 3 * rank), (2, 3 * rank), (2, rank)]
    assert seen[0][0] is seen[1][0]


def test_a_neighbour_that_is_not_finite_changes_nothing(tiny_session: BaseModel, injector: Injector) -> None:
    broken = torch.full((injector.layout.parameters,), float("inf"))
    requests = random_requests(tiny_session, 6, seed=3)
    bad = [
        DecodeRequest(random_prompt(random.Random(0), 40), 20, adapters=[(broken, 1.0)], temperature=temperature)
        for temperature in (0.0, 1.0)
    ]
    first, second, *results = Decoder(tiny_session, injector, slots=3).run([*bad, *requests])
    assert (first.finish, first.tokens) == (second.finish, second.tokens) == ("not_finite", [])
    assert [result.tokens for result in results] == [alone(tiny_session, injector, each) for each in requests]


# --- the end of a row --------------------------------------------------------------------------------------------


def test_a_row_ends_at_a_stop_token_a_stop_string_or_its_limit(tiny_session: BaseModel) -> None:
    request = DecodeRequest(random_prompt(random.Random(5), 9), 12, temperature=1.0, seed=3)
    decoder = Decoder(tiny_session)
    (free,) = decoder.run([request])
    assert (free.finish, len(free.tokens)) == ("length", 12)
    letters = [tiny_session.tokenizer.decode([token]) for token in free.tokens]
    stop = next(i for i in range(4, 12) if free.tokens[i] not in free.tokens[:i])
    ended = decoder.run(
        [
            replace(request, stop_ids=frozenset([free.tokens[stop]])),
            replace(request, stop_strings=("never there", "".join(letters[stop - 1 : stop + 1]))),
        ]
    )
    assert [result.finish for result in ended] == ["stop", "stop"]
    assert ended[0].tokens == free.tokens[:stop]
    assert ended[1].tokens == free.tokens[: stop + 1]
    assert ended[1].text == "".join(letters[: stop - 1])
    assert ended[0].text == "".join(letters[:stop])


def say(base: BaseModel, text: str) -> list[int]:
    """Make the model say a text, token by token; return those said. Where the list is cleared, the text begins anew."""
    tokens = base.tokenizer.encode(text, add_special_tokens=False)
    made: list[int] = []

    def say_the_text(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        made.append(tokens[len(made)])
        return torch.zeros_like(logits).index_fill_(-1, torch.tensor(made[-1:]), 1.0)

    base.model.get_output_embeddings().register_forward_hook(say_the_text)
    return made


@pytest.mark.parametrize(
    ("said", "text"),
    [("Mora\nand on", "Mora"), (":\n\n Mora\nand on", ":\n\n Mora"), ("\n€\nand on", "\n€"), (":\n\n", ":\n\n")],
)
def test_an_answer_of_one_line_may_begin_below_a_colon(tiny: BaseModel, said: str, text: str) -> None:
    made = say(tiny, said)
    request = DecodeRequest([5], len(tiny.tokenizer.encode(said)), one_line=True)
    (decoded,) = Decoder(tiny, Injector(tiny.model, RECIPE)).run([request])
    assert (decoded.text, decoded.finish) == (text, "stop" if text != said else "length")
    assert tiny.tokenizer.decode(made) == (f"{text}\n" if text != said else text)  # it ended at once


def test_a_limit_within_a_character_leaves_no_part_of_it(tiny: BaseModel) -> None:
    text = "hé, 😀"
    made = say(tiny, text)
    for limit in range(1, len(text.encode()) + 1):
        made.clear()
        (decoded,) = Decoder(tiny, Injector(tiny.model, RECIPE)).run([DecodeRequest([5], limit)])
        assert (decoded.text, decoded.finish) == (text.encode()[:limit].decode(errors="ignore"), "length")


def test_a_cancelled_row_leaves_the_others_alone(tiny_session: BaseModel, injector: Injector) -> None:
    rng = random.Random(1)
    requests = [
        replace(request, max_new_tokens=9, prompt=random_prompt(rng, 90 if i == 3 else 10))
        for i, request in enumerate(random_requests(tiny_session, 7, seed=2))
    ]
    decoder = Decoder(tiny_session, injector, slots=3, prefill_chunk=30)
    ids = [decoder.submit(request) for request in requests]
    events = [event for _ in range(4) for event in decoder.step()]
    assert {event.id for event in events} == set(ids[:3])
    assert decoder.cancel(ids[1]), "it runs"
    events += decoder.step()
    assert decoder.cancel(ids[3]), "it is being read"
    assert decoder.cancel(ids[5]), "it waits"
    assert not any(decoder.cancel(ids[i]) for i in (1, 3, 5))
    while decoder.busy:
        events += decoder.step()
    results = {event.id: event.result for event in events if event.result is not None}
    assert set(results) == {ids[i] for i in (0, 2, 4, 6)}
    for i in (0, 2, 4, 6):
        assert results[ids[i]].tokens == alone(tiny_session, injector, requests[i])
    assert not decoder.cancel(ids[0]), "it has ended"


def test_a_prompt_is_cancelled_while_others_of_its_group_are_read(tiny_session: BaseModel) -> None:
    rng = random.Random(1)
    long, *short = [DecodeRequest(random_prompt(rng, length), 3, temperature=1.0) for length in (90, 9, 9)]
    decoder = Decoder(tiny_session, prefill_chunk=30)
    ids = [decoder.submit(long)]
    decoder.step()
    ids += [decoder.submit(request) for request in short]
    decoder.step()
    assert decoder.cancel(ids[1])
    assert decoder.cancel(ids[0])
    (result,) = [event.result for _ in range(3) for event in decoder.step() if event.result is not None]
    assert result.tokens == alone(tiny_session, None, short[1])
    id = decoder.submit(long)
    decoder.step()
    assert decoder.cancel(id)
    assert not decoder.busy


def test_without_adapters_the_bare_model_runs(
    tiny_session: BaseModel, injector: Injector, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare: list[bool] = []
    active = injector.active
    monkeypatch.setattr(injector, "active", lambda rows: (bare.append(rows is None), active(rows))[1])
    decoder = Decoder(tiny_session, injector)
    decoder.submit(DecodeRequest([7], 6))
    decoder.submit(DecodeRequest([8], 3, adapters=[(random_flat(injector.layout, 0), 1.0)]))
    while decoder.busy:
        decoder.step()
    assert bare == [False] * 3 + [True] * 3


def test_invalid_requests_are_refused(tiny_session: BaseModel) -> None:
    for wrong in ({"prompt": []}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match=r"positive|out of range"):
            DecodeRequest(**{"prompt": [5], "max_new_tokens": 1, **wrong})
    decoder = Decoder(tiny_session)
    with pytest.raises(PromptTooLongError, match="4096"):
        decoder.run([DecodeRequest([5], 3), DecodeRequest([5] * 4000, 97)])
    assert not decoder.busy
    layout, _ = find_targets(tiny_session.model, RECIPE)
    with pytest.raises(ModelError, match="Injector"):
        decoder.submit(DecodeRequest([5], 3, adapters=[(random_flat(layout, 0), 1.0)]))
    decoder.submit(DecodeRequest([5], 3))
    with pytest.raises(RuntimeError, match="busy"):
        decoder.run([DecodeRequest([6], 3)])


def test_an_error_leaves_no_request_behind(tiny_session: BaseModel, injector: Injector) -> None:
    requests = random_requests(tiny_session, 6, seed=4)
    decoder = Decoder(tiny_session, injector, slots=3, prefill_chunk=32)
    expected = [result.tokens for result in decoder.run(requests)]
    layer = tiny_session.model.model.layers[1]
    for fatal in range(1, 12, 2):
        passes = iter(range(1, 100))

        def fail(*_: Any, passes: Iterator[int] = passes, fatal: int = fatal) -> None:
            if next(passes) == fatal:
                raise MemoryError("no room")

        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            decoder.run(requests)
        handle.remove()
        assert not decoder.busy
        assert [result.tokens for result in decoder.run(requests)] == expected


def test_sampling_depends_on_the_seed_and_is_bounded_by_top_p(tiny_session: BaseModel) -> None:
    request = DecodeRequest(random_prompt(random.Random(5), 9), 10, temperature=2.0)
    decoder = Decoder(tiny_session)
    drawn = [decoder.run([replace(request, seed=seed)])[0].tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    (greedy,) = decoder.run([replace(request, temperature=0.0)])
    for top_p in (1e-6, 1e-300):
        assert decoder.run([replace(request, top_p=top_p)])[0].tokens == greedy.tokens
    assert decoder.run([replace(request, top_k=1)])[0].tokens == greedy.tokens
    assert decoder.run([replace(request, temperature=1e-300)])[0].tokens == greedy.tokens


# --- scheduling -----------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stop_running_rows(tiny_session: BaseModel) -> None:
    rng = random.Random(0)
    decoder = Decoder(tiny_session, slots=3, prefill_chunk=10)
    running = decoder.submit(DecodeRequest(random_prompt(rng, 5), 100))
    decoder.step()
    long = decoder.submit(DecodeRequest(random_prompt(rng, 200), 2))
    short = decoder.submit(DecodeRequest(random_prompt(rng, 8), 2))
    ended: list[int] = []
    with tokens_read(tiny_session) as counts:
        while long not in ended:
            events = decoder.step()
            assert running in {event.id for event in events}, "it gets a token in each step"
            ended += [event.id for event in events if event.result is not None]
    assert ended == [short, long]
    assert max(counts) <= 10


def test_prompts_of_similar_length_are_read_together(tiny_session: BaseModel) -> None:
    rng = random.Random(0)
    decoder = Decoder(tiny_session, slots=8, prefill_chunk=512)
    for length in (101, 101, 20, 101, 95):
        decoder.submit(DecodeRequest(random_prompt(rng, length), 9))
    with tokens_read(tiny_session) as counts:
        decoder.step()
        decoder.step()
    # The four long ones, and their first tokens; then the short one, and all five.
    assert counts == [400, 4, 19, 5]


def test_a_freed_slot_is_filled_at_once(tiny_session: BaseModel) -> None:
    decoder = Decoder(tiny_session, slots=2)
    limits = (1, 3, 5, 1, 2, 4, 1)
    for i, limit in enumerate(limits):
        decoder.submit(DecodeRequest([10 + i], limit))
    rows = []
    while decoder.busy:
        rows.append(len(decoder.step()))
    assert sum(rows) == sum(limits)
    assert set(rows[:-4]) == {2}


def test_the_tokens_in_the_slots_are_bounded(tiny_session: BaseModel) -> None:
    decoder = Decoder(tiny_session, slots=8, max_tokens=60)
    requests = [DecodeRequest([10 + i] * 10, 10) for i in range(7)]
    requests.append(DecodeRequest([9] * 90, 10))
    for request in requests:
        decoder.submit(request)
    rows = []
    while decoder.busy:
        rows.append(len({event.id for event in decoder.step()}))
    assert max(rows) == 3
    assert rows[-10:] == [1] * 10, "the long one is alone"


def test_each_result_has_its_own_times(tiny_session: BaseModel) -> None:
    requests = [DecodeRequest([10 + i] * 10, limit) for i, limit in enumerate((1, 6, 6))]
    first, second, third = Decoder(tiny_session, slots=2).run(requests)
    for result in (first, second, third):
        assert min(result.wait_ms, result.inject_ms, result.prefill_ms) > 0
    assert first.decode_ms == 0 < second.decode_ms
    # Of equal prompts the one that asks for fewest tokens comes last: it waited for a slot.
    assert first.wait_ms > second.wait_ms + second.prefill_ms


# --- shared prefixes -----------------------------------------------------------------------------


def test_a_shared_prefix_is_read_once_and_kept_between_calls(tiny_session: BaseModel) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("abcdefgh ") for _ in range(300))

    def prompts(*ends: str) -> list[Prompt]:
        return [Prompt(text + end, chat=False) for end in ends]

    calls = [prompts("xa", "xbc", "xd"), prompts("ya", "ybb"), prompts("z"), [Prompt("q" * 40 + c) for c in "ab"]]
    calls.append(prompts("w", "v"))
    generator = TransformersGenerator(tiny_session)
    read: list[int] = []
    for call in calls:
        with tokens_read(tiny_session) as counts:
            together = replies(generator, call, max_new_tokens=3, temperature=1.0)
        read.append(sum(counts))
        for prompt, made in zip(call, together, strict=True):
            fresh = TransformersGenerator(tiny_session)
            assert replies(fresh, [prompt], max_new_tokens=3, temperature=1.0) == [made]
    assert 300 <= read[0] < 330
    assert max(read[1], read[2], read[4]) < 20, "the beginning was known"
    assert 40 < read[3] < 100


def test_prompts_that_share_prefixes_of_different_length_are_read_together(tiny_session: BaseModel) -> None:
    rng = random.Random(0)
    first, second = random_prompt(rng, 100), random_prompt(rng, 100)
    beginnings = [first, first[:90], first[:93], second, second[:40], random_prompt(rng, 9)]
    requests = [DecodeRequest([*each, *random_prompt(rng, 6)], 8, temperature=1.0) for each in beginnings]
    decoder = Decoder(tiny_session)
    for beginning in (first, second):
        decoder.prefixes.share([[*beginning, 3], [*beginning, 4]])
    with tokens_read(tiny_session) as counts:
        results = decoder.run(requests)
    assert [result.tokens for result in results] == [alone(tiny_session, None, each) for each in requests]
    assert counts[0] == 3 * 15, "the first three at once, behind their common 90 tokens"


def test_the_most_recently_used_prefixes_are_kept(tiny_session: BaseModel) -> None:
    beginnings = [[10 + i] * 40 for i in range(5)]
    prefixes = PrefixCache(tiny_session.model)
    for i in (0, 1, 2, 3, 0, 4):
        prefixes.share([[*beginnings[i], 3], [*beginnings[i], 4]])
    assert [prefixes.match(each)[1] for each in beginnings] == [40, 0, 40, 40, 40]


def test_rows_with_adapters_never_use_the_bare_models_prefix(tiny_session: BaseModel, injector: Injector) -> None:
    rng = random.Random(0)
    beginning = random_prompt(rng, 100)
    adapter = random_flat(injector.layout, 7)
    bare = [DecodeRequest([*beginning, *random_prompt(rng, 5)], 8, temperature=1.0) for _ in range(3)]
    requests = [*bare, *(replace(request, adapters=[(adapter, 1.0)]) for request in bare)]
    decoder = Decoder(tiny_session, injector)
    decoder.prefixes.share([list(request.prompt) for request in requests])
    with tokens_read(tiny_session) as counts:
        results = decoder.run(requests)
    assert [result.tokens for result in results] == [alone(tiny_session, injector, each) for each in requests]
    # The ends of the bare ones, the whole of the others, and what is decoded.
    assert sum(counts) == 3 * 4 + 3 * 104 + sum(len(result.tokens) for result in results)


# --- other architectures ----------------------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
}
_WINDOW: dict[str, Any] = {"sliding_window": 9, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "mistral": ("MistralConfig", _WINDOW),
    "phi3": ("Phi3Config", {"sliding_window": 9}),
    "gemma2": ("Gemma2Config", {**_WINDOW, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", {**_WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
}


def model_of(architecture: str, base: BaseModel) -> BaseModel:
    name, settings = ARCHITECTURES[architecture]
    implementation = settings.get("attn_implementation", "sdpa")
    config = getattr(transformers, name)(**{**_SHAPE, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return BaseModel(architecture, architecture, model, base.tokenizer)


def generated(base: BaseModel, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        made.append(out[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_each_architecture_decodes_as_in_transformers(tiny_session: BaseModel, architecture: str) -> None:
    """Prompts shorter and longer than the window, read in chunks, after a shared prefix, in reused slots."""
    base = model_of(architecture, tiny_session)
    rng = random.Random(0)
    beginning = random_prompt(rng, 40)
    prompts = [random_prompt(rng, length) for length in (3, 33, 8, 50, 1, 21)]
    prompts += [beginning + random_prompt(rng, length) for length in (1, 12, 5)]
    expected = generated(base, prompts, 12)
    assert len({tuple(tokens) for tokens in expected}) > 5
    decoder = Decoder(base, slots=4, prefill_chunk=16)
    decoder.prefixes.share([[*beginning, 3], [*beginning, 4]])
    assert [result.tokens for result in decoder.run([DecodeRequest(p, 12) for p in prompts])] == expected
    kinds, _ = get_layer_types_and_kwargs(base.model.config)
    assert ("sliding_attention" in kinds) == (architecture != "qwen2")


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_unsupported_layers_are_refused(tiny_session: BaseModel, kind: str) -> None:
    config = transformers.LlamaConfig(**_SHAPE)
    config.layer_types = ["full_attention", kind, "full_attention", kind]
    config.attention_chunk_size = 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_SHAPE))
    model.config = config
    with pytest.raises(ModelError, match=kind):
        attention_layers(model)


def test_longrope_limits_the_context_to_the_original_one() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = transformers.Phi3Config(**_SHAPE, rope_parameters=rope, original_max_position_embeddings=64)
    assert context_length(config) == 64
    assert context_length(transformers.Qwen2Config(**_SHAPE)) == 512
