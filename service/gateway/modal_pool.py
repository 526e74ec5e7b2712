"""Pools of deployed GPU tiers, reached over HTTP: the URL is looked up by the app's name.

A pool that answered a moment ago counts as ready. Any other is sent a health check first: that one small request wakes
it, and all clients wait for its answer.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import modal

from service.boots.records import BootRecord
from service.errors import GpuFitError, one_line
from service.gateway.boot_volume import BootVolume
from service.gateway.call_rate import CALL_S
from service.gateway.deployed_tier import DeployedTier
from service.gateway.http_client.answer import Answer, ConnectError, EngineConnectionError
from service.gateway.http_client.connections import Connections
from service.gateway.pool import FAILED_FOR_S, Endpoint, OnWake, Pool, State, WakeError, unfit
from service.gateway.redirects import CrashLoopError, RedirectError, Redirects
from service.gateway.spending import SpendGuard
from service.gateway.upstream import open_connections, retry_after
from service.in_engine.vllm_service.api_error import APIError
from service.registry.models import ModelSpec
from service.registry.tiers import Tier, check_fit

PROXY_SECRET = "vllm-proxy-token"  # noqa: S105 - the name of a secret, not its value
_FRESH_S = 30.0  # how long after an answer a pool counts as ready
_HEALTH_PAUSE_S, _LONGEST_HEALTH_PAUSE_S = 0.05, 2.0
_NOT_YET = {408, 429, 503}  # a request that expired; the workspace's rate limit; a replica that is ending or overloaded
_FAULTS = {502, 504}  # of what is between here and the replica
_FAULTS_S = 60.0  # how long a wake outlasts those, and connections that break off, before it fails
_UNSTEADY = {errno.ETIMEDOUT, errno.ECONNRESET}  # of connections that were not opened: a fault too
_PROBE_INTERVAL_S = 5.0
_SHORTEST_WINDOW_S = 2
ON = " on "  # between model and GPUs in the name of a pool
_PROBE_TIMEOUT_S = 2.0
_ERROR_BODY = 64 * 1024  # bytes of an answer that are read
_STOP_S, _STOP_POLL_S = 120, 2.0
_log = logging.getLogger(__name__)


class ModalPool(Pool):
    """The replicas of a model on a tier.

    Args:
        spec: The model.
        tier: Its app.
        own: The app for this model alone on that tier, which goes before where it is deployed; None: there is none.
        command: What deploys the tier.
        headers: The proxy token for Modal's proxy; empty: the client's own key is passed on.
        fresh_s: How long after an answer the pool counts as ready; at most 30 s.
        capacity: How many requests its replicas take at once.
        timeout_s: How long a wake may take.
        answer_s: How long an answer may take.
        on_wake: Called after each wake.
        volume: Has the boots that cannot work; None: nobody records them.
        guard: Bounds what it costs; None: nothing does.
        price: Returns what a replica costs in an hour now; None: that of the table.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tier: DeployedTier,
        own: DeployedTier | None,
        headers: Mapping[str, str],
        *,
        command: str,
        fresh_s: float,
        capacity: int,
        timeout_s: float,
        answer_s: float,
        on_wake: OnWake,
        volume: BootVolume | None = None,
        guard: SpendGuard | None = None,
        price: Callable[[Tier], float] | None = None,
    ) -> None:
        super().__init__(spec, tier.tier.label, tier.tier.dollars_per_hour, on_wake)
        self._tier, self._own, self._headers, self._command = tier, own, headers, command
        self._guard, self._price = guard, price
        self._app = tier  # the one of the two that is deployed
        self._fresh_s, self._timeout_s, self._capacity = min(_FRESH_S, fresh_s), timeout_s, capacity
        self._answer_s, self._volume = answer_s, volume
        self._endpoint: Endpoint | None = None
        self._probed_at, self._known = -_PROBE_INTERVAL_S, "cold"
        self._deploys_read_at = -FAILED_FOR_S
        self._before_stop: dict[str, int] | None = None  # the autoscaler's settings, while a stop has lowered them
        self._is_stopping = False

    def endpoint(self) -> Endpoint | None:
        """Return where it takes requests, when it is answering one or did a moment ago."""
        if self._endpoint is None or self._waking or self.answered_at is None:
            return None
        fresh = self.answering or time.monotonic() - self.answered_at < self._fresh_s
        return self._endpoint if fresh else None

    @property
    def is_full(self) -> bool:
        """Whether all the replicas that it may have are busy; further requests wait in Modal's queue."""
        return self.in_use >= self._capacity

    def why_unfit(self, name: str) -> APIError | None:
        """Return the error where the model cannot run on the tier: its container would never become ready."""
        try:
            check_fit(self.spec, self._tier.tier, lambda other: f"'{name}-{other.gpu.slug}'")
        except GpuFitError as error:
            return unfit(error)
        return None

    async def boots(self) -> list[BootRecord]:
        """Return its boots among the newest ones that the volume has."""
        if not self._volume:
            return []
        is_its_gpu = self._tier.tier.gpu.is_named_in
        records = await self._volume.boots(self._tier.calls)
        return [record for record in records if record.model == self.spec.key and is_its_gpu(record.gpu)]

    def mark_unreachable(self) -> None:
        """Have the next request check its health first."""
        self._endpoint = None
        self._app.forget()

    async def wake(self) -> Endpoint:
        """Check its health until it is ready; Modal starts a container for the first check.

        A boot that is known to fail is not begun.
        """
        self._endpoint = None
        url = await self._locate()
        await self._check_recorded()
        await self._check_limits()
        try:
            return await self._wake_at(url)
        except WakeError:
            await self._check_recorded()
            raise

    async def _check_limits(self) -> None:
        """Refuse the wake where it is above a limit of spending, or where Modal does not tell what was spent."""
        if not self._guard:
            return
        try:
            await self._guard.admit(self)
        except (modal.exception.Error, OSError) as error:
            raise WakeError(
                f"What the service has spent could not be read from Modal or kept there: {one_line(error)}.",
                is_transient=True,
            ) from error

    async def _check_recorded(self) -> None:
        """Raise the reason why a boot is known to fail."""
        tier = self._app.tier
        if self._volume and (
            failure := await self._volume.failure(self._app.app, self.spec.key, tier.gpu, self._app.calls)
        ):
            raise WakeError(failure.sentence, lasts_s=FAILED_FOR_S)  # no boot was begun

    async def _is_deployed_anew(self) -> bool:
        """Tell whether its app was deployed after the last wake began; Modal is asked every few seconds."""
        now = time.monotonic()
        if not self._volume or now - self._deploys_read_at < FAILED_FOR_S:
            return False
        self._deploys_read_at = now
        began = time.time() - (now - self._woken_at)
        return await self._volume.is_deployed_since(began, self._app.app, self._app.calls)

    async def _wake_at(self, base: str) -> Endpoint:
        endpoint = Endpoint(
            base,
            {"model": self.spec.key},
            self._headers,
            forwards_client_key=not self._headers,
            own_calls=self._tier.calls,
            answer_s=self._answer_s,
        )
        try:
            async with asyncio.timeout(self._timeout_s), open_connections() as http:
                await self._until_healthy(http, endpoint.with_path("/health"))
        except (ConnectError, EngineConnectionError) as error:
            self._app.forget()
            raise WakeError(f"Its URL does not answer: {one_line(error)}.", is_transient=True) from error
        except TimeoutError:
            raise WakeError(f"It was not ready within {self._timeout_s:.0f} s (SERVICE_STARTUP_TIMEOUT_S).") from None
        self._endpoint, self.answered_at = endpoint, time.monotonic()
        return endpoint

    async def _until_healthy(self, http: Connections, url: str) -> None:
        """Check its health until it is ready. Modal's limits are waited for, and its faults for a while."""
        pause_s, faulty_since = _HEALTH_PAUSE_S, None
        while True:
            wait_s = None
            try:
                async with self._answer(http, url) as answer:
                    if answer.status == 200:
                        length = answer.header(b"x-max-model-len")
                        self.served_max_model_len = int(length) if length.isdecimal() else None
                        return
                    if answer.status in _NOT_YET:
                        wait_s, faulty_since = retry_after(answer), None
                    elif answer.status in _FAULTS:
                        raise _fault(answer.status)
                    else:
                        raise await self._error_of(answer)
            except (ConnectError, EngineConnectionError) as error:
                if isinstance(error, ConnectError) and error.errno not in _UNSTEADY:
                    raise
                faulty_since = faulty_since or time.monotonic()
                if time.monotonic() - faulty_since > _FAULTS_S:
                    raise
            await asyncio.sleep(max(pause_s, wait_s or 0.0))
            pause_s = min(2 * pause_s, _LONGEST_HEALTH_PAUSE_S)

    async def _locate(self) -> str:
        """Return the URL of the model's own app, where it is deployed, else that of its tier."""
        if self._own:
            try:
                url = await self._own.url(self._command)
            except APIError:  # it is not deployed
                pass
            else:
                self._app = self._own
                return url
        self._app = self._tier
        return await self._tier.url(self._command)

    @asynccontextmanager
    async def _answer(self, http: Connections, url: str) -> AsyncIterator[Answer]:
        """Check its health once and yield the answer; Modal's redirects, which mean "not yet", are followed.

        Raises:
            WakeError: Its containers end before they are ready.
        """
        redirects, where = Redirects(url, self._timeout_s), url
        try:
            while True:
                await self._tier.calls.wait()
                with closing(await http.get(where, self._headers)) as answer:
                    if answer.status != 303:
                        yield answer
                        return
                    where = redirects.target(answer)
                await redirects.pause()
        except RedirectError as error:
            log = f" Its log: vllm-service logs {self.spec.key}." if isinstance(error, CrashLoopError) else ""
            raise WakeError(f"Modal {error}.{log}") from error

    async def _error_of(self, answer: Answer) -> WakeError:
        """Return what an answer other than "not yet" means."""
        body = await answer.read_all(_ERROR_BODY)
        reason = " ".join(body.decode(errors="replace").split())[:300] or "it does not say why"
        if answer.status in {401, 403}:
            return WakeError(
                f"Modal's proxy does not accept the token in secret '{PROXY_SECRET}' ({answer.status}). Make "
                "another: modal workspace proxy-tokens create."
            )
        self._app.forget()
        return WakeError(
            f"Its container answered {answer.status}: {reason}. Its log: vllm-service logs {self.spec.key}."
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
            return "ready" if await self._runners() else "cold"
        except APIError:
            return "not_deployed"

    async def _runners(self) -> int:
        stats = await self._at_modal(lambda function: function.get_current_stats.aio())
        return int(stats.num_total_runners)

    async def _at_modal(self, call: Callable[[Any], Awaitable[Any]]) -> Any:
        """Call Modal with the handle of the pool, and return the answer; an app that was stopped is looked up again.

        Raises:
            APIError: 503: it is not deployed, maybe not any more.
            WakeError: Modal did not tell the app's URL.
            TimeoutError: Modal did not answer the call; other errors are those of its client.
        """
        while True:
            await self._locate()
            app = self._app
            await self._tier.calls.wait()
            try:
                async with asyncio.timeout(CALL_S):
                    return await call(self._function())
            except modal.exception.NotFoundError:
                app.mark_missing()

    def _function(self) -> Any:
        """Return Modal's handle of the pool."""
        return modal.Cls.from_name(self._app.app, "Server")(model=self.spec.key).serve

    async def stop(self) -> None:
        """Let its idle replicas end now, and those with requests after them.

        The autoscaler has its settings back once none is left, or after a while in which requests kept some alive.
        While a stop runs another does nothing: it would take the lowered settings for those to go back to.
        """
        if self._is_stopping:
            return
        self._is_stopping = True
        try:
            await self._stop()
        finally:
            self._is_stopping = False

    async def _stop(self) -> None:
        self._before_stop = await self.scale_to_zero()
        try:
            self._endpoint = None
            async with asyncio.timeout(_STOP_S) as limit:
                while await self.count_replicas():  # noqa: ASYNC110 - Modal reports no event
                    await asyncio.sleep(_STOP_POLL_S)
        except TimeoutError:
            if not limit.expired():  # it was one call to Modal
                raise
            _log.warning("%s still has replicas %d s after it was stopped: they have requests.", self.name, _STOP_S)
        finally:
            if self._before_stop is not None:  # else the limits of spending have taken them over
                await self.restore(self._before_stop)
            self._known = "cold"

    # what limits of spending need

    def check_spending(self) -> None:
        """Refuse a request once the day has cost its limit, also where a replica is up.

        Raises:
            APIError: 503 `daily_limit_reached`.
        """
        if self._guard:
            self._guard.check_day()

    @property
    def name(self) -> str:
        """Its model and GPUs."""
        return f"{self.spec.key}{ON}{self.location}"

    @property
    def n_gpu(self) -> int:
        """GPUs of one replica."""
        return self._tier.tier.n_gpu

    @property
    def current_price(self) -> float:
        """What a replica costs in an hour now."""
        tier = self._tier.tier
        return self._price(tier) if self._price else tier.dollars_per_hour

    @property
    def is_waking(self) -> bool:
        """Whether a wake runs."""
        return self._waking is not None

    async def count_replicas(self) -> int:
        """Return how many replicas it has; none where it is not deployed."""
        try:
            return await self._runners()
        except APIError:
            return 0

    async def scale_to_zero(self) -> dict[str, int]:
        """Let its idle replicas end now, and return the autoscaler's settings until then.

        Those from before a stop that runs go to the caller, who gives them back in its stead.

        Raises:
            APIError: 503: it is not deployed.
        """
        if (before_stop := self._before_stop) is not None:
            self._before_stop = None
            return before_stop
        before = await self._at_modal(_lower)
        names = ("min_containers", "buffer_containers", "scaledown_window")
        return {name: value for name in names if (value := getattr(before, name)) is not None}

    async def restore(self, settings: dict[str, int]) -> None:
        """Give the autoscaler its settings back; one whose app is gone has none, and the next deploy brings its own."""
        self._before_stop = None
        with suppress(APIError):
            await self._at_modal(lambda function: function.autoscaler.update.aio(**settings))


async def _lower(function: Any) -> Any:
    """Let a pool's idle replicas end now, and return the autoscaler's settings until then."""
    before = await function.autoscaler.settings.aio()
    await function.autoscaler.update.aio(min_containers=0, buffer_containers=0, scaledown_window=_SHORTEST_WINDOW_S)
    return before


def _fault(status: int) -> EngineConnectionError:
    return EngineConnectionError(f"Modal's proxy answered {status}", has_answered=True)
