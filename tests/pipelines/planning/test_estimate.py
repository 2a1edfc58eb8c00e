"""The 95 % intervals of estimates contain the true value in about 95 of 100 cases."""

from __future__ import annotations

import random

import pytest

from pipelines.planning.estimate import Moments, Quantity, exactly, mean, student


def batches(generator: random.Random, count: int, rate: float = 0.02) -> list[tuple[float, float]]:
    """Return batches of uneven size, each with its own speed."""
    sizes = [generator.uniform(2000, 9000) for _ in range(count)]
    return [(size, rate * size * generator.lognormvariate(0, 0.3)) for size in sizes]


def covered(quantity: Quantity, truth: float) -> bool:
    assert quantity.interval is not None
    low, high = quantity.interval
    return low <= truth <= high


@pytest.mark.parametrize("count", [5, 30])
def test_the_interval_of_the_rate_covers_the_truth(count: int) -> None:
    generator = random.Random(count)
    truth = 0.02 * 2.718281828 ** (0.3**2 / 2)  # the mean of the lognormal factor
    hits = sum(covered(Moments.of(batches(generator, count)).rate, truth) for _ in range(1000))
    assert 900 <= hits <= 985


def test_the_interval_of_a_product_covers_the_truth() -> None:
    generator = random.Random(3)
    truth = 0.02 * 2.718281828 ** (0.3**2 / 2) * 900.0
    hits = 0
    for _ in range(1000):
        tokens = mean([generator.gauss(900, 200) for _ in range(64)])
        hits += covered(Moments.of(batches(generator, 20)).rate.times(tokens), truth)
    assert 900 <= hits <= 985


def test_more_batches_give_a_smaller_error_and_sums_do_not_depend_on_the_split() -> None:
    made = batches(random.Random(0), 40)
    whole = Moments.of(made)
    parts = sum((Moments.of(made[i : i + 7]) for i in range(0, 40, 7)), Moments())
    assert parts.rate.value == pytest.approx(whole.rate.value)
    assert parts.rate.error == pytest.approx(whole.rate.error)
    assert whole.rate.error < Moments.of(made[:10]).rate.error


def test_without_enough_observations_there_is_no_estimate() -> None:
    assert Moments().rate is None
    assert Moments.of([(10, 1)]).rate.interval is None
    assert exactly(3).plus(Quantity(2.0, None, 0)).interval is None
    assert exactly(3).scaled(2).interval == (6, 6)


@pytest.mark.parametrize(("freedom", "table"), [(2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045), (10**6, 1.96)])
def test_students_quantile(freedom: int, table: float) -> None:
    assert student(freedom) == pytest.approx(table, rel=0.01)
