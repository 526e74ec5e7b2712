"""Counters of requests that cost little to count: sums in a dictionary, which become Prometheus' metrics when read.

A counter of prometheus_client takes a lock and a look-up by label each time, 2 us; a request has nine of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Sums(Collector):
    """A counter with labels. Only the event loop's thread may count and read.

    Args:
        name: Its name, without `_total`.
        documentation: What it counts.
        labels: Their names.
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], amount: float = 1) -> None:
        """Add to what has these labels."""
        self._sums[labels] = self._sums.get(labels, 0) + amount

    def collect(self) -> Iterator[Metric]:
        """Return all sums."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, amount in self._sums.items():
            family.add_metric(labels, amount)
        yield family


class Histogram(Collector):
    """How long something took, by model. Only the event loop's thread may count and read.

    Args:
        name: Its name.
        documentation: What it measures.
        bounds: Upper bounds of its buckets, in seconds, ascending.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, bounds
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def show(self, model: str) -> None:
        """Have a row for a model, with zeros until something is observed."""
        if model not in self._buckets:
            self._buckets[model], self._sums[model] = [0] * (len(self._bounds) + 1), 0.0

    def observe(self, model: str, seconds: float) -> None:
        """Count one."""
        if (buckets := self._buckets.get(model)) is None:
            self.show(model)
            buckets = self._buckets[model]
        buckets[bisect_left(self._bounds, seconds)] += 1
        self._sums[model] += seconds

    def collect(self) -> Iterator[Metric]:
        """Return all buckets, each with what the smaller ones have."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model"])
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for model, counts in self._buckets.items():
            totals = [float(sum(counts[: index + 1])) for index in range(len(counts))]
            family.add_metric([model], list(zip(names, totals, strict=True)), self._sums[model])
        yield family
