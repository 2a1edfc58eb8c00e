"""The engine answers each question as if it were alone, and a damaged adapter never fails a request."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from prag_core.errors import AdapterError, TurnsError
from prag_core.inference.engine import Engine
from prag_core.inference.processor import Found, RequestProcessor, hit_weights
from prag_core.inference.request import Request
from prag_core.llm.base_model import BaseModel
from prag_core.llm.chat import answer_prefix_ids, question_ids
from prag_core.llm.lora import find_targets, flatten_adapter
from prag_core.prompts import final_answer
from prag_core.recipe import RECIPES
from prag_core.records import MODES, Answer, Hit, Route
from prag_core.store.ledger import AdapterLocation
from tests.helpers.adapters import random_adapter
from tests.helpers.passages import make_passage

RECIPE = RECIPES["recall"]
PASSAGES = [make_passage(n, words=4) for n in range(6)]


class KnownHits:
    """A retriever that returns the same passages for each question."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        return [Hit(passage, 3.0 - i) for i, passage in enumerate(PASSAGES[:top_k])]


class Adapters:
    def __init__(self, base: BaseModel) -> None:
        self.layout, _ = find_targets(base.model, RECIPE)
        self.broken: set[str] = set()

    def get(self, key: str):
        if key in self.broken:
            raise AdapterError(f"adapter {key}: cut short")
        return random_adapter(self.layout, [p.key for p in PASSAGES].index(key))


@pytest.fixture
def engine(tiny_session: BaseModel):
    made = Engine(
        tiny_session, RECIPE, RequestProcessor(tiny_session, KnownHits(), max_new_tokens=6), Adapters(tiny_session)
    )
    yield made
    made.close()


def test_a_mixed_batch_answers_each_question_as_it_does_alone(engine: Engine) -> None:
    rng = random.Random(0)
    requests = [
        Request(
            f"What is {'x' * rng.randint(1, 30)}",
            rng.choice(MODES),
            rng.randint(1, 4),
            rng.choice(["sum", "mean", "score"]),
        )
        for _ in range(20)
    ]
    together = engine.answer_batch(requests)
    for request, answer in zip(requests, together, strict=True):
        alone = engine.answer(request)
        assert (alone.text, alone.passages, alone.prompt_tokens) == (answer.text, answer.passages, answer.prompt_tokens)
        assert answer.question == request.question


def test_the_modes_put_passages_into_the_prompt_or_the_weights(engine: Engine) -> None:
    answers = {mode: engine.answer(Request("Who?", mode, 2)) for mode in MODES}
    places = {mode: {(p.in_weights, p.in_prompt) for p in answer.passages} for mode, answer in answers.items()}
    assert places == {"closed": set(), "rag": {(False, True)}, "prag": {(True, False)}, "combine": {(True, True)}}
    assert [passage.text for passage in answers["combine"].passages] == [passage.text for passage in PASSAGES[:2]]
    assert answers["closed"].prompt_tokens == answers["prag"].prompt_tokens < answers["rag"].prompt_tokens
    assert len({answer.text for answer in answers.values()}) == 4
    assert set(answers["prag"].milliseconds) == {"retrieve", "fetch", "prompt", "wait", "inject", "prefill", "decode"}


def test_the_passage_of_a_damaged_adapter_goes_into_the_prompt(tiny_session: BaseModel) -> None:
    adapters = Adapters(tiny_session)
    adapters.broken = {PASSAGES[1].key}
    engine = Engine(tiny_session, RECIPE, RequestProcessor(tiny_session, KnownHits(), max_new_tokens=4), adapters)
    answer = engine.answer(Request("Who?", "prag", 2))
    engine.close()
    assert [(p.in_weights, p.in_prompt) for p in answer.passages] == [(True, False), (False, True)]
    assert "cut short" in answer.passages[1].note
    tokenizer = tiny_session.tokenizer
    with_text = len(question_ids(tokenizer, "Who?", [PASSAGES[1].text]))
    assert answer.prompt_tokens > with_text


class Scores:
    """A retriever that finds the first passages with these scores."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        return [Hit(passage, score) for passage, score in zip(PASSAGES, self.scores[:top_k], strict=False)]


def test_auto_answers_in_the_mode_that_it_chooses(tiny_session: BaseModel) -> None:
    route = Route(closed_below=2.0, prag_score=4.0, prag_next=0.5, otherwise="combine")
    location = AdapterLocation(PASSAGES[0].key, "s", 0, 1, "c", "float32", 5, 0.5, 0.1)

    def answers(scores: Scores, trained: set[str], mode: str, top_k: int = 1) -> Answer:
        processor = RequestProcessor(
            tiny_session,
            scores,
            max_new_tokens=6,
            find=lambda key: location if key in trained else None,
            route=route,
        )
        engine = Engine(tiny_session, RECIPE, processor, Adapters(tiny_session))
        (found,) = engine.answer_batch([Request("Who?", mode, top_k)])
        assert engine.answer(Request("Who?", mode, top_k)).text == found.text
        engine.close()
        return found

    best = {PASSAGES[0].key}
    for mode, scores, trained in (
        ("closed", Scores(), best),
        ("closed", Scores(1.9), best),
        ("rag", Scores(9.0, 1.0), {PASSAGES[1].key}),
        ("prag", Scores(9.0, 4.5), best),
        ("combine", Scores(9.0, 4.6), best),
    ):
        chosen, named = answers(scores, trained, "auto"), answers(scores, trained, mode)
        assert chosen.mode == mode
        assert chosen.why.startswith(f"{mode}: ")
        assert named.why == ""
        # The next passage was looked at, but is not used: the answer is that of the mode with the same top_k.
        assert (chosen.text, chosen.passages) == (named.text, named.passages)
        assert chosen.prompt_tokens == named.prompt_tokens
    assert len(answers(Scores(9.0, 4.6, 4.5), best, "auto", top_k=3).passages) == 3
    # Without a ledger nobody knows what has an adapter.
    engine = Engine(tiny_session, RECIPE, RequestProcessor(tiny_session, KnownHits()), Adapters(tiny_session))
    with pytest.raises(ValueError, match="'auto' needs a snapshot"):
        engine.answer(Request("Who?", "auto"))
    engine.close()


def test_a_least_score_leaves_passages_out_and_not_what_auto_compares(tiny_session: BaseModel) -> None:
    class Filtered(Scores):
        def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
            return [hit for hit in super().search(question, top_k) if hit.score >= min_score]

    route = Route(closed_below=1.0, prag_score=5.0, prag_next=0.8, otherwise="combine")
    location = AdapterLocation(PASSAGES[0].key, "s", 0, 1, "c", "float32", 5, 0.5, 0.1)
    processor = RequestProcessor(tiny_session, Filtered(10.0, 9.5), find=lambda key: location, route=route)
    for least, mode, used in ((0.0, "combine", 2), (9.8, "combine", 1), (11.0, "closed", 0)):
        found = processor.search(Request("Who?", "auto", 2, min_score=least))
        assert (found.mode, len(found.hits)) == (mode, used)


def test_auto_knows_nothing_of_what_its_asker_may_not_read(tiny_session: BaseModel) -> None:
    class Guarded(Scores):
        def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
            first, *rest = super().search(question, top_k, min_score)
            return [replace(first, passage=replace(first.passage, access=("hr",))), *rest]

    route = Route(closed_below=1.0, prag_score=5.0, prag_next=0.9, otherwise="combine")
    processor = RequestProcessor(tiny_session, Guarded(9.0, 3.0, 2.0), find=lambda key: None, route=route)
    found = processor.search(Request("Who?", "auto", access=frozenset()))
    assert [hit.passage for hit in found.hits] == [PASSAGES[1]]
    assert found.why == "rag: the best passage scores 3.0, and has no adapter"
    assert processor.search(Request("Who?", "auto", access=frozenset({"hr"}))).why.startswith(
        "rag: the best passage scores 9.0"
    )


def test_a_failed_answer_of_auto_says_what_was_chosen(tiny_session: BaseModel) -> None:
    processor = RequestProcessor(tiny_session, Scores(9.0), find=lambda key: None)
    engine = Engine(tiny_session, RECIPE, processor, Adapters(tiny_session))
    (answer,) = engine.answer_batch([Request("Who? " * 5000, "auto")])
    engine.close()
    assert (answer.mode, answer.finish, answer.text) == ("rag", "error", "")
    assert answer.why.startswith("rag: ")


def test_weights() -> None:
    hits = [Hit(PASSAGES[0], 4.0), Hit(PASSAGES[1], 2.0)]
    assert hit_weights(hits, "sum") == [1.0, 1.0]
    assert hit_weights(hits, "mean") == [0.5, 0.5]
    assert hit_weights(hits, "score") == [1.0, 0.25]
    # The best may come second: a control, or an asker's own passages.
    assert hit_weights(hits[::-1], "score") == [0.25, 1.0]
    assert hit_weights([Hit(PASSAGES[0], 2.0), Hit(PASSAGES[1], -1.0)], "score") == [1.0, 0.0]
    assert hit_weights([Hit(PASSAGES[0], 0.0)], "score") == [1.0]
    assert hit_weights([], "mean") == []


def test_the_strength_of_combine(tiny_session: BaseModel) -> None:
    class Halved(Adapters):
        def get(self, key: str):
            return {name: f / 2 if name.endswith(".B") else f for name, f in super().get(key).items()}

    def answers(adapters: Adapters, strength: float, *requests: Request):
        processor = RequestProcessor(tiny_session, KnownHits(), max_new_tokens=6, combine_strength=strength)
        engine = Engine(tiny_session, RECIPE, processor, adapters)
        found = engine.answer_batch(requests)
        engine.close()
        return found

    combine, prag = Request("Who?", "combine", 2, "sum"), Request("Who?", "prag", 2, "sum")
    whole = answers(Adapters(tiny_session), 1.0, combine, prag)
    half = answers(Adapters(tiny_session), 0.5, combine, prag, replace(combine, strength=1.0))
    halved = answers(Halved(tiny_session), 1.0, combine)
    # It is of combine alone, what a request says counts first, and it is the same as a weaker adapter.
    assert half[0].text == halved[0].text != whole[0].text
    assert [p.weight for p in half[0].passages] == [0.5, 0.5]
    assert half[1].text == whole[1].text
    assert half[2].text == whole[0].text
    with pytest.raises(ValueError, match="strength"):
        replace(combine, strength=0.0)


def test_a_reader_is_added_where_passages_are_in_the_prompt(tiny_session: BaseModel) -> None:
    source = Adapters(tiny_session)
    reader = flatten_adapter(source.layout, source.get(PASSAGES[4].key), dtype=torch.float32)
    plain, reading = (
        RequestProcessor(tiny_session, KnownHits(), max_new_tokens=6, combine_strength=1.0, reader=given)
        for given in (None, (reader, 0.5))
    )
    requests = [Request("Who?", mode, 2, "sum") for mode in MODES]
    texts = []
    for processor in (plain, reading):
        engine = Engine(tiny_session, RECIPE, processor, source)
        texts.append([answer.text for answer in engine.answer_batch(requests)])
        engine.close()
    assert [mode for mode, a, b in zip(MODES, *texts, strict=True) if a != b] == ["rag", "combine"]
    # A request can do without it, as the column `rag` of an evaluation does.
    engine = Engine(tiny_session, RECIPE, reading, source)
    assert engine.answer(Request("Who?", "rag", 2, "sum", reader=False)).text == texts[0][MODES.index("rag")]
    engine.close()
    # In `prag` it reads for a passage without an adapter.
    hits = tuple(KnownHits().search("Who?", 2))
    missing = dict.fromkeys((hit.passage.key for hit in hits), AdapterError("none"))
    prag = Found(requests[MODES.index("prag")], hits, "prag")
    assert [given[0] for given in reading.build(prag, missing, {}).decode.adapters] == [reader]

    # It is a summand beside the passages' own, but where no passage is found, and where their sum was too large.
    combine = requests[-1]
    adapters = dict.fromkeys((hit.passage.key for hit in hits), reader)
    prepared = reading.build(Found(combine, hits, "combine"), adapters, {})
    assert [weight for _, weight in prepared.decode.adapters] == [1.0, 1.0, 0.5]
    assert prepared.decode.adapters[-1][0] is reader
    assert [passage.weight for passage in prepared.passages] == [1.0, 1.0]
    assert reading.without_adapters(prepared).decode.adapters == ()
    assert reading.build(Found(combine, (), "combine"), {}, {}).decode.adapters == ()


def test_without_hits_the_bare_model_answers(tiny_session: BaseModel) -> None:
    class Nothing:
        def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
            return []

    engine = Engine(
        tiny_session, RECIPE, RequestProcessor(tiny_session, Nothing(), max_new_tokens=6), Adapters(tiny_session)
    )
    texts = {engine.answer(Request("Who?", mode)).text for mode in MODES}
    engine.close()
    assert len(texts) == 1


def test_the_model_may_reason_before_it_answers(tiny_session: BaseModel) -> None:
    recipe = replace(RECIPE, template="chain_of_thought")
    processor = RequestProcessor(tiny_session, KnownHits(), template=recipe.template, max_new_tokens=4)
    engine = Engine(tiny_session, recipe, processor, Adapters(tiny_session))
    answer = engine.answer(Request("Who?", "combine", 2))
    engine.close()
    tokenizer, template = tiny_session.tokenizer, recipe.template
    prompt = question_ids(tokenizer, "Who?", [p.text for p in PASSAGES[:2]], template=template)
    assert answer.prompt_tokens == len(prompt) + len(answer_prefix_ids(tokenizer, template))
    assert answer.reasoning
    assert answer.text == final_answer(answer.reasoning, template)


def test_turns_that_the_template_refuses_leave_other_questions_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    monkeypatch.setattr(engine.base.tokenizer, "chat_template", refuse + engine.base.tokenizer.chat_template)
    asked = Request("Who?", "prag", 1)
    refused, answered = engine.answer_batch([replace(asked, history=(("system", "Be brief."),)), asked])
    assert (refused.finish, "no system text" in refused.error) == ("error", True)
    assert (answered.text, answered.error) == (engine.answer(asked).text, "")
    with pytest.raises(TurnsError, match="no system text"):
        engine.answer(replace(asked, history=(("system", "Be brief."),)))


@pytest.mark.parametrize("setting", ["temperature", "strength", "min_score", "top_p"])
def test_a_number_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        Request("Who?", **{setting: float("nan")})


@pytest.mark.parametrize(
    ("setting", "known"), [("mode", "closed, rag, prag, combine, auto"), ("weights", "sum, mean, score")]
)
def test_an_unknown_mode_or_rule_is_refused_with_those_known(setting: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"^{setting} 'fast': known are {known}$"):
        Request("Who?", **{setting: "fast"})
