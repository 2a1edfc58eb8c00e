"""A sampled token is the one at which the sum of the allowed probabilities exceeds the row's number."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from prag_core.llm.sampling import NO_TOKEN, Sampler, make_sampler, pick_tokens

ALL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def sampler(seed: int, **settings: float) -> Sampler:
    made = make_sampler([1, 2, 3], seed=seed, **{**ALL, **settings})
    assert made is not None
    return made


def expected(logits: list[float], seed: int, *, temperature: float, top_k: int, top_p: float) -> int:
    """Return the token by the definition, in plain Python; equal logits count in the order of their ids."""
    exact = torch.tensor(logits, dtype=torch.float64)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    weights = {token: float((exact[token] / temperature).exp()) for token in order}
    total = sum(weights.values())
    kept, before = [], 0.0
    for token in order:
        if top_p == 1 or before < top_p * total or not kept:
            kept.append(token)
        before += weights[token]
    rest = sampler(seed).numbers.random() * sum(weights[token] for token in kept)
    for token in kept if top_k or top_p < 1 else sorted(kept):
        rest -= weights[token]
        if rest < 0:
            return token
    raise AssertionError("the number is below 1")


@pytest.mark.parametrize(
    "settings",
    [
        ALL,
        {**ALL, "temperature": 0.4},
        {**ALL, "top_k": 5},
        {**ALL, "top_p": 0.7},
        {**ALL, "temperature": 2.0, "top_k": 40, "top_p": 0.9},
        {**ALL, "top_k": 10_000},
    ],
)
def test_a_token_is_the_one_at_which_the_sum_exceeds_the_rows_number(settings: dict) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 300).mul(3).bfloat16().float()  # with equal ones, as bf16 has many
    picked = pick_tokens(logits, [sampler(seed, **settings) for seed in range(len(logits))])
    assert picked == [expected(row, seed, **settings) for seed, row in enumerate(logits.tolist())]
    assert len(set(picked)) > 10


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf, 1.0])
    count = 4000
    drawn = Counter(pick_tokens(logits.expand(count, -1), [sampler(seed) for seed in range(count)]))
    assert 3 not in drawn
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        assert drawn[token] / count == pytest.approx(probability, abs=0.03)


def test_a_row_draws_the_same_whatever_its_neighbours_ask_for() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 200).bfloat16()
    settings = [ALL, {**ALL, "top_k": 3}, {**ALL, "top_p": 0.5}, {**ALL, "temperature": 3.0, "top_k": 90}, ALL, ALL]
    samplers = [sampler(seed, **chosen) for seed, chosen in enumerate(settings)]
    together = pick_tokens(logits, [*samplers[:5], None])
    alone = [
        pick_tokens(row[None], [sampler(seed, **chosen)])[0]
        for seed, (row, chosen) in enumerate(zip(logits, settings, strict=True))
    ]
    assert together[:5] == alone[:5]
    assert together[5] == int(logits[5].argmax())


def test_a_row_draws_one_number_a_token() -> None:
    row, twin = sampler(7), sampler(7)
    logits = torch.randn(1, 50)
    for _ in range(3):
        pick_tokens(logits, [row])
        twin.numbers.random()
    assert row.numbers.random() == twin.numbers.random()


def test_of_equal_logits_those_with_lower_ids_are_within_top_k() -> None:
    equal = torch.zeros(200, 10)
    assert set(pick_tokens(equal, [sampler(seed, top_k=3) for seed in range(200)])) == {0, 1, 2}
    assert set(pick_tokens(equal, [sampler(seed, top_p=0.25) for seed in range(200)])) == {0, 1, 2}


@pytest.mark.parametrize("settings", [ALL, {**ALL, "top_k": 2}, {**ALL, "top_p": 0.5}])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(settings: dict) -> None:
    torch.manual_seed(0)
    good = torch.randn(30)
    for bad in (torch.full((30,), torch.nan), torch.full((30,), torch.inf), torch.full((30,), -torch.inf)):
        together = pick_tokens(torch.stack([bad, good]), [sampler(1, **settings), sampler(2, **settings)])
        assert together == [NO_TOKEN, pick_tokens(good[None], [sampler(2, **settings)])[0]]
