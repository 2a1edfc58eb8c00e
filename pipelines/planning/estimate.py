"""Estimates of cost from measured batches, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

_Z = 1.959964  # the two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Moments:
    """Sums over batches: the units of each (tokens or passages), its seconds on one actor, and their products."""

    batches: int = 0
    units: float = 0.0
    seconds: float = 0.0
    units_units: float = 0.0
    units_seconds: float = 0.0
    seconds_seconds: float = 0.0

    @classmethod
    def of(cls, batches: Iterable[tuple[float, float]]) -> Moments:
        """Return the sums over batches, each given as (units, seconds)."""
        return sum((cls(1, u, s, u * u, u * s, s * s) for u, s in batches), cls())

    def __add__(self, other: Moments) -> Moments:
        return Moments(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def rate(self) -> Quantity | None:
        """The seconds per unit, as all seconds divided by all units; None if nothing was measured.

        The error is that of a ratio of means: it comes from the distance of each batch's seconds from the rate times
        its units. The observations are batches, because the passages of a batch share its time.
        """
        if not self.units:
            return None
        rate = self.seconds / self.units
        if self.batches < 2:
            return Quantity(rate, None, self.batches - 1)
        squares = self.seconds_seconds - 2 * rate * self.units_seconds + rate * rate * self.units_units
        error = math.sqrt(max(0.0, squares) / (self.batches * (self.batches - 1))) / (self.units / self.batches)
        return Quantity(rate, error / rate if rate else 0.0, self.batches - 1)


@dataclass(frozen=True)
class Quantity:
    """An estimate; `error` is its standard error relative to `value`, None if there was only one observation.

    `freedom` is the number of degrees of freedom of the error: its observations less one.
    """

    value: float
    error: float | None
    freedom: int

    def times(self, other: Quantity) -> Quantity:
        """Return the product of two independent estimates."""
        error = None if self.error is None or other.error is None else math.hypot(self.error, other.error)
        return Quantity(self.value * other.value, error, min(self.freedom, other.freedom))

    def scaled(self, factor: float) -> Quantity:
        """Return this estimate times a known factor."""
        return Quantity(self.value * factor, self.error, self.freedom)

    def plus(self, other: Quantity) -> Quantity:
        """Return the sum of two independent estimates."""
        value = self.value + other.value
        if self.error is None or other.error is None:
            return Quantity(value, None, min(self.freedom, other.freedom))
        error = math.hypot(self.error * self.value, other.error * other.value)
        return Quantity(value, error / value if value else 0.0, min(self.freedom, other.freedom))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval by Student's t distribution; None without an error."""
        if self.error is None or self.freedom < 1:
            return None
        half = student(self.freedom) * self.error * self.value
        return max(0.0, self.value - half), self.value + half


def mean(values: Sequence[float]) -> Quantity:
    """Return the mean of independent observations; there must be at least one."""
    count = len(values)
    middle = sum(values) / count
    if count < 2:
        return Quantity(middle, None, count - 1)
    error = math.sqrt(sum((value - middle) ** 2 for value in values) / (count * (count - 1)))
    return Quantity(middle, error / middle if middle else 0.0, count - 1)


def exactly(value: float) -> Quantity:
    """Return a value that is known without error."""
    return Quantity(value, 0.0, 10**9)


def student(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution, within 1 % (Cornish-Fisher expansion)."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in exact:
        return exact[freedom]
    z, n = _Z, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
