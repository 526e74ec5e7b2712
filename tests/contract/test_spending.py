"""The limits of spending on the control plane: a gateway with one GPU and five dollars a day, and its webhook."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import modal
import pytest

from service.modal_app import warm
from service.modal_app.warm_schedule import Schedule
from tests.contract.commands import run
from tests.contract.conftest import CHAT, call, deploy
from tests.contract.gateways import APP, KEY, TAG, deploy_gateway, put_secrets
from tests.engine.dialogues import QUESTION
from tests.fakes.modal import ContainerRuntime, ModalPlane

PATH = "/secret-path"


@dataclass
class Limited:
    """A service whose two tiers have the tiny model, and what its webhook was told."""

    plane: ModalPlane
    url: str
    told: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, model: str) -> tuple[int, Any]:
        """Send a chat request; return status and answer."""
        status, body = call(f"{self.url}{CHAT}", {"model": model, **QUESTION}, KEY)
        return status, json.loads(body)

    def replicas(self, app: str) -> list[Any]:
        """Return the live containers of a tier."""
        return [task for task in self.plane.tasks if task.app == app and task.is_live]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[Limited]:
    """The gateway and its tiers, deployed; nothing is up."""
    told: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append(body | {"path": self.path})
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        runtime = replace(engine_runtime, host_ports=(*engine_runtime.host_ports, server.server_port))
        with ModalPlane(tmp_path_factory.mktemp("plane"), container=runtime) as plane:
            put_secrets(plane)
            plane.billing.rates["gpu_hour_cost_t4"] = "2.0"
            plane.secrets.put("team-webhook", {"WEBHOOK_URL": f"http://127.0.0.1:{server.server_port}{PATH}"})
            for gpu in ("T4", "L4"):
                deploy(plane, SERVICE_MODEL="tiny", SERVICE_GPU=gpu)
            url = deploy_gateway(
                plane,
                SERVICE_MODEL="tiny",
                SERVICE_MAX_GPUS="1",
                SERVICE_REGION="us",
                SERVICE_MAX_DOLLARS_PER_DAY="5",
                SERVICE_WEBHOOK_SECRET="team-webhook",
            )
            yield Limited(plane, url, told)
            assert plane.failures == []
            assert plane.unknown_calls == []
        server.shutdown()


def test_wake_above_the_gpu_limit_starts_no_container_and_the_warm_pool_goes_on(service: Limited) -> None:
    """The first wake of the day is told; another tier is 503 with the numbers."""
    assert service.ask("tiny-t4")[0] == 200
    status, answer = service.ask("tiny-l4")
    assert (status, answer["error"]["code"]) == (503, "gpu_limit_reached")
    assert "it needs 1 GPUs, 1 are in use, and the service may use 1 (SERVICE_MAX_GPUS)" in answer["error"]["message"]
    assert service.replicas("vllm-l4") == []
    assert service.ask("tiny-t4")[0] == 200
    metrics = call(f"{service.url}/metrics", headers=KEY)[1].decode()
    for row in ('gateway_pool_state{gpu="T4",model="tiny",state="ready"}', "gateway_day_limit_dollars"):
        assert row in metrics
    assert call(f"{service.url}/metrics?model=tiny-t4", headers=KEY)[0] == 404, "it would keep the replica up"
    service.plane.wait_until(lambda: service.told, 10, "the webhook's first event")
    (event,) = service.told
    assert (event["event"], event["pool"], event["path"]) == ("first_wake", "tiny on T4", PATH)
    assert "$3.00/h" in event["text"], "Modal's price of the moment, and half of it for a broad region"
    logs = "".join(task.log for task in service.plane.tasks)
    assert PATH not in logs
    assert PATH not in str(service.plane.images.env(service.plane.function(APP, TAG).image_id))


def test_day_above_its_dollars_stops_the_service_and_a_new_gateway_remembers_it(service: Limited) -> None:
    """The replica ends, requests are 503 until the day ends, the webhook is told once."""
    plane = service.plane
    assert len(service.replicas("vllm-t4")) == 1
    (gateway,) = service.replicas(APP)
    record = plane.dicts[f"{APP}-spend"]["day"]
    plane.dicts[f"{APP}-spend"]["day"] = record | {"dollars": 5.0}
    gateway.kill()
    plane.wait_until(lambda: not service.replicas(APP), 10, "the gateway's end")
    call(f"{service.url}/health")
    plane.wait_until(lambda: not service.replicas("vllm-t4"), 30, "the replica's end")
    for _ in range(2):
        status, answer = service.ask("tiny-t4")
        assert (status, answer["error"]["code"]) == (503, "daily_limit_reached"), answer
        (gateway,) = service.replicas(APP)
        gateway.kill()
        plane.wait_until(lambda: not service.replicas(APP), 10, "the gateway's end")
    assert [event["event"] for event in service.told] == ["first_wake", "daily_stop"]
    (pool,) = [pool for pool in plane.pools if pool.app == "vllm-t4" and pool.parameters.get("model") == "tiny"]
    assert pool.autoscaler.scaledown_window == 2

    schedule = Schedule("vllm-t4", "tiny", 0.59, until=time.time() + 3600)
    plane.dicts.put("vllm-warm")
    plane.dicts["vllm-warm"]["vllm-t4/tiny"] = schedule.fields()
    refused = modal.Function.from_name(APP, warm.FUNCTION, client=plane.client()).remote(once=True)
    assert refused["vllm-t4/tiny"].startswith("The service has used $5.0")
    assert not pool.autoscaler.min_containers

    yesterday = datetime.fromtimestamp(time.time() - 86400, UTC).date().isoformat()
    record = plane.dicts[f"{APP}-spend"]["day"]
    plane.dicts[f"{APP}-spend"]["day"] = record | {"day": yesterday, "at": time.time() - 86400, "running": {}}
    status, answer = service.ask("tiny-t4")
    assert status == 200, answer
    assert pool.autoscaler.scaledown_window == 900


def test_model_is_not_kept_warm_above_the_gpu_limit_and_one_that_is_counts(service: Limited) -> None:
    """On a tier that nobody has asked the gateway for; the schedule stays, and is tried again."""
    plane = service.plane
    assert run(plane, "warm", "tiny", "--gpu", "T4", "--end").returncode == 0
    done = run(plane, "warm", "tiny", "--gpu", "L4", "--for", "30m", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert "it needs 1 GPUs, 1 are in use, and the service may use 1" in json.loads(done.stdout)["why_not_now"]
    assert service.replicas("vllm-l4") == []
    for task in service.replicas("vllm-t4"):
        task.kill()
    plane.wait_until(lambda: not service.replicas("vllm-t4"), 30, "the replica's end")
    assert modal.Function.from_name(APP, warm.FUNCTION, client=plane.client()).remote(once=True) == {}
    plane.wait_until(lambda: service.replicas("vllm-l4"), 30, "the warm replica")
    plane.dicts[f"{APP}-spend"]["day"] = {}
    for task in service.replicas(APP):
        task.kill()
    plane.wait_until(lambda: not service.replicas(APP), 10, "the gateway's end")
    status, answer = service.ask("tiny-t4")
    assert (status, answer["error"]["code"]) == (503, "gpu_limit_reached"), "this gateway has no request for the other"
