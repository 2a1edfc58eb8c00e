"""What work will cost, from measured batches, with how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_Z = 1.959964  # of the normal distribution, two-sided at 95 %


@dataclass(frozen=True)
class Moments:
    """Sums over batches of what each did (`units`: tokens or passages) and the seconds that it took one actor."""

    batches: int = 0
    units: float = 0.0
    seconds: float = 0.0
    units_units: float = 0.0
    units_seconds: float = 0.0
    seconds_seconds: float = 0.0

    @classmethod
    def of(cls, batches: Iterable[tuple[float, float]]) -> Moments:
        """Return the sums over pairs of units and seconds."""
        total = cls()
        for units, seconds in batches:
            total += cls(1, units, seconds, units * units, units * seconds, seconds * seconds)
        return total

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.batches + other.batches,
            self.units + other.units,
            self.seconds + other.seconds,
            self.units_units + other.units_units,
            self.units_seconds + other.units_seconds,
            self.seconds_seconds + other.seconds_seconds,
        )

    @property
    def rate(self) -> Quantity | None:
        """Seconds a unit, as all seconds over all units; None where nothing was measured.

        Its error is that of a ratio of means: from how far each batch is from the rate times its units. Passages of
        one batch share its time, so the batches are the observations.
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
    """An estimate; `error` is its standard error as a share of it, None where one observation tells none.

    `freedom` is the number of observations that the error rests on, less one.
    """

    value: float
    error: float | None
    freedom: int

    def times(self, other: Quantity) -> Quantity:
        """Return the product of two independent estimates."""
        error = None if self.error is None or other.error is None else math.hypot(self.error, other.error)
        return Quantity(self.value * other.value, error, min(self.freedom, other.freedom))

    def scaled(self, factor: float) -> Quantity:
        """Return so many times this estimate."""
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
        """The 95 % interval, by Student's distribution; None without an error."""
        if self.error is None or self.freedom < 1:
            return None
        half = student(self.freedom) * self.error * self.value
        return max(0.0, self.value - half), self.value + half


def mean(values: Sequence[float]) -> Quantity:
    """Return the mean of independent observations, of which there is one at least."""
    count = len(values)
    middle = sum(values) / count
    if count < 2:
        return Quantity(middle, None, count - 1)
    error = math.sqrt(sum((value - middle) ** 2 for value in values) / (count * (count - 1)))
    return Quantity(middle, error / middle if middle else 0.0, count - 1)


def exactly(value: float) -> Quantity:
    """Return what is known for sure."""
    return Quantity(value, 0.0, 10**9)


def student(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's distribution, within 1 %."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in exact:
        return exact[freedom]
    z, n = _Z, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
