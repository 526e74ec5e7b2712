"""What replicas wrote onto Modal's volume, as the gateway reads it: boots, and boots that cannot work.

It starts no container.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import modal
from modal._utils.async_utils import synchronizer
from modal.client import _Client
from modal.config import config
from modal_proto import api_pb2 as pb

from service.boots.failures import BootFailure, file_name
from service.boots.records import DIRECTORY as BOOTS
from service.boots.records import BootRecord, by_time, parse
from service.gateway.call_rate import CALL_S, CallRate
from service.registry.gpus import Gpu

_log = logging.getLogger(__name__)
_TIMEOUT_S = 5.0  # a boot takes longer, but a volume that cannot be read must not keep a pool from waking
_NEWEST, _KEPT = 20, 200  # records that are read at once; that are kept
_LIST_INTERVAL_S = 5.0
_ERRORS = (modal.exception.Error, OSError, TimeoutError)


class BootVolume:
    """The volume with the records of boots.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reading = asyncio.Lock()
        self._listed_at = -_LIST_INTERVAL_S
        self._boots: dict[str, BootRecord] = {}  # by path; a record never changes

    async def failure(self, app: str, model: str, gpu: Gpu, calls: CallRate) -> BootFailure | None:
        """Return the recorded failure of the deployed version of a model; None: none is known.

        Args:
            app: Name of the tier's app.
            model: The model's key.
            gpu: The tier's GPU: a variant of the app on another one says nothing of it.
            calls: The rate of the gateway's own calls.
        """
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await calls.wait()
                found = BootFailure.parse(await self._read(file_name(app, model)))
                if found is None or not gpu.is_named_in(found.gpu):
                    return None
                await calls.wait()
                return found if await _deployed_at.aio(app) < found.at else None
        except (FileNotFoundError, modal.exception.NotFoundError):
            return None
        except _ERRORS as error:
            _log.warning("Whether '%s' failed before is not known: %s", model, error)
            return None

    async def is_deployed_since(self, at: float, app: str, calls: CallRate) -> bool:
        """Tell whether an app was deployed after a moment, in seconds since 1970; false where Modal does not tell."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await calls.wait()
                return bool(await _deployed_at.aio(app) > at)
        except _ERRORS as error:
            _log.warning("When app '%s' was deployed is not known: %s", app, error)
            return False

    async def boots(self, calls: CallRate) -> list[BootRecord]:
        """Return the newest boot records of all models, oldest first; new ones are looked for every five seconds.

        Args:
            calls: The rate of the gateway's own calls.
        """
        async with self._reading:
            if time.monotonic() - self._listed_at >= _LIST_INTERVAL_S:
                try:
                    await self._read_new(calls)
                except _ERRORS as error:
                    _log.warning("The records of boots on volume '%s' cannot be read: %s", self._name, error)
                self._listed_at = time.monotonic()
            return by_time(self._boots.values())

    async def _read_new(self, calls: CallRate) -> None:
        await calls.wait()
        try:
            async with asyncio.timeout(CALL_S):
                entries = await modal.Volume.from_name(self._name).listdir.aio(BOOTS)
        except (FileNotFoundError, modal.exception.NotFoundError):  # no replica has booted yet
            return
        for path in sorted(entry.path for entry in entries if entry.path.endswith(".json"))[-_NEWEST:]:
            if path not in self._boots:
                await calls.wait()
                with suppress(FileNotFoundError, modal.exception.NotFoundError):  # a replica has just removed it
                    if found := parse([await self._read(path)]):
                        self._boots[path] = found[0]
        for path in sorted(self._boots)[:-_KEPT]:
            del self._boots[path]

    async def _read(self, path: str) -> bytes:
        volume = modal.Volume.from_name(self._name)
        async with asyncio.timeout(CALL_S):
            return b"".join([piece async for piece in volume.read_file.aio(path)])


@synchronizer.create_blocking
async def _deployed_at(app: str) -> float:
    """Return when the app was deployed last, in seconds since 1970. Modal's client has no public call for it."""
    client = await _Client.from_env()
    by_name = pb.AppGetByDeploymentNameRequest(name=app, environment_name=config["environment"] or "")
    found = await client._stub.AppGetByDeploymentName(by_name)
    history = await client._stub.AppDeploymentHistory(pb.AppDeploymentHistoryRequest(app_id=found.app_id))
    return max((entry.deployed_at for entry in history.app_deployment_histories), default=0.0)
