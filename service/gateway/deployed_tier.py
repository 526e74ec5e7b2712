"""A deployed app of a GPU tier, as the gateway finds it at Modal."""

from __future__ import annotations

import asyncio
import time

import modal

from service.errors import one_line
from service.gateway.call_rate import CALL_S, CallRate
from service.gateway.pool import WakeError
from service.in_engine.vllm_service.api_error import APIError
from service.registry.tiers import Tier

_LOOKUP_INTERVAL_S = 10.0  # between two look-ups of a tier that is not deployed


class DeployedTier:
    """A deployed app, and where it takes requests.

    Args:
        tier: Its GPUs.
        app: Its name.
        lookup_interval_s: Between two look-ups while it is not deployed.
        calls: The rate of the gateway's own calls.
    """

    def __init__(
        self,
        tier: Tier,
        app: str,
        lookup_interval_s: float = _LOOKUP_INTERVAL_S,
        *,
        calls: CallRate | None = None,
    ) -> None:
        self.tier, self.app, self._lookup_interval_s = tier, app, lookup_interval_s
        self.calls = calls or CallRate()
        self._url: str | None = None
        self._missing_at: float | None = None

    async def url(self, command: str) -> str:
        """Return its URL.

        Args:
            command: What deploys it.

        Raises:
            APIError: 503: it is not deployed; the message has the command.
            WakeError: Modal did not answer, or the app has no web endpoint.
        """
        if self._url:
            return self._url
        if self._missing_at is not None and time.monotonic() - self._missing_at < self._lookup_interval_s:
            raise self._not_deployed(command)
        await self.calls.wait()
        try:
            async with asyncio.timeout(CALL_S):
                url: str | None = await modal.Cls.from_name(self.app, "Server")().serve.get_web_url.aio()
        except modal.exception.NotFoundError as error:
            self.mark_missing()
            raise self._not_deployed(command) from error
        except (modal.exception.Error, OSError) as error:
            raise WakeError(
                f"The URL of app '{self.app}' could not be read from Modal: {one_line(error)}.", is_transient=True
            ) from error
        if not url:
            raise WakeError(f"App '{self.app}' has no web endpoint. Deploy it again: {command}.")
        self._url = url.rstrip("/")
        return self._url

    def forget(self) -> None:
        """Look its URL up again next time: the app may have been stopped, or deployed elsewhere."""
        self._url = None

    def mark_missing(self) -> None:
        """Record that it is not deployed, maybe not any more."""
        self._url, self._missing_at = None, time.monotonic()

    def _not_deployed(self, command: str) -> APIError:
        return APIError(
            503,
            f"No app '{self.app}' is deployed for {self.tier.label}. Deploy it: {command}.",
            code="tier_not_deployed",
            headers={"Retry-After": f"{self._lookup_interval_s:.0f}"},
        )
