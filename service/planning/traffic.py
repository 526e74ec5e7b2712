"""Scale to zero in closed form: what a pool costs, and who waits, when requests come at random. Pure.

Requests come as a Poisson process of rate r. A request that finds no replica starts one, which takes the boot's seconds
b; those that come meanwhile wait for it. Then each keeps the replica up for its own seconds and the scaledown window
after it, together d, and requests run beside one another: the busy period of a queue with unlimited servers
(M/G/infinity), which lasts (e^(rd) - 1) / r and does not depend on how the seconds are distributed. So one cycle lasts
b + e^(rd) / r, the replica is up for all of it but 1 / r, and rb + e^(rd) requests come in it, of which 1 + rb wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_HOUR_S, _DAY_H = 3600.0, 24.0
_LARGEST = 700.0  # beyond it e^x is no number; the replica is then always up


@dataclass(frozen=True)
class Traffic:
    """What a pool gets.

    Attributes:
        requests_per_hour: On average.
        request_s: Seconds that a request runs.
        boot_s: Seconds from a request to a replica that is ready.
    """

    requests_per_hour: float
    request_s: float
    boot_s: float


@dataclass(frozen=True)
class ScaleToZero:
    """What a scaledown window leads to.

    Attributes:
        up_share: Share of the time in which a replica boots or is up, which is billed.
        cold_share: Share of the requests that find no replica that is ready.
        mean_wait_s: Seconds that a request waits for a boot, on average over all.
        boots_per_day: How often a replica boots.
    """

    up_share: float
    cold_share: float
    mean_wait_s: float
    boots_per_day: float

    @property
    def hours_per_day(self) -> float:
        """Hours that are billed in a day."""
        return self.up_share * _DAY_H


def scale_to_zero(traffic: Traffic, window_s: float) -> ScaleToZero:
    """Return what traffic does to a pool of one replica with this scaledown window."""
    rate, boot = traffic.requests_per_hour / _HOUR_S, traffic.boot_s
    exponent = rate * (traffic.request_s + window_s)
    if rate == 0:
        return ScaleToZero(0.0, 1.0, boot, 0.0)
    if exponent > _LARGEST:
        return ScaleToZero(1.0, 0.0, 0.0, 0.0)
    grown = math.exp(exponent)
    requests = rate * boot + grown  # in a cycle
    cycle_s = requests / rate
    return ScaleToZero(
        up_share=1 - 1 / requests,
        cold_share=(1 + rate * boot) / requests,
        mean_wait_s=(boot + rate * boot * boot / 2) / requests,
        boots_per_day=_DAY_H * _HOUR_S / cycle_s,
    )


@dataclass(frozen=True)
class Replica:
    """What one replica costs and can carry.

    Attributes:
        dollars_per_hour: Its price.
        slots: Requests that run on it at once.
        window_s: Its scaledown window.
    """

    dollars_per_hour: float
    slots: float
    window_s: float

    def capacity(self, traffic: Traffic) -> float:
        """Return how many requests an hour it carries."""
        return self.slots / traffic.request_s * _HOUR_S

    def count(self, traffic: Traffic) -> int:
        """Return how many replicas the traffic takes."""
        return math.ceil(traffic.requests_per_hour / self.capacity(traffic))

    def dollars_per_day(self, traffic: Traffic) -> float:
        """Return what the traffic costs in a day, with as many replicas as it takes."""
        replicas = self.count(traffic)
        hours = scale_to_zero(traffic, self.window_s).hours_per_day if replicas <= 1 else replicas * _DAY_H
        return hours * self.dollars_per_hour

    def dollars_per_million(self, traffic: Traffic, tokens: int) -> float:
        """Return what 1M tokens cost, with so many tokens of prompt and answer a request."""
        return self.dollars_per_day(traffic) / (traffic.requests_per_hour * _DAY_H * tokens) * 1e6

    def break_even(self, traffic: Traffic, tokens: int, market: float) -> float | None:
        """Return the requests an hour from which 1M tokens of one replica cost less than elsewhere; None: never."""

        def cost(requests_per_hour: float) -> float:
            loaded = Traffic(requests_per_hour, traffic.request_s, traffic.boot_s)
            return self.dollars_per_million(loaded, tokens)

        low, high = 1e-3, self.capacity(traffic)
        if cost(high) >= market:
            return None
        if cost(low) <= market:
            return 0.0
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if cost(middle) > market else (low, middle)
        return high

    def second_break_even(self, traffic: Traffic, tokens: int, market: float) -> float:
        """Return the requests an hour from which two replicas pay, where one does; at the least what one carries.

        A second one doubles the cost at once. Where it pays at once, further ones do so too: each adds a smaller share.
        """
        return max(self.capacity(traffic), 2 * self.dollars_per_hour / (market * tokens) * 1e6)
