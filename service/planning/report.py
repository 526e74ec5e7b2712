"""The answer of `vllm-service plan`: fit, price, and what traffic makes of them, as data. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from service.boots.groups import usual_seconds
from service.boots.records import BootRecord
from service.errors import UsageError
from service.planning import prices as planning_prices
from service.planning.changes import Change, changes, cheapest
from service.planning.fit import Fit, PlannedModel, Verdict, fit
from service.planning.prices import VOLUME_FREE_GIB, Hourly, volume_per_month
from service.planning.ranges import Range
from service.planning.traffic import Replica, ScaleToZero, Traffic, scale_to_zero
from service.registry.prices import Prices
from service.registry.tiers import Tier
from service.settings import Settings

_ASSUMED_BOOT_S = 120.0
_WINDOWS_S = (30, 60, 120, 300, 600, 900, 1800, 3600)
_LOADS = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
_Figure = TypeVar("_Figure", int, float)


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        tier: None: the cheapest that fits.
        max_model_len: None: the entry's, else the model's own.
        tokens_in: Of the prompt of a typical request.
        tokens_out: Of its answer.
        boot_s: None: as recorded, else assumed.
        market: Dollars for 1M tokens of prompts and of answers elsewhere.
    """

    planned: PlannedModel
    tier: Tier | None
    settings: Settings
    max_model_len: int | None
    requests_per_hour: float
    tokens_in: int
    tokens_out: int
    request_s: float
    boot_s: float | None = None
    market: tuple[float, float] | None = None

    @property
    def fast_boot(self) -> bool:
        """Whether compilation and CUDA graphs are skipped."""
        settings = self.settings
        return settings.snapshot != "gpu" if settings.fast_boot is None else settings.fast_boot

    @property
    def tokens(self) -> int:
        """Of a typical request."""
        return self.tokens_in + self.tokens_out

    @property
    def market_per_million(self) -> float | None:
        """What 1M tokens of this mixture cost elsewhere."""
        if self.market is None:
            return None
        return (self.tokens_in * self.market[0] + self.tokens_out * self.market[1]) / self.tokens


@dataclass(frozen=True)
class Load:
    """What a load costs with the scaledown window of the settings."""

    requests_per_hour: float
    dollars_per_day: float
    dollars_per_million: float


@dataclass(frozen=True)
class Answer:
    """What is known then.

    Attributes:
        cheapest: The cheapest tier that is sure to fit; None: there is none.
        changes: What makes it fit; none where it does.
        boot_s: Of the traffic.
        boot_source: Where these seconds are from.
        windows: By seconds of a scaledown window; none where the traffic takes several replicas, which are always up.
        break_even: Requests an hour from which one replica costs less than the market; None: never, or no market was
            given.
        second_break_even: Likewise of two replicas; what one carries where a second one pays at once.
    """

    question: Question
    fit: Fit
    cheapest: Fit | None
    changes: Sequence[Change]
    prices: Prices
    hourly: Hourly
    traffic: Traffic
    boot_source: str
    replica: Replica
    windows: dict[int, ScaleToZero]
    loads: Sequence[Load]
    break_even: float | None
    second_break_even: float | None

    def gpu_price(self, tier: Tier) -> float:
        """Return what a tier's GPUs cost in an hour in the region of the settings."""
        return self.prices.of(tier, self.question.settings.region)

    def dollars_per_day(self, outcome: ScaleToZero) -> float:
        """Return what a replica costs that is up so long."""
        return outcome.hours_per_day * self.replica.dollars_per_hour

    def as_object(self) -> dict[str, Any]:
        """Return it for programs."""
        fitted, question, market = self.fit, self.question, self.question.market_per_million
        return {
            "model": fitted.model.spec.key,
            "gpu": fitted.tier.gpu.name,
            "n_gpu": fitted.tier.n_gpu,
            "verdict": fitted.verdict.value,
            "why_refused": fitted.why_refused,
            "max_model_len": fitted.max_model_len,
            "measured": False,
            "bytes_per_gpu": {
                "memory": _ends(fitted.memory),
                **{name: _ends(part) for name, part in fitted.parts.items()},
                "KV cache": _ends(fitted.kv_bytes),
            },
            "kv_cache": {
                "dtype": fitted.kv_cache_dtype or "auto",
                "bytes_per_token_per_gpu": round(fitted.cache.token_bytes),
                "bytes_per_request_per_gpu": fitted.cache.request_bytes(fitted.max_model_len),
                "tokens": _ends(fitted.tokens),
                "requests_of_max_model_len": _ends(fitted.sequences(fitted.max_model_len), 2),
                "requests_of_typical_length": _ends(fitted.sequences(question.tokens), 2),
            },
            "changes": [
                {
                    "change": one.text,
                    "gpu": one.fitted.tier.gpu.name,
                    "n_gpu": one.fitted.tier.n_gpu,
                    "max_model_len": one.fitted.max_model_len,
                    "gpu_dollars_per_hour": round(one.dollars_per_hour, 2),
                }
                for one in self.changes
            ],
            "cheapest": self.cheapest
            and {
                "gpu": self.cheapest.tier.gpu.name,
                "n_gpu": self.cheapest.tier.n_gpu,
                "gpu_dollars_per_hour": round(self.gpu_price(self.cheapest.tier), 2),
            },
            "prices": {
                "source": self.prices.source,
                "gpus_per_hour": round(self.hourly.gpus, 4),
                "cpu_per_hour": _ends(self.hourly.cpu, 4),
                "memory_per_hour": _ends(self.hourly.memory, 4),
                "surcharge": self.hourly.surcharge,
                "total_per_hour": _ends(self.hourly.total, 4),
                "volume_per_month": round(volume_per_month(fitted.model.weights_bytes), 2),
                "volume_free_gib": VOLUME_FREE_GIB,
            },
            "traffic": {
                "requests_per_hour": self.traffic.requests_per_hour,
                "tokens_in": question.tokens_in,
                "tokens_out": question.tokens_out,
                "request_seconds": self.traffic.request_s,
                "boot_seconds": self.traffic.boot_s,
                "boot_source": self.boot_source,
                "capacity_requests_per_hour": round(self.replica.capacity(self.traffic), 1),
                "replicas": self.replica.count(self.traffic),
            },
            "windows": [
                {
                    "scaledown_window": window,
                    "dollars_per_day": round(self.dollars_per_day(outcome), 2),
                    "cold_share": round(outcome.cold_share, 4),
                    "mean_wait_seconds": round(outcome.mean_wait_s, 2),
                    "boots_per_day": round(outcome.boots_per_day, 2),
                }
                for window, outcome in self.windows.items()
            ],
            "loads": [
                {
                    "requests_per_hour": load.requests_per_hour,
                    "dollars_per_day": round(load.dollars_per_day, 2),
                    "dollars_per_million_tokens": round(load.dollars_per_million, 4),
                }
                for load in self.loads
            ],
            "market_dollars_per_million_tokens": market,
            "break_even_requests_per_hour": self.break_even and round(self.break_even, 1),
            "second_replica_break_even_requests_per_hour": self.second_break_even and round(self.second_break_even, 1),
        }


def answer(question: Question, prices: Prices, boots: Sequence[BootRecord]) -> Answer:
    """Return the answer.

    Args:
        question: What is asked.
        prices: Of this moment.
        boots: Records of boots, of which those of this model on this GPU count.

    Raises:
        UnknownShapeError: It is not known what vLLM keeps of the model.
    """
    price, fast_boot = partial(prices.of, region=question.settings.region), question.fast_boot
    fitted = _fitted(question, price)
    spec, tier = question.planned.spec, fitted.tier
    recorded = usual_seconds(boots, spec.key, tier.gpu.is_named_in)
    boot_s, source = recorded or _ASSUMED_BOOT_S, "recorded boots" if recorded else "assumed, none is recorded"
    if question.boot_s is not None:
        boot_s, source = question.boot_s, "--boot-seconds"
    settings = question.settings
    hourly = planning_prices.hourly(prices, tier, settings.region)
    slots = min(settings.max_inputs, max(1.0, fitted.sequences(question.tokens).low))
    replica = Replica(hourly.total.high, slots, settings.scaledown_window)
    traffic = Traffic(question.requests_per_hour, question.request_s, boot_s)
    market = question.market_per_million
    windows = sorted({*_WINDOWS_S, settings.scaledown_window})
    break_even = None if market is None else replica.break_even(traffic, question.tokens, market)
    fits = fitted.verdict is Verdict.FITS
    return Answer(
        question=question,
        fit=fitted,
        cheapest=cheapest(fitted, price, fast_boot=fast_boot),
        changes=() if fits else changes(fitted, price, fast_boot=fast_boot),
        prices=prices,
        hourly=hourly,
        traffic=traffic,
        boot_source=source,
        replica=replica,
        windows={window: scale_to_zero(traffic, window) for window in windows if replica.count(traffic) <= 1},
        loads=[_load(replica, traffic, rate, question.tokens) for rate in _loads(question.requests_per_hour)],
        break_even=break_even,
        second_break_even=None
        if market is None or break_even is None
        else replica.second_break_even(traffic, question.tokens, market),
    )


def pair(text: str, option: str, example: str, kind: type[_Figure]) -> tuple[_Figure, _Figure]:
    """Return two figures of an option, for prompts and answers; one counts for both.

    Raises:
        UsageError: It has others than one or two figures of the kind above zero.
    """
    try:
        figures = [kind(part) for part in text.split("/")]
    except ValueError:
        figures = []
    if not 1 <= len(figures) <= 2 or not all(0 < figure < float("inf") for figure in figures):
        what = "whole numbers" if kind is int else "figures"
        raise UsageError(f"{option} '{text}' is not IN/OUT.", hint=f"Write two {what}, such as {example}.")
    return figures[0], figures[-1]


def _fitted(question: Question, price: Callable[[Tier], float]) -> Fit:
    tier, fast_boot = question.tier or question.planned.spec.tier, question.fast_boot
    fitted = fit(question.planned, tier, fast_boot=fast_boot, max_model_len=question.max_model_len)
    return fitted if question.tier else cheapest(fitted, price, fast_boot=fast_boot) or fitted


def _loads(asked: float) -> list[float]:
    return sorted({*_LOADS, *((asked,) if asked else ())})


def _load(replica: Replica, traffic: Traffic, requests_per_hour: float, tokens: int) -> Load:
    loaded = Traffic(requests_per_hour, traffic.request_s, traffic.boot_s)
    return Load(requests_per_hour, replica.dollars_per_day(loaded), replica.dollars_per_million(loaded, tokens))


def _ends(value: Range, digits: int = 0) -> list[float]:
    return [round(end, digits) if digits else int(end) for end in value]
