"""What requests cost: a share of their replica's price, or the price of their tokens where the operator sells these."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from service.in_engine.vllm_service.usage_report import EngineUsage
from service.registry.entries import ModelSpec, TokenPrices
from service.usage.records import UsageRecord

_HOUR_S = 3600.0
_MILLION = 1_000_000


def cost(usage: EngineUsage | None, dollars_per_hour: float | None) -> float | None:
    """Return a request's share of what its replica costs; None: the replica has no price, or died and told nothing."""
    if usage is None or dollars_per_hour is None:
        return None
    return usage.share_s * dollars_per_hour / _HOUR_S


def dollars(usage: EngineUsage | None, prices: TokenPrices | None, share: float | None) -> float | None:
    """Return what the caller owes: the price of the tokens where the model's entry has one, else the share."""
    if usage is None or prices is None:
        return share
    cached = prices.input if prices.cached is None else prices.cached
    new = (usage.tokens_in - usage.tokens_cached) * prices.input
    return (new + usage.tokens_cached * cached + usage.tokens_out * prices.output) / _MILLION


def aborted_request(fields: Mapping[str, Any], spec: ModelSpec, dollars_per_hour: float | None = None) -> UsageRecord:
    """Return the record of what an aborted request used; that it was made is in another one.

    Args:
        fields: As `Replica.on_usage` gets them.
        spec: The model.
        dollars_per_hour: Price of the replica; None: it has none.
    """
    counts = {name: fields[name] for name in ("tokens_in", "tokens_cached", "tokens_out")}
    usage = EngineUsage(**counts, share_s=fields["share_s"])
    share = cost(usage, dollars_per_hour)
    return UsageRecord(
        at=time.time(),
        key=unquote(fields["client"]),
        model=spec.key,
        **counts,
        seconds=0.0,
        status=0,
        replica=fields["replica"],
        cost=share,
        dollars=dollars(usage, spec.price, share),
    )
