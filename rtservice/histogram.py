"""Counts of durations by bucket."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """Counts values by bucket, and their sum."""

    __slots__ = ("_bounds", "counts", "sum_us")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds` are the upper bounds of all buckets but the last, in seconds, in ascending order."""
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_us = 0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.sum_us += int(seconds * 1e6)
