"""What `modal deploy -m service.gateway_app` publishes, and what its container needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.engine import environment as engine_environment
from tests.contract.commands import run
from tests.contract.conftest import call, deploy, installed, modal_cli
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

from .gateways import APP, KEY, TAG, deploy_gateway, put_secrets


def test_gateway_is_published_without_a_gpu_as_one_container_for_all(plane: ModalPlane) -> None:
    """A plain function with a CPU snapshot; the settings of replicas do not apply to it."""
    put_secrets(plane)
    deploy_gateway(
        plane,
        SERVICE_MIN_CONTAINERS="2",
        SERVICE_MAX_CONTAINERS="5",
        SERVICE_MAX_INPUTS="8",
        SERVICE_SNAPSHOT="off",
        SERVICE_REQUEST_TIMEOUT_S="7200",
    )
    function = plane.function(APP, TAG)
    assert not function.resources.gpu_config.gpu_type
    assert (function.max_concurrent_inputs, function.warm_pool_size, function.concurrency_limit) == (1000, 0, 1)
    assert function.checkpointing_enabled
    assert function.timeout_secs == 7200
    assert not function.webhook_config.requires_proxy_auth
    mounts = {"/root/.cache/vllm", "/root/.cache/vllm-gateway", "/root/.cache/vllm-batches"}  # ledger, keys, batches
    assert {mount.mount_path for mount in function.volume_mounts} == mounts
    assert len(function.secret_ids) == 2
    asked = [request for request in plane.calls("SecretGetOrCreate") if request.deployment_name == "vllm-proxy-token"]
    assert list(asked[-1].required_keys) == ["MODAL_KEY", "MODAL_SECRET"]
    layers = plane.images.layers(function.image_id)
    assert any("--require-hashes" in layer and "light.lock" in layer for layer in layers), layers
    assert layers[-1].startswith("ENV ")
    assert plane.images.env(function.image_id)["SERVICE_MAX_INPUTS"] == "8"
    assert plane.tasks == []


def test_variables_of_opentelemetry_reach_the_containers_as_a_secret(plane: ModalPlane) -> None:
    """Those of the deployer, in no image: a header may hold a token. The gateway's image has the package."""
    put_secrets(plane)
    receiver = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_HEADERS": "x-token=of-theirs"}
    url = deploy_gateway(plane, **receiver, OTEL_EXPORTER_OTLP_METRICS_HEADERS="no", OTEL_PROPAGATORS="no")
    deploy(plane, SERVICE_MODEL="tiny", **receiver)

    gateway, tier = plane.function(APP, TAG), plane.function("vllm-l4", "Server")
    for function, count in ((gateway, 3), (tier, 1)):
        assert len(function.secret_ids) == count
        variables = plane.secrets.environment(list(function.secret_ids))
        assert {name: value for name, value in variables.items() if name.startswith("OTEL_")} == receiver | {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        }
        assert "of-theirs" not in str(plane.images.layers(function.image_id))
    assert any("traces.lock" in layer for layer in plane.images.layers(gateway.image_id))
    assert call(f"{url}/v1/models", headers=KEY)[0] == 200


def test_gateway_carries_the_users_models_file(plane: ModalPlane, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It knows the models that its tiers were deployed with."""
    file = tmp_path_factory.mktemp("own") / "models.toml"
    file.write_text('[models.mine]\nhub_id = "me/mine"\ngpu = "L4"\n')
    put_secrets(plane)
    url = deploy_gateway(plane, SERVICE_MODELS_FILE=str(file), SERVICE_MODEL="mine")
    status, body = call(f"{url}/v1/models", headers=KEY)
    assert status == 200, body
    assert {"mine", "tiny"} <= {model["id"] for model in json.loads(body)["data"]}


def test_gateway_beside_an_app_of_another_name_is_named_after_it(plane: ModalPlane) -> None:
    """`SERVICE_APP` names the tier, and the gateway after it. Where engines check keys it needs no proxy token."""
    plane.secrets.put("team-keys", {"API_KEY": "k"})
    deploy_gateway(plane, SERVICE_APP="team", SERVICE_KEYS_SECRET="team-keys", SERVICE_DIRECT_AUTH="keys")
    assert set(plane.apps) == {"team-gateway"}
    assert len(plane.function("team-gateway", TAG).secret_ids) == 1


def test_keys_of_the_deployed_gateway_outlive_its_container(plane: ModalPlane) -> None:
    """Made, rotated and revoked by the command; digests alone are kept, on a volume that no engine mounts."""
    put_secrets(plane)
    url = deploy_gateway(plane)

    def keys(*arguments: str, key: str = "sk-alice") -> tuple[int, str, str]:
        done = run(plane, "keys", *arguments, "--modal", VLLM_API_KEY=key)
        return done.returncode, done.stdout.strip(), done.stderr

    def status(key: str) -> int:
        return call(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})[0]

    code, key, said = keys("new", "carol", "--requests-per-minute", "5")
    assert (code, status(key)) == (0, 200), said
    (container,) = [task for task in plane.tasks if task.app == APP]
    container.kill()
    plane.wait_until(lambda: container.state is TaskState.DEAD, 20, "the gateway's container to end")
    assert status(key) == 200
    code, successor, said = keys("rotate", "carol", "--grace", "0")
    assert (code, status(key), status(successor)) == (0, 401, 200), said
    assert keys("revoke", "carol")[0] == 0
    assert status(successor) == 401
    code, listed, _ = keys("list", "--json")
    states = {record["name"]: record["state"] for record in json.loads(listed)["keys"]}
    assert states == {"alice": "environment", "bob": "environment", "carol": "revoked"}
    code, printed, said = keys("new", "eve", "--admin", key="sk-bob")
    assert (code, printed, "Set VLLM_API_KEY to an admin key" in said) == (1, "", True)
    volume = plane.volumes["vllm-gateway"]
    assert [*volume.files()] == ["keys/carol.json"]
    assert not [one for one in (key, successor) if one in said + listed + "".join(task.log for task in plane.tasks)]


@pytest.mark.parametrize(
    ("environment", "token", "words"),
    [
        ({"SERVICE_MODEL": "qwen3-8"}, {"MODAL_KEY": "a", "MODAL_SECRET": "b"}, "Did you mean 'qwen3-8b'?"),
        ({"SERVICE_HOLD_S": "2m"}, {"MODAL_KEY": "a", "MODAL_SECRET": "b"}, "Write SERVICE_HOLD_S=120."),
        (
            {"SERVICE_MODEL": "gemma-3-27b-l40s"},
            {"MODAL_KEY": "a", "MODAL_SECRET": "b"},
            "error: Model 'gemma-3-27b' does not fit on L40S",
        ),
        ({}, {"MODAL_KEY": "a"}, "MODAL_SECRET"),
        ({"SERVICE_KEYS_SECRET": "missing-secret"}, {"MODAL_KEY": "a", "MODAL_SECRET": "b"}, "missing-secret"),
    ],
)
def test_gateway_with_wrong_input_publishes_nothing(
    plane: ModalPlane, environment: dict[str, str], token: dict[str, str], words: str
) -> None:
    """Wrong settings, and secrets without their required keys, end the deploy with the reason."""
    plane.secrets.put("vllm-api-key", {"API_KEY": "k"})
    plane.secrets.put("vllm-proxy-token", token)
    done = modal_cli(plane, "deploy", "-m", "service.gateway_app", **environment)
    assert done.returncode != 0
    assert words in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert not [app for app in plane.apps.values() if app.versions]


def test_gateway_without_a_key_refuses_to_start(plane: ModalPlane) -> None:
    """Without a key in the secret it serves no request, and the log has the reason."""
    plane.secrets.put("vllm-api-key", {"OTHER": "x"})
    plane.secrets.put("vllm-proxy-token", {"MODAL_KEY": "a", "MODAL_SECRET": "b"})
    status, _ = call(f"{deploy_gateway(plane)}/health")
    assert status == 500
    assert "Secret 'vllm-api-key' has neither API_KEY nor API_KEYS" in plane.tasks[0].log
    assert plane.tasks[0].state is not TaskState.READY


def test_gateway_in_its_own_image_has_all_that_it_imports(
    tmp_path: Path, client_mount: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With nothing but the light lock installed it starts, from a snapshot that holds its imports, and answers."""
    python = installed(engine_environment.PINS / "light.lock", tmp_path_factory.mktemp("light") / "venv")
    with ModalPlane(tmp_path, container=ContainerRuntime(python=python, client_path=client_mount)) as plane:
        put_secrets(plane)
        imported: list[bool] = []
        plane.snapshots.before_restore.append(lambda task: imported.append(_has_mapped(task, "msgspec")))
        url = deploy_gateway(plane)
        assert call(f"{url}/health") == (200, b'{"status":"ok"}')
        assert call(f"{url}/v1/models", headers=KEY)[0] == 200
        assert plane.tasks[0].restored
        assert imported == [True]
        assert plane.failures == []


def _has_mapped(task: Any, package: str) -> bool:
    """Return whether a container's process has a compiled module of the package in its memory."""
    return f"/{package}/" in Path(f"/proc/{task.pid}/maps").read_text()
