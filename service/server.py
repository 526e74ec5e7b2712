"""Only wiring to Modal: `modal deploy -m service.server` publishes class `Server`.

One app is one GPU tier. Every model of the registry is a container pool of it, which the class's parameters name. The
container imports this module again, with the deployer's settings from the image's last layer.
"""
# No `from __future__ import annotations`: modal.parameter reads the annotations as types.

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import modal
import modal.experimental

from service.boots.failures import FailureFile
from service.boots.records import new_id
from service.engine.environment import versions
from service.errors import ServiceError
from service.image import engine_image
from service.in_engine.vllm_service.events import Event
from service.modal_app import otel_secret, selftest
from service.modal_app.client import in_modal_command, why_hub_secret_missing
from service.modal_app.container_logging import log_to_stdout
from service.modal_app.deployment import Deployment
from service.modal_app.engine_client import request, request_line
from service.modal_app.leases import volume_lease
from service.registry.tiers import count_label
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from service.usage import money
from service.usage.replica_records import ReplicaRecorder, process_started_at
from service.usage.writer_files import ReplicaRecord
from service.volumes import (
    FLASHINFER_CACHE,
    HUB_CACHE,
    VLLM_CACHE,
    compile_caches,
    failures_file,
    records_directory,
    usage_directory,
    volumes,
)

_log = logging.getLogger("service.server")
if not modal.is_local():
    log_to_stdout()

try:
    DEPLOYMENT = Deployment.resolve()
    if in_modal_command():  # a plain import opens no connection
        DEPLOYMENT = DEPLOYMENT.with_hub_secret(why_hub_secret_missing)
except ServiceError as error:
    raise SystemExit(error.to_terminal()) from None
SETTINGS = DEPLOYMENT.settings

STARTED_AT = process_started_at()  # which is when the container began
VERSIONS = versions("cuda")
VOLUMES = volumes(SETTINGS.volume_prefix)
LOCAL_CACHES = ".vllm-service/compiled"  # in the container's home, on its own disk
app = modal.App(DEPLOYMENT.app_name)


@app.cls(
    image=engine_image(SETTINGS, DEPLOYMENT.spec),
    volumes={**VOLUMES},
    secrets=[
        *(modal.Secret.from_name(name, required_keys=keys) for name, keys in DEPLOYMENT.secrets.items()),
        *otel_secret.secrets(os.environ),
    ],
    **DEPLOYMENT.class_options(),
)
@modal.concurrent(max_inputs=SETTINGS.max_inputs, target_inputs=SETTINGS.target_inputs)
class Server:
    """A replica of one model. Parameters: `model` (any name of the registry), `fast_boot`, `n_gpu`."""

    model: str = modal.parameter(default=SETTINGS.model)
    fast_boot: bool = modal.parameter(default=DEPLOYMENT.fast_boot)
    n_gpu: int = modal.parameter(default=DEPLOYMENT.tier.n_gpu)

    @modal.enter(snap=SETTINGS.snapshot != "off")  # Modal refuses snap=True on a class without snapshots
    def prepare(self) -> None:
        """Do everything that a memory snapshot can hold."""
        self.prepared_by = _container_id()
        self.replica = Replica(
            self._plan(),
            on_lost=modal.experimental.stop_fetching_inputs,  # so that Modal starts another replica
            on_death=lambda error: _log.error("boot %s: engine died: %s", self.replica.id, error),
            on_event=self._log_phase,
            on_usage=self._count_aborted,
            on_record=lambda record: _log.info("boot %s", record.to_line()),
            commit_weights=VOLUMES[HUB_CACHE].commit,
            commit_caches=self._commit_caches,
        )
        self.replica.prepare()

    @modal.enter(snap=False)
    def start(self) -> None:
        """Start the engine, or wake the restored one, and wait until it is ready."""
        restored = _container_id() != self.prepared_by
        if restored:
            self.replica.id = new_id()
        self.usage = ReplicaRecorder(usage_directory(), VOLUMES[VLLM_CACHE].commit, self._replica_record(restored))
        try:
            self.replica.start(DEPLOYMENT.direct_keys(os.environ), restored=restored)
        except BaseException:
            self.usage.close()
            raise
        self.usage.mark_ready()

    @modal.web_server(SETTINGS.port, startup_timeout=30, requires_proxy_auth=SETTINGS.direct_auth == "proxy")
    def serve(self) -> None:
        """Let Modal's proxy reach the engine, which listens since `start`."""

    @modal.method()
    async def complete(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request to this replica's engine: path and JSON body in, status and JSON out; GET without a body."""
        return await request(SETTINGS.port, path, body, self.replica.own_key)

    @modal.method()
    async def complete_line(self, number: int, path: str, body: bytes, client: str) -> tuple[int, dict[str, Any]]:
        """Answer a line of a batch, for `.map`: return its number with the answer. It is recorded as the client's."""
        answer = await request_line(SETTINGS.port, path, body, self.replica.own_key, client)
        record = answer.record(client, self.replica.id, self.replica.plan.spec, self._dollars_per_hour)
        self.usage.add(record)
        return number, answer.as_fields(record.dollars)

    @modal.exit()
    def stop(self) -> None:
        """Let streams finish, then stop the engine."""
        self.replica.stop()
        self.usage.close()

    def _plan(self) -> Plan:
        lock = volume_lease(VOLUMES[HUB_CACHE], SETTINGS.volume_prefix)
        spec = DEPLOYMENT.spec_for_replica(self.model, lock)
        return Plan.from_settings(
            SETTINGS,
            spec=spec,
            default_key=SETTINGS.model,
            device=os.environ.get("ENGINE_DEVICE", "cuda"),
            python=sys.executable,
            parent_env=os.environ,
            fast_boot=self.fast_boot,
            n_gpu=self.n_gpu,
            host="0.0.0.0",  # noqa: S104 - Modal's proxy comes by the container's own address
            lock=lock,
            versions=VERSIONS,
            caches=Caches(Path.home() / LOCAL_CACHES, VERSIONS, compile_caches(), model=spec.key),
            records=records_directory(),
            failure=FailureFile(
                failures_file(DEPLOYMENT.app_name, spec.key),
                lambda: DEPLOYMENT.boot_digest(spec, fast_boot=self.fast_boot, n_gpu=self.n_gpu),
            ),
        )

    @property
    def _dollars_per_hour(self) -> float:
        return DEPLOYMENT.tier.gpu.dollars_per_hour * self.n_gpu

    def _replica_record(self, restored: bool) -> ReplicaRecord:
        now = time.time()
        return ReplicaRecord(
            id=self.replica.id,
            model=self.replica.plan.spec.key,
            gpu=count_label(DEPLOYMENT.tier.gpu.name, self.n_gpu),
            dollars_per_hour=self._dollars_per_hour,
            started_at=now if restored else STARTED_AT,
            alive_at=now,
        )

    def _log_phase(self, event: Event) -> None:
        """Log the begin of a phase, which `vllm-service logs` marks; its duration comes with the boot's record."""
        if event.is_boot_event and event.label:
            replica = self.replica
            _log.info("phase of %s after %.1f s: %s", replica.plan.spec.key, replica.phases.seconds, event.label)

    def _count_aborted(self, fields: dict[str, Any]) -> None:
        self.usage.add(money.aborted_request(fields, self.replica.plan.spec, self._dollars_per_hour))

    def _commit_caches(self) -> None:
        """Commit this boot's record and compile caches, so that other replicas see them."""
        for path in (VLLM_CACHE, FLASHINFER_CACHE):
            VOLUMES[path].commit()


def _container_id() -> str | None:
    """Return the id of this container; a restored one has another than the one that prepared."""
    return os.environ.get("MODAL_TASK_ID")


@app.local_entrypoint()
def test(model: str = SETTINGS.model, content: str = selftest.CONTENT, twice: bool = True) -> None:
    """Check health and hold two conversations: `modal run -m service.server --model M --content "Hello!"`."""
    try:
        key = DEPLOYMENT.key_on_tier(model)
    except ServiceError as error:
        raise SystemExit(error.to_terminal()) from None
    is_default = key == DEPLOYMENT.spec.key
    server = Server() if is_default else Server(model=key)  # type: ignore[call-arg] # the decorator makes the constructor
    url = server.serve.get_web_url() if SETTINGS.direct_auth == "proxy" else None
    selftest.run(server.complete.remote, url, content, twice, model=None if is_default else key)
