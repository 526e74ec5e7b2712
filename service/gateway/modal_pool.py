"""Pools of deployed GPU tiers, reached over HTTP: the address by name, the proxy token from a secret.

A pool that answered a moment ago is taken for ready. Any other is asked for its health first: that one small request is
what wakes it, and all clients wait for its answer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping

import aiohttp
import modal
from yarl import URL

from service.errors import GpuMemoryError, SettingsError, UsageError
from service.gateway.api_errors import Refusal, unavailable
from service.gateway.app import Door, gateway
from service.gateway.clients import load_keyring
from service.gateway.metrics import Metrics
from service.gateway.pool import Address, OnWake, Pool, State, WakeError, ignore_wake
from service.gateway.router import Directory
from service.gateway.upstream import session
from service.keys import digests
from service.registry.gpus import Gpu, find_gpu
from service.registry.models import ModelSpec, Registry
from service.registry.tiers import Tier, check_weights, tier_of
from service.settings import Settings

PROXY_SECRET = "vllm-proxy-token"  # noqa: S105 - the name of a secret, not its value
_FRESH_S = 30.0  # how long an answer is taken for a sign that the next one comes too
_LOOKED_UP_S = 10.0  # how long a tier that was not there is not asked for again
_ASK_AGAIN_S, _ASK_AGAIN_AT_MOST_S = 0.05, 2.0
_STATE_S = 5.0
_OBSERVED_WITHIN_S = 2.0


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
        """Return its address.

        Raises:
            Refusal: 503, it is not deployed; the sentence has the command.
        """
        if self._url:
            return self._url
        if self._missing_at is not None and time.monotonic() - self._missing_at < _LOOKED_UP_S:
            raise self._not_deployed()
        try:
            url: str | None = await modal.Cls.from_name(self.app, "Server")().serve.get_web_url.aio()
        except modal.exception.NotFoundError as error:
            self._missing_at = time.monotonic()
            raise self._not_deployed() from error
        except (modal.exception.Error, OSError) as error:
            raise WakeError(f"Modal could not be asked where app '{self.app}' is: {_said(error)}.") from error
        if not url:
            raise WakeError(f"App '{self.app}' has no web endpoint. Deploy it again: {self._command()}.")
        self._url = url.rstrip("/")
        return self._url

    def forget(self) -> None:
        """Ask again next time: it may have been stopped, or deployed elsewhere."""
        self._url = None

    def _not_deployed(self) -> Refusal:
        sentence = f"No app '{self.app}' is deployed for {self.tier.label}. Deploy it: {self._command()}."
        return unavailable(sentence, "tier_not_deployed", _LOOKED_UP_S)

    def _command(self) -> str:
        return f"{self.tier.settings} modal deploy -m service.server"


class ModalPool(Pool):
    """The replicas of a model on a tier.

    Args:
        spec: The model.
        tier: Its app.
        headers: What Modal's proxy asks for; empty: the client's own key is passed on.
        fresh_s: How long an answer is taken for a sign that the next one comes too.
        timeout_s: What a wake may take.
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
        self._address: Address | None = None
        self._asked_at, self._known = -_STATE_S, "cold"

    def address(self) -> Address | None:
        """Return where it is, when it answers somebody or did a moment ago."""
        if self._address is None or self._waking or self.answered_at is None:
            return None
        fresh = self.answering or time.monotonic() - self.answered_at < self._fresh_s
        return self._address if fresh else None

    def check(self, name: str) -> None:
        """Refuse a model whose weights are more than the tier's memory: its container would never become ready."""
        try:
            check_weights(self.spec, self._tier.tier, lambda other: f"'{name}-{other.gpu.slug}'")
        except GpuMemoryError as error:
            raise Refusal(
                400, str(error), code="model_too_large", param="model", headers={"x-should-retry": "false"}
            ) from error

    def lost(self) -> None:
        """Have the next request ask for its health."""
        self._address = None
        self._tier.forget()

    async def wake(self) -> Address:
        """Ask for its health until it has it; Modal starts a container for the first time it is asked."""
        self._address = None
        address = Address(await self._tier.url(), {"model": self.spec.key}, self._headers, passes_key=not self._headers)
        url = URL(address.url + "/health").with_query(address.query)
        pause_s = _ASK_AGAIN_S
        try:
            async with asyncio.timeout(self._timeout_s), session() as http:
                while not await self._is_healthy(http, url):
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _ASK_AGAIN_AT_MOST_S)
        except aiohttp.ClientError as error:  # first: some of them are time-outs too
            self._tier.forget()
            raise WakeError(f"Its address does not answer: {_said(error)}.") from error
        except TimeoutError:
            raise WakeError(f"It was not ready within {self._timeout_s:.0f} s (SERVICE_STARTUP_TIMEOUT_S).") from None
        self._address, self.answered_at = address, time.monotonic()
        return address

    async def _is_healthy(self, http: aiohttp.ClientSession, url: URL) -> bool:
        """Return whether it is; follows Modal's redirects, which stand for: not yet."""
        where = url
        while True:
            async with http.get(where, headers=self._headers, allow_redirects=False) as answer:
                if answer.status == 303:
                    where = answer.url.join(URL(answer.headers.get("Location", ""), encoded=True))
                    if where.origin() != url.origin():
                        raise WakeError("Modal sent the question for its health elsewhere.")
                    await asyncio.sleep(_ASK_AGAIN_S)
                    continue
                if answer.status == 200:
                    return True
                said = " ".join((await answer.text(errors="replace")).split())[:300] or answer.reason
                if answer.status == 503:  # a replica that is ending, or one that has too much to do
                    return False
                if answer.status in {401, 403}:
                    raise WakeError(
                        f"Modal's proxy does not accept the token in secret '{PROXY_SECRET}' ({answer.status}). Make "
                        "another: modal workspace proxy-tokens create."
                    )
                self._tier.forget()
                raise WakeError(f"Its container answered {answer.status}: {said}. modal app logs {self._tier.app}")

    async def observe(self) -> State:
        """Return its state; asks Modal how many containers it has, at most every few seconds."""
        if self._waking or self.address():
            return self.state
        if time.monotonic() - self._asked_at > _STATE_S:
            self._asked_at = time.monotonic()
            try:
                async with asyncio.timeout(_OBSERVED_WITHIN_S):
                    self._known = await self._containers()
            except (TimeoutError, modal.exception.Error, OSError, WakeError):
                self._known = "cold"
        return self._known  # type: ignore[return-value]

    async def _containers(self) -> State:
        try:
            await self._tier.url()
        except Refusal:
            return "not_deployed"
        pool = modal.Cls.from_name(self._tier.app, "Server")(model=self.spec.key)
        stats = await pool.serve.get_current_stats.aio()
        return "ready" if stats.num_total_runners else "cold"


class Tiers:
    """The pools of all tiers that the registry and the names of requests speak of.

    Args:
        settings: The door's: default GPU, app, timeouts.
        headers: What Modal's proxy asks for.
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
    # SERVICE_N_GPU speaks of the default tier: of another GPU one container may not hold so many
    return tier_of(spec, chosen, settings.n_gpu and min(settings.n_gpu, chosen.max_count))


def modal_gateway(settings: Settings, registry: Registry, environ: Mapping[str, str]) -> Door:
    """Return the door to the deployed tiers; keys and proxy token are read from `environ`, and kept as digests.

    Raises:
        UsageError: No key is configured, or the proxy token is missing.
    """
    found = digests(environ)
    if not found:
        raise UsageError(
            f"Secret '{settings.keys_secret}' has neither API_KEY nor API_KEYS, and without a key anybody could wake "
            "GPUs. Put one in: modal secret create --force "
            f"{settings.keys_secret} API_KEY=<key>."
        )
    metrics = Metrics(_write)
    tiers = Tiers(settings, _proxy_token(settings, environ), metrics.count_wake)
    keyring = load_keyring(environ, found, registry, settings.model)
    return gateway(Directory(registry, settings.model, tiers.pool), keyring, metrics, hold_s=settings.hold_s)


def _proxy_token(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    if settings.direct_auth == "keys":
        return {}
    try:
        return {"Modal-Key": environ["MODAL_KEY"], "Modal-Secret": environ["MODAL_SECRET"]}
    except KeyError as error:
        raise SettingsError(
            f"Secret '{PROXY_SECRET}' has no {error.args[0]}. Make a token with 'modal workspace proxy-tokens create' "
            f"and keep it: modal secret create {PROXY_SECRET} MODAL_KEY=wk-… MODAL_SECRET=ws-…"
        ) from None


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
