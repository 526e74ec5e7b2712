"""What `modal deploy -m service.server` publishes, with the real client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modal
import pytest
from modal_proto import api_pb2 as pb

from service.modal_app.deployment import Deployment
from service.registry.models import Registry
from service.settings import Settings
from tests.contract.conftest import deploy, modal_cli
from tests.fakes.modal import ContainerRuntime, ModalPlane

KEYS = list(Registry.load().specs)
NO_HUB_TOKEN = "error: A gated model needs Modal's secret 'huggingface', which is missing or has no HF_TOKEN: "
CREATE_HUB_TOKEN = "hint: Create it: modal secret create huggingface HF_TOKEN=<token>."
VOLUMES = {
    "/root/.cache/huggingface": "huggingface-cache",
    "/root/.cache/vllm": "vllm-cache",
    "/root/.cache/flashinfer": "flashinfer-cache",
}


@dataclass(frozen=True)
class Published:
    """The published class, with the names behind its ids."""

    function: pb.Function
    secrets: dict[str, list[str]]  # name -> keys that the deploy required
    container: dict[str, str]  # the environment that the image gives
    layers: list[str]
    volumes: list[str]

    @property
    def web(self) -> pb.WebhookConfig:
        """What is said of the class's endpoint."""
        return self.function.method_definitions["serve"].webhook_config

    @property
    def parameters(self) -> dict[str, tuple[str, Any]]:
        """Name -> type and default of the class's parameters."""
        return {
            spec.name: (pb.ParameterType.Name(spec.type), getattr(spec, str(spec.WhichOneof("default_oneof"))))
            for spec in self.function.class_parameter_info.schema
        }


def _published(plane: ModalPlane, app: str) -> Published:
    function = pb.Function()
    function.CopyFrom(plane.function(app, "Server"))
    asked = {request.deployment_name: list(request.required_keys) for request in plane.calls("SecretGetOrCreate")}
    there = asked.keys() & plane.secrets.names()
    names = {modal.Secret.from_name(name).hydrate(plane.client()).object_id: name for name in there}
    secrets = {names[secret_id]: asked[names[secret_id]] for secret_id in function.secret_ids}
    images, image = plane.images, function.image_id
    ids = [mount.volume_id for mount in function.volume_mounts]
    mounted = sorted(volume.name for volume in plane.volumes if volume.id in ids)
    return Published(function, secrets, images.env(image), images.layers(image), mounted)


@pytest.mark.parametrize("key", KEYS)
def test_deploy_of_each_entry_publishes_the_class_in_the_contracts_shape(plane: ModalPlane, key: str) -> None:
    """Every registry entry deploys without a warning, on the GPU that the entry names; nothing else differs."""
    spec = Registry.load().specs[key]
    app = f"vllm-{spec.gpu.lower()}" + (f"x{spec.n_gpu}" if spec.n_gpu > 1 else "")
    plane.secrets.put("huggingface", {"HF_TOKEN": "hf_test"})
    deploy(plane, SERVICE_MODEL=key)

    assert set(plane.apps) == {app}
    assert (plane.apps[app].classes, set(plane.apps[app].functions)) == (["Server"], {"Server"})
    assert plane.apps[app].tags == {}
    published = _published(plane, app)
    function = published.function
    assert function.resources == pb.Resources(gpu_config=pb.GPUConfig(gpu_type=spec.gpu, count=spec.n_gpu))
    assert function.autoscaler_settings == pb.AutoscalerSettings(scaledown_window=900, max_containers=1)
    assert (function.max_concurrent_inputs, function.target_concurrent_inputs) == (64, 0)
    assert (function.startup_timeout_secs, function.timeout_secs) == (1860, 3600)
    assert function.checkpointing_enabled
    assert not function._experimental_enable_gpu_snapshot
    assert not function.experimental_options
    assert not function.scheduler_placement.regions
    ids = {mount.volume_id: mount.mount_path for mount in function.volume_mounts if not mount.read_only}
    assert {ids[volume.id]: volume.name for volume in plane.volumes} == VOLUMES
    assert {volume.version for volume in plane.volumes} == {pb.VOLUME_FS_VERSION_V2}
    assert published.secrets == {"huggingface": ["HF_TOKEN"]}  # for the gated ones: one app serves all entries
    assert published.parameters == {
        "model": ("PARAM_TYPE_STRING", key),
        "fast_boot": ("PARAM_TYPE_BOOL", True),
        "n_gpu": ("PARAM_TYPE_INT", spec.n_gpu),
    }
    assert set(function.method_definitions) == {"serve", "complete", "complete_line"}
    assert not function.method_definitions["complete"].webhook_config.type
    assert published.web == pb.WebhookConfig(  # so without a name of its own for the URL, and no domain
        type=pb.WEBHOOK_TYPE_WEB_SERVER,
        async_mode=pb.WEBHOOK_ASYNC_MODE_AUTO,
        web_server_port=8000,
        web_server_startup_timeout=30,
        requires_proxy_auth=True,
    )


Read = Callable[[Published], Any]
# setting: its value in one deploy and in the next of the same app (None: unset), the field, what each deploy publishes
SETTINGS: dict[str, tuple[str, str | None, Read, Any, Any]] = {
    "SERVICE_APP": ("team", "team", lambda p: p.function.app_name, "team", "team"),
    "SERVICE_MODEL": ("tiny", "gpt-oss-20b", lambda p: p.parameters["model"][1], "tiny", "gpt-oss-20b"),
    "SERVICE_GPU": ("H200", None, lambda p: p.function.resources.gpu_config.gpu_type, "H200", "H100"),
    "SERVICE_N_GPU": (
        *("1", "2"),
        lambda p: (p.function.resources.gpu_config.count, p.parameters["n_gpu"][1]),
        *((1, 1), (2, 2)),
    ),
    "SERVICE_FAST_BOOT": ("true", "false", lambda p: p.parameters["fast_boot"][1], True, False),
    "SERVICE_SNAPSHOT": (
        *("gpu", "off"),
        lambda p: (p.function.checkpointing_enabled, dict(p.function.experimental_options)),
        *((True, {"enable_gpu_snapshot": "True"}), (False, {})),
    ),
    "SERVICE_SCALEDOWN_WINDOW": ("60", None, lambda p: p.function.autoscaler_settings.scaledown_window, 60, 900),
    "SERVICE_MIN_CONTAINERS": ("2", None, lambda p: p.function.autoscaler_settings.min_containers, 2, 0),
    "SERVICE_MAX_CONTAINERS": ("7", None, lambda p: p.function.autoscaler_settings.max_containers, 7, 1),
    "SERVICE_BUFFER_CONTAINERS": ("3", None, lambda p: p.function.autoscaler_settings.buffer_containers, 3, 0),
    "SERVICE_MAX_INPUTS": ("8", None, lambda p: p.function.max_concurrent_inputs, 8, 64),
    "SERVICE_TARGET_INPUTS": ("4", None, lambda p: p.function.target_concurrent_inputs, 4, 0),
    "SERVICE_STARTUP_TIMEOUT_S": ("600", None, lambda p: p.function.startup_timeout_secs, 660, 1860),
    "SERVICE_REQUEST_TIMEOUT_S": ("61", None, lambda p: p.function.timeout_secs, 61, 3600),
    "SERVICE_REGION": ("us-west", None, lambda p: list(p.function.scheduler_placement.regions), ["us-west"], []),
    "SERVICE_DIRECT_AUTH": ("keys", None, lambda p: p.web.requires_proxy_auth, False, True),
    "SERVICE_HUB_SECRET": ("team-hub", None, lambda p: p.secrets.get("team-hub"), ["HF_TOKEN"], None),
    "SERVICE_KEYS_SECRET": ("team-keys", None, lambda p: p.secrets.get("team-keys"), [], None),
    "SERVICE_VOLUME_PREFIX": (
        *("team-", None, lambda p: p.volumes),
        *([f"team-{name}" for name in sorted(VOLUMES.values())], sorted(VOLUMES.values())),
    ),
    "SERVICE_PORT": ("8123", None, lambda p: p.web.web_server_port, 8123, 8000),
}
# Read in the container, by the gateway, and by the service on a machine of one's own.
ELSEWHERE = {
    "SERVICE_HANG_S": "99",
    "SERVICE_MAX_N": "99",
    "SERVICE_HOLD_S": "9",
    "SERVICE_MAX_HELD": "9",
    "SERVICE_MAX_HELD_PER_KEY": "9",
    "SERVICE_MAX_GPUS": "9",
    "SERVICE_MAX_DOLLARS_PER_DAY": "99",
    "SERVICE_WEBHOOK_SECRET": "team-webhook",
    "SERVICE_CORS_ORIGINS": "https://chat.example",
    "SERVICE_ALLOWED_HOSTS": "box.lan",
    "SERVICE_KEEP_ALIVE_S": "99",
}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, client_mount: Path) -> Iterator[tuple[Published, Published]]:
    """One app as its first deploy left it, with every setting set, and as the second one did, with few."""
    first = {name: row[0] for name, row in SETTINGS.items()} | ELSEWHERE
    second = {name: row[1] for name, row in SETTINGS.items() if row[1] is not None}
    runtime = ContainerRuntime(client_path=client_mount)
    with ModalPlane(tmp_path_factory.mktemp("team"), container=runtime) as plane:
        plane.secrets.put("team-hub", {"HF_TOKEN": "hf_test"})
        plane.secrets.put("team-keys", {"API_KEY": "k"})
        deploy(plane, **first)
        before = _published(plane, "team")
        deploy(plane, **second)
        yield before, _published(plane, "team")
        assert plane.apps["team"].versions == 2
        assert plane.failures == []
        assert plane.unknown_calls == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_deploy_with_a_setting_publishes_it_and_the_next_one_replaces_it(
    team: tuple[Published, Published], setting: str
) -> None:
    """The class has each deploy's value; a later deploy with another value, or none, replaces it."""
    _, _, read, *expected = SETTINGS[setting]
    assert [read(published) for published in team] == expected


def test_deploy_has_a_field_for_every_setting() -> None:
    """A setting that no deploy publishes is read in the container, or names a file that is shipped."""
    names = {f"SERVICE_{field.upper()}" for field in Settings.model_fields}
    assert names - set(SETTINGS) == {*ELSEWHERE, "SERVICE_MODELS_FILE"}


def test_deploy_carries_the_settings_in_the_images_last_layer(team: tuple[Published, Published]) -> None:
    """The container reads exactly the settings that the deployer had, at each deploy anew."""
    first = {name: row[0] for name, row in SETTINGS.items()} | ELSEWHERE
    second = {name: row[1] for name, row in SETTINGS.items() if row[1] is not None}
    for published, environment in zip(team, (first, second), strict=True):
        carried = {name: value for name, value in published.container.items() if name.startswith("SERVICE_")}
        assert Settings.load(carried) == Deployment.resolve(environment).settings
        assert published.container["HF_XET_HIGH_PERFORMANCE"] == "1"
        assert "HF_HUB_ENABLE_HF_TRANSFER" not in published.container
        assert published.layers[-1].startswith("ENV ")


def test_deploy_of_a_users_models_file_ships_it(plane: ModalPlane, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model of the user's own file is served, and the container finds that file in its home."""
    file = tmp_path_factory.mktemp("own") / "models.toml"
    file.write_text('[models.mine]\nhub_id = "me/mine"\ngpu = "L4"\n')
    deploy(plane, SERVICE_MODELS_FILE=str(file), SERVICE_MODEL="mine")

    function = plane.function("vllm-l4", "Server")
    assert plane.images.env(function.image_id)["SERVICE_MODELS_FILE"] == "~/service-models.toml"
    uploaded = [file for mount in plane.calls("MountGetOrCreate") for file in mount.files]
    assert "/root/service-models.toml" in {file.filename for file in uploaded}


def test_deploy_twice_publishes_the_same_class_and_uploads_nothing_new(plane: ModalPlane) -> None:
    """A second deploy of the same settings leaves the app as it is: no field of the class differs, no file is sent."""
    deploy(plane)
    app = plane.apps["vllm-h100"]
    before, function_ids, class_ids = _definition(plane), dict(app.function_ids), dict(app.class_ids)
    assert "/root/service/server.py" in dict(before[1])
    images, uploads = plane.calls("ImageGetOrCreate"), len(plane.calls("MountPutFile"))
    deploy(plane)
    assert plane.apps["vllm-h100"] is app
    assert (app.versions, app.function_ids, app.class_ids) == (2, function_ids, class_ids)
    assert _definition(plane) == before
    assert plane.calls("ImageGetOrCreate") == [*images, *images]
    assert len(plane.calls("MountPutFile")) == uploads


def _definition(plane: ModalPlane) -> tuple[str, list[tuple[str, str]]]:
    """Return all that is published of the class, as text; and the package's files, since the id of the mount is new."""
    function = pb.Function()
    function.CopyFrom(plane.function("vllm-h100", "Server"))
    assert len(function.mount_ids) == 2, "the client's and the package's"
    function.ClearField("mount_ids")
    mounts = [request for request in plane.calls("MountGetOrCreate") if request.files]
    return str(function), sorted((file.filename, file.sha256_hex) for file in mounts[-1].files)


def test_deploy_with_a_secret_that_lacks_its_key_names_the_key(plane: ModalPlane) -> None:
    """A gated default model's secret must have HF_TOKEN; without it nothing is published."""
    plane.secrets.put("huggingface", {"TOKEN": "hf_test"})
    _refused(
        plane,
        {"SERVICE_MODEL": "llama-3.1-8b"},
        f"{NO_HUB_TOKEN}Secret 'huggingface' is missing key(s): HF_TOKEN. {CREATE_HUB_TOKEN}",
    )


@pytest.mark.parametrize("values", [None, {"TOKEN": "hf_test"}])
def test_deploy_of_an_ungated_model_needs_no_hub_token(plane: ModalPlane, values: dict[str, str] | None) -> None:
    """No secret, or one without HF_TOKEN, is not attached; the next deploy after it was made attaches it."""
    if values:
        plane.secrets.put("huggingface", values)
    deploy(plane)
    assert not plane.function("vllm-h100", "Server").secret_ids

    plane.secrets.put("huggingface", {"HF_TOKEN": "hf_test"})
    deploy(plane)
    assert _published(plane, "vllm-h100").secrets == {"huggingface": ["HF_TOKEN"]}


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"SERVICE_MODEL": "qwen3-8"},
            "error: SERVICE_MODEL: Unknown model 'qwen3-8'. Did you mean 'qwen3-8b'? Registered: qwen3-8b, ",
        ),
        (
            {"SERVICE_GPU": "H1000"},
            "error: SERVICE_GPU: Unknown GPU 'H1000'. hint: Did you mean 'H100'? "
            "Modal offers: T4, L4, A10, L40S, A100-40GB, ",
        ),
        (
            {"SERVICE_SCALEDOWN_WINDOW": "15m"},
            "error: SERVICE_SCALEDOWN_WINDOW='15m' is not a whole number from 2 to 3600. "
            "Meaning: seconds without a request before a replica stops. hint: Write SERVICE_SCALEDOWN_WINDOW=900.",
        ),
        (
            {"SERVICE_SCALEDOWN_WINDW": "60"},
            "error: SERVICE_SCALEDOWN_WINDW is not a setting of this service. "
            "hint: Did you mean 'SERVICE_SCALEDOWN_WINDOW'? Known: SERVICE_ALLOWED_HOSTS, SERVICE_APP, ",
        ),
        (
            {"SERVICE_MODELS_FILE": "/nowhere.toml"},
            "error: Models file '/nowhere.toml' cannot be read: No such file or directory. "
            "hint: Set SERVICE_MODELS_FILE to a TOML file, or unset it.",
        ),
        (
            {"SERVICE_MODEL": "llama-3.1-8b"},
            f"{NO_HUB_TOKEN}Secret 'huggingface' not found in environment 'main'. {CREATE_HUB_TOKEN}",
        ),
        (
            {"SERVICE_MODEL": "gemma-3-27b", "SERVICE_GPU": "L40S"},
            "error: Model 'gemma-3-27b' does not fit on L40S: its weights are 54.9 GB, and vLLM uses 44.2 of 48 GB "
            "(92%). hint: Use SERVICE_GPU=A100-80GB (A100-80GB, $2.50/h, the cheapest that fits) or SERVICE_GPU=H100 (",
        ),
        ({"SERVICE_DIRECT_AUTH": "keys"}, "Error: Secret 'vllm-api-key' not found in environment 'main'"),
    ],
)
def test_deploy_with_wrong_input_publishes_nothing(
    plane: ModalPlane, environment: dict[str, str], sentence: str
) -> None:
    """Wrong settings and missing secrets end the deploy with an error and a hint."""
    _refused(plane, environment, sentence)


def _refused(plane: ModalPlane, environment: dict[str, str], sentence: str) -> None:
    """Deploy, and check that it ends with this error before any other output, with nothing published."""
    done = modal_cli(plane, "deploy", "-m", "service.server", **environment)
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert said.startswith(sentence), said
    assert not [app for app in plane.apps.values() if app.versions], "nothing is published"
