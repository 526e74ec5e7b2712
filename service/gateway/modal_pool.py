"""Pools of deployed GPU tiers, reached over HTTP: the URL is looked up by the app's name.

A pool that answered a moment ago counts as ready. Any other is sent a health check first: that one small request wakes
it, and all clients wait for its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import aiohttp
import modal
from yarl import URL

from service.errors import GpuMemoryError
from service.gateway.api_errors import APIError, unavailable
from service.gateway.pool import Endpoint, OnWake, Pool, State, WakeError, ignore_wake
from service.gateway.upstream import open_session
from service.registry.gpus import Gpu, find_gpu
from service.registry.models import ModelSpec
from service.registry.tiers import Tier, check_weights, tier_of
from service.settings import Settings

PROXY_SECRET = "vllm-proxy-token"  # noqa: S105 - the name of a secret, not its value
_FRESH_S = 30.0  # how long after an answer a pool counts as ready
_LOOKUP_INTERVAL_S = 10.0  # between two look-ups of a tier that is not deployed
_HEALTH_PAUSE_S, _LONGEST_HEALTH_PAUSE_S = 0.05, 2.0
_PROBE_INTERVAL_S = 5.0
_PROBE_TIMEOUT_S = 2.0


class DeployedTier:
    """A deployed app, and where it takes requests.

    Args:
        tier: Its GPUs.
        app: Its name.
    """

    def __init__(self, tier: Tier, app: str) -> None:
        self.tier, self.app = tier, app
        self._url: str | None = None
        self._missing_at: float | None = None

    async def url(self) -> str:
        """Return its URL.

        Raises:
            APIError: 503: it is not deployed; the message has the command that deploys it.
            WakeError: Modal did not answer, or the app has no web endpoint.
        """
        if self._url:
            return self._url
        if self._missing_at is not None and time.monotonic() - self._missing_at < _LOOKUP_INTERVAL_S:
            raise self._not_deployed()
        try:
            url: str | None = await modal.Cls.from_name(self.app, "Server")().serve.get_web_url.aio()
        except modal.exception.NotFoundError as error:
            self._missing_at = time.monotonic()
            raise self._not_deployed() from error
        except (modal.exception.Error, OSError) as error:
            raise WakeError(f"The URL of app '{self.app}' could not be read from Modal: {_one_line(error)}.") from error
        if not url:
            raise WakeError(f"App '{self.app}' has no web endpoint. Deploy it again: {self._command()}.")
        self._url = url.rstrip("/")
        return self._url

    def forget(self) -> None:
        """Look its URL up again next time: the app may have been stopped, or deployed elsewhere."""
        self._url = None

    def _not_deployed(self) -> APIError:
        sentence = f"No app '{self.app}' is deployed for {self.tier.label}. Deploy it: {self._command()}."
        return unavailable(sentence, "tier_not_deployed", _LOOKUP_INTERVAL_S)

    def _command(self) -> str:
        return f"{self.tier.settings} modal deploy -m service.server"


class ModalPool(Pool):
    """The replicas of a model on a tier.

    Args:
        spec: The model.
        tier: Its app.
        headers: The proxy token for Modal's proxy; empty: the client's own key is passed on.
        fresh_s: How long after an answer the pool counts as ready; at most 30 s.
        timeout_s: How long a wake may take.
        on_wake: Called after each wake.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tier: DeployedTier,
        headers: Mapping[str, str],
        *,
        fresh_s: float,
        timeout_s: float,
        on_wake: OnWake,
    ) -> None:
        super().__init__(spec, tier.tier.label, tier.tier.dollars_per_hour, on_wake)
        self._tier, self._headers = tier, headers
        self._fresh_s, self._timeout_s = min(_FRESH_S, fresh_s), timeout_s
        self._endpoint: Endpoint | None = None
        self._probed_at, self._known = -_PROBE_INTERVAL_S, "cold"

    def endpoint(self) -> Endpoint | None:
        """Return where it takes requests, when it is answering one or did a moment ago."""
        if self._endpoint is None or self._waking or self.answered_at is None:
            return None
        fresh = self.answering or time.monotonic() - self.answered_at < self._fresh_s
        return self._endpoint if fresh else None

    def check(self, name: str) -> None:
        """Refuse a model whose weights exceed the tier's memory: its container would never become ready."""
        try:
            check_weights(self.spec, self._tier.tier, lambda other: f"'{name}-{other.gpu.slug}'")
        except GpuMemoryError as error:
            raise APIError(
                400, str(error), code="model_too_large", param="model", headers={"x-should-retry": "false"}
            ) from error

    def mark_unreachable(self) -> None:
        """Have the next request check its health first."""
        self._endpoint = None
        self._tier.forget()

    async def wake(self) -> Endpoint:
        """Check its health until it is ready; Modal starts a container for the first check."""
        self._endpoint = None
        endpoint = Endpoint(
            await self._tier.url(), {"model": self.spec.key}, self._headers, forwards_client_key=not self._headers
        )
        url = URL(endpoint.url + "/health").with_query(endpoint.query)
        pause_s = _HEALTH_PAUSE_S
        try:
            async with asyncio.timeout(self._timeout_s), open_session() as http:
                while not await self._is_healthy(http, url):
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_HEALTH_PAUSE_S)
        except aiohttp.ClientError as error:  # first: some of them are time-outs too
            self._tier.forget()
            raise WakeError(f"Its URL does not answer: {_one_line(error)}.") from error
        except TimeoutError:
            raise WakeError(f"It was not ready within {self._timeout_s:.0f} s (SERVICE_STARTUP_TIMEOUT_S).") from None
        self._endpoint, self.answered_at = endpoint, time.monotonic()
        return endpoint

    async def _is_healthy(self, http: aiohttp.ClientSession, url: URL) -> bool:
        """Tell whether it is ready; follows Modal's redirects, which mean: not yet."""
        where = url
        while True:
            async with http.get(where, headers=self._headers, allow_redirects=False) as answer:
                if answer.status == 303:
                    where = answer.url.join(URL(answer.headers.get("Location", ""), encoded=True))
                    if where.origin() != url.origin():
                        raise WakeError("Modal redirected the health check to another host.")
                    await asyncio.sleep(_HEALTH_PAUSE_S)
                    continue
                if answer.status == 200:
                    return True
                reason = " ".join((await answer.text(errors="replace")).split())[:300] or answer.reason
                if answer.status == 503:  # a replica that is ending, or is overloaded
                    return False
                if answer.status in {401, 403}:
                    raise WakeError(
                        f"Modal's proxy does not accept the token in secret '{PROXY_SECRET}' ({answer.status}). Make "
                        "another: modal workspace proxy-tokens create."
                    )
                self._tier.forget()
                raise WakeError(
                    f"Its container answered {answer.status}: {reason}. Its log: modal app logs {self._tier.app}."
                )

    async def probe(self) -> State:
        """Return its state; reads the number of its containers from Modal, at most every few seconds."""
        if self._waking or self.endpoint():
            return self.state
        if time.monotonic() - self._probed_at > _PROBE_INTERVAL_S:
            self._probed_at = time.monotonic()
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    self._known = await self._containers()
            except (TimeoutError, modal.exception.Error, OSError, WakeError):
                self._known = "cold"
        return self._known  # type: ignore[return-value]

    async def _containers(self) -> State:
        try:
            await self._tier.url()
        except APIError:
            return "not_deployed"
        pool = modal.Cls.from_name(self._tier.app, "Server")(model=self.spec.key)
        stats = await pool.serve.get_current_stats.aio()
        return "ready" if stats.num_total_runners else "cold"


class Tiers:
    """The pools of all tiers that the registry and the names in requests refer to.

    Args:
        settings: The gateway's: default GPU, app, timeouts.
        headers: The proxy token for Modal's proxy; empty: the clients' own keys are passed on.
        on_wake: Called after each wake of a pool.
    """

    def __init__(self, settings: Settings, headers: Mapping[str, str], on_wake: OnWake = ignore_wake) -> None:
        self._settings, self._headers, self._on_wake = settings, headers, on_wake
        self._tiers: dict[Tier, DeployedTier] = {}
        self._pools: dict[tuple[str, Tier], ModalPool] = {}

    def pool(self, spec: ModelSpec, gpu: Gpu | None) -> ModalPool:
        """Return the pool of a model on a GPU; None: the one that the deploy of its tier would take."""
        settings, tier = self._settings, tier_for(self._settings, spec, gpu)
        app = self._tiers.setdefault(tier, DeployedTier(tier, settings.app or tier.app_name))
        if (pool := self._pools.get((spec.key, tier))) is None:
            pool = ModalPool(
                spec,
                app,
                self._headers,
                fresh_s=settings.scaledown_window / 2,
                timeout_s=float(settings.startup_timeout_s),
                on_wake=self._on_wake,
            )
            self._pools[spec.key, tier] = pool
        return pool


def tier_for(settings: Settings, spec: ModelSpec, gpu: Gpu | None) -> Tier:
    """Return the tier of a model: that of the GPU in its name, else that of the settings, else its entry's own."""
    if gpu:
        return tier_of(spec, gpu)
    chosen = find_gpu(settings.gpu) if settings.gpu else spec.tier.gpu
    # SERVICE_N_GPU is meant for the default tier: Modal may not attach as many of another GPU to one container
    return tier_of(spec, chosen, settings.n_gpu and min(settings.n_gpu, chosen.max_count))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
