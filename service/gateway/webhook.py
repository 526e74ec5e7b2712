"""Tells the operator's webhook what costs money or stays broken: first wake of a day, stop of a day, a crash loop.

The URL is a secret: it is in no log, error or body. A body has neither keys nor content of requests. Nothing waits for
a delivery; one that fails three times is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from service.errors import SettingsError
from service.gateway.pool import OnWake

VARIABLE = "WEBHOOK_URL"
Event = Literal["first_wake", "daily_stop", "crash_loop"]
Notify = Callable[[Event, str, Mapping[str, object]], None]  # takes event, a sentence for people, further fields
CRASH_LOOP = 3  # failed wakes of a model in a row
_TIMEOUT_S = 5.0
_PAUSES_S = (1.0, 5.0)  # between the three attempts
_MOST_WAITING = 16
_log = logging.getLogger(__name__)


def ignore_event(_event: Event, _text: str, _fields: Mapping[str, object]) -> None:
    """Tell nobody."""


class Webhook:
    """Delivers events; call it on an event loop.

    Args:
        url: Where they are posted.
        service: Name of what sends them.

    Raises:
        SettingsError: It is no URL.
    """

    def __init__(self, url: str, service: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise SettingsError(
                f"{VARIABLE} is no URL (its value is not shown).", hint="Write https://host/path, or unset it."
            )
        self._url, self._service = url, service
        self._deliveries: set[asyncio.Task[None]] = set()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], service: str) -> Notify:
        """Return the webhook that an environment names, else what tells nobody.

        Raises:
            SettingsError: It names no URL.
        """
        url = environ.get(VARIABLE, "").strip()
        return cls(url, service) if url else ignore_event

    def __call__(self, event: Event, text: str, fields: Mapping[str, object]) -> None:
        """Post an event without waiting for it; `text` is what Slack and its like show."""
        if len(self._deliveries) >= _MOST_WAITING:
            _log.warning("The webhook was not told of %s: %d events wait already.", event, _MOST_WAITING)
            return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        body = {"event": event, "at": at, "service": self._service, "text": text, **fields}
        delivery = asyncio.create_task(self._deliver(event, body), name=f"webhook {event}")
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, event: Event, body: dict[str, Any]) -> None:
        for pause_s in (*_PAUSES_S, None):
            why = await self._post(body)
            if why is None:
                return
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        _log.warning("The webhook was not told of %s: %s.", event, why)

    async def _post(self, body: dict[str, Any]) -> str | None:
        """Post it once; return why it was not taken."""
        import aiohttp  # noqa: PLC0415 - 10 MB that a gateway without a webhook does not need

        timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=True) as http,
                http.post(self._url, json=body, allow_redirects=False) as answer,
            ):
                return None if answer.status < 300 else f"it answered {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return type(error).__name__  # its text may have the URL


class CrashLoops:
    """Tells of a model whose wakes fail again and again, once until one succeeds.

    Args:
        notify: Is told.
        on_wake: Called after each wake too.
    """

    def __init__(self, notify: Notify, on_wake: OnWake) -> None:
        self._notify, self._on_wake = notify, on_wake
        self._failed: Counter[str] = Counter()

    def count_wake(self, model: str, is_ready: bool) -> None:
        """Count a wake that has ended."""
        self._on_wake(model, is_ready)
        if is_ready:
            del self._failed[model]
            return
        self._failed[model] += 1
        if self._failed[model] == CRASH_LOOP:
            text = f"{model} does not start: {CRASH_LOOP} wakes in a row failed. Its log: vllm-service logs {model}."
            self._notify("crash_loop", text, {"model": model, "failed_wakes": CRASH_LOOP})
