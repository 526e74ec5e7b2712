"""An API client: what it may use, how much of its limits it is using, and the errors above them.

All of it is counted in the gateway's process and on its event loop, between two awaits, so that no number of requests
at once gets more in than a limit allows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Self

from service.gateway.metrics import RequestLog
from service.gateway.rate_headers import Headers, RateHeaders
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import protocol_of
from service.usage.limits import (
    NO_LIMITS,
    KeyLimits,
    PeriodTotal,
    Window,
    day_begin,
    day_end,
    month_begin,
    month_end,
    utc_text,
)

_ANSWER_TOKENS = 1000  # that a running request counts for where it names no limit of its own
_BYTES_PER_TOKEN = 4  # of a body, likewise


class RunningRequest:
    """A request of a client, a context while it runs: until its tokens are known, an estimate of them counts.

    Args:
        client: Whose it is.
        log: Has at the end what the engine reported.
    """

    def __init__(self, client: ApiClient, log: RequestLog | None) -> None:
        self._client, self._log = client, log
        self._reserved = 0

    def reserve(self, body_bytes: int, max_tokens: int | None, max_model_len: int | None) -> None:
        """Count an estimate of the tokens. Where `counts_tokens` is false this is not needed.

        Args:
            body_bytes: Size of the body.
            max_tokens: Of the answer, as the body names it.
            max_model_len: The most that the model takes.

        Raises:
            APIError: 429: requests that came at the same time have used the rest up.
        """
        self._client.check_tokens()
        tokens = body_bytes // _BYTES_PER_TOKEN + (_ANSWER_TOKENS if max_tokens is None else max_tokens)
        self._reserve(min(tokens, max_model_len or tokens))

    @property
    def counts_tokens(self) -> bool:
        """Whether its client has a limit of tokens."""
        return self._client.counts_tokens

    def __enter__(self) -> Self:
        """Begin it.

        Raises:
            APIError: 429; `Retry-After` says when the next request may come.
        """
        self._client.begin_request()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Count what it has used; tokens that no engine reported count as they were estimated, for a minute."""
        client, log = self._client, self._log
        no_engine = kind is not None and issubclass(kind, APIError)  # has worked for it
        estimated = 0 if no_engine else self._reserved
        self._reserve(0)
        client.running -= 1
        if client.counts_tokens:
            tokens = log.tokens() if log else None
            if log:
                log.counted = tokens
            client.count_tokens(sum(tokens) if tokens else estimated, is_known=tokens is not None)
        if log and log.dollars:
            client.month_dollars.add(log.dollars)

    def _reserve(self, tokens: int) -> None:
        self._client.reserved += tokens - self._reserved
        self._reserved = tokens


class ApiClient:
    """An API client: its name, its limits, and how much of them it is using.

    Args:
        name: Its name in metrics and request log.
        limits: How much it may use.
        models: Keys of the models that it may use; None: all.
        clock: Seconds that never run backwards, for tests.
        wall_clock: Seconds since 1970, for tests.
        is_anonymous: It has all requests of a service without keys.

    Attributes:
        running: Requests that run.
        reserved: Their estimated tokens.
        counts_tokens: Whether their tokens must be known.
        month_dollars: What it has cost this month.
        day_tokens: What it has used today.
        identity: Tells it from others that had its name; empty: a key of the environment, or none.
    """

    def __init__(
        self,
        name: str,
        limits: KeyLimits | None = None,
        models: frozenset[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        *,
        is_anonymous: bool = False,
    ) -> None:
        self.name, self.is_anonymous = name, is_anonymous
        self.identity = ""
        self._wall_clock = wall_clock
        self._requests, self._tokens = Window(clock), Window(clock)
        self.day_tokens = PeriodTotal(day_begin, day_end, wall_clock)
        self.month_dollars = PeriodTotal(month_begin, month_end, wall_clock)
        self.reserved = self.running = 0
        self.allow(limits or NO_LIMITS, models)

    def allow(self, limits: KeyLimits, models: frozenset[str] | None) -> None:
        """Take new limits; what it has used counts on."""
        self.limits, self.models, self._expires_at = limits, models, limits.expires_at
        self.counts_tokens = limits.counts_tokens
        windows = (
            ("requests", limits.requests_per_minute, self._requests),
            ("tokens", limits.tokens_per_minute, self._tokens),
        )
        self._rate_headers = tuple(
            (RateHeaders(what, most, window, self._wall_clock), window is self._tokens)
            for what, most, window in windows
            if most is not None
        )

    @property
    def is_admin(self) -> bool:
        """Whether it may read all counters; without keys everybody who can connect may."""
        return self.limits.admin or self.is_anonymous

    def check_valid(self) -> None:
        """Refuse a client whose keys have expired.

        Raises:
            APIError: 401.
        """
        if self._expires_at is not None and self._wall_clock() >= self._expires_at:
            raise APIError(
                401,
                f"The key '{self.name}' expired at {utc_text(self._expires_at)}. Ask the operator for another.",
                code="key_expired",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def request(self, log: RequestLog | None = None) -> RunningRequest:
        """Return a context that counts a request while it runs, and then what it used; see `RunningRequest`."""
        return RunningRequest(self, log)

    def begin_request(self) -> None:
        """Count a request that begins.

        Raises:
            APIError: 429.
        """
        self._check()
        if self.limits.requests_per_minute is not None:
            self._requests.add(1)
        self.running += 1

    def may_use(self, key: str) -> bool:
        """Tell whether this client may use a model, and so see it in the list of models."""
        return self.models is None or key in self.models

    def check_model(self, key: str, requested: str) -> None:
        """Refuse a model that this client may not use.

        Raises:
            APIError: 403.
        """
        if self.models is not None and not self.may_use(key):
            allowed = ", ".join(sorted(self.models)) or "none"
            raise APIError(
                403,
                f"The key '{self.name}' may not use model '{requested}'; it may use {allowed}.",
                code="model_not_allowed",
                param="model",
            )

    def _check(self) -> None:
        limits = self.limits
        if (most := limits.concurrency) is not None and self.running >= most:
            raise self._too_many(f"has {self.running} requests running, and its limit is {most} at once", 1)
        if (most := limits.requests_per_minute) is not None and self._requests.used() >= most:
            wait_s = self._requests.wait_s(self._requests.used() - most + 1)
            raise self._too_many(f"made {most} requests within a minute, which is its limit", wait_s)
        self.check_tokens()
        if (dollars := limits.dollars_per_month) is not None and self.month_dollars.used() >= dollars:
            raise self._quota(f"has used its ${dollars:g} of this month", month_end(self._wall_clock()))

    def check_tokens(self) -> None:
        """Refuse a request where the tokens are used up, those included that running requests are estimated to take.

        Raises:
            APIError: 429.
        """
        limits = self.limits
        if (most := limits.tokens_per_minute) is not None and (used := self._tokens.used() + self.reserved) >= most:
            wait_s = self._tokens.wait_s(self._tokens.used() - most + 1) if self._tokens.used() >= most else 1
            raise self._too_many(f"used {used:.0f} tokens within a minute, and its limit is {most}", wait_s)
        if (most := limits.tokens_per_day) is not None and self.day_tokens.used() + self.reserved >= most:
            if self.day_tokens.used() < most:  # the rest is reserved by what runs
                raise self._too_many(f"has requests running that may use up its {most} tokens of today", 1)
            raise self._quota(f"has used its {most} tokens of today", day_end(self._wall_clock()))

    def limit_use(self) -> dict[str, tuple[float, float]]:
        """Return each of its limits of amounts, by name, with how much of it is used."""
        used = {
            "requests_per_minute": self._requests.used(),
            "tokens_per_minute": self._tokens.used(),
            "tokens_per_day": self.day_tokens.used(),
            "dollars_per_month": self.month_dollars.used(),
            "concurrency": self.running,
        }
        limits = {name: getattr(self.limits, name) for name in used}
        return {name: (most, used[name]) for name, most in limits.items() if most is not None}

    def count_tokens(self, tokens: int, *, is_known: bool) -> None:
        """Count tokens; what is not known is left to the ledger, which learns it from the engine, for the day."""
        self._tokens.add(tokens)
        if is_known:
            self.day_tokens.add(tokens)

    def rate_headers(self, path: str) -> Headers:
        """Return the headers that tell what is left of the limits of a minute; none where it has no such limits."""
        found: Headers = []
        if self._rate_headers:
            protocol = protocol_of(path)
            for headers, counts_tokens in self._rate_headers:
                found += headers.of_answer(protocol, self.reserved if counts_tokens else 0)
        return found

    def _too_many(self, what: str, wait_s: float) -> APIError:
        seconds = max(1, math.ceil(wait_s))
        return APIError(429, f"The key '{self.name}' {what}. Try again in {seconds} s.", retry_after_s=seconds)

    def _quota(self, what: str, ends_at: float) -> APIError:
        """Return the error that OpenAI's clients know: to repeat the request before the end is in vain."""
        seconds = max(1, math.ceil(ends_at - self._wall_clock()))
        return APIError(
            429,
            f"The key '{self.name}' {what}. The next begins at {utc_text(ends_at)}.",
            code="insufficient_quota",
            headers={"Retry-After": str(seconds), "x-should-retry": "false"},
        )
