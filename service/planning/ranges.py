"""A figure that is not measured: from the least to the most that it may be."""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """The least and the most."""

    low: float
    high: float

    def __add__(self, other: object) -> Range:
        """Return the range of the sum."""
        if not isinstance(other, Range):
            return NotImplemented
        return Range(self.low + other.low, self.high + other.high)

    def minus(self, other: Range) -> Range:
        """Return the range of the difference."""
        return Range(self.low - other.high, self.high - other.low)

    def times(self, factor: float) -> Range:
        """Return the range of the product."""
        return Range(self.low * factor, self.high * factor)
