"""What `modal deploy -m service.server` publishes, with the real client."""

from __future__ import annotations

import pytest

from service.deployment import Deployment
from service.models import Registry
from tests.contract.conftest import deploy, modal_cli
from tests.fakes.modal import ModalPlane

KEYS = list(Registry.load().specs)


@pytest.mark.parametrize("key", KEYS)
def test_deploy_of_each_entry_publishes_the_class_on_its_gpu(plane: ModalPlane, key: str) -> None:
    """Every registry entry deploys without a warning, on the GPU that the entry names, in the contract's shape."""
    expected = Deployment.resolve({"SERVICE_MODEL": key})
    if expected.spec.gated:
        plane.secrets.put("huggingface", {"HF_TOKEN": "hf_test"})
    deploy(plane, SERVICE_MODEL=key)

    function = plane.function(expected.app_name, "Server")
    assert function.resources.gpu_config.gpu_type == expected.spec.gpu
    assert function.resources.gpu_config.count == expected.spec.n_gpu
    assert function.max_concurrent_inputs == 64
    assert function.checkpointing_enabled
    assert function.timeout_secs == 3600
    assert function.startup_timeout_secs == 1860
    assert {mount.mount_path for mount in function.volume_mounts} == {
        "/root/.cache/huggingface",
        "/root/.cache/vllm",
        "/root/.cache/flashinfer",
    }
    assert len(function.secret_ids) == int(expected.spec.gated)
    methods = function.method_definitions
    assert set(methods) == {"serve", "complete"}
    assert methods["serve"].webhook_config.requires_proxy_auth
    assert methods["serve"].webhook_config.web_server_port == 8000
    parameters = {parameter.name for parameter in function.class_parameter_info.schema}
    assert parameters == {"model", "fast_boot", "n_gpu"}


def test_deploy_carries_the_settings_in_the_images_last_layer(plane: ModalPlane) -> None:
    """The container reads exactly the settings that the deployer had."""
    environment = {
        "SERVICE_MODEL": "gpt-oss-20b",
        "SERVICE_GPU": "B200",
        "SERVICE_N_GPU": "2",
        "SERVICE_SCALEDOWN_WINDOW": "60",
        "SERVICE_MAX_CONTAINERS": "3",
        "SERVICE_FAST_BOOT": "false",
    }
    deploy(plane, **environment)

    function = plane.function("vllm-b200x2", "Server")
    carried = plane.images.env(function.image_id)
    assert Deployment.resolve({k: v for k, v in carried.items() if k.startswith("SERVICE_")}).settings == (
        Deployment.resolve(environment).settings
    )
    assert carried["HF_XET_HIGH_PERFORMANCE"] == "1"
    assert "HF_HUB_ENABLE_HF_TRANSFER" not in carried
    assert function.resources.gpu_config.count == 2
    assert plane.images.layers(function.image_id)[-1].startswith("ENV ")


def test_deploy_of_a_users_models_file_ships_it(plane: ModalPlane, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model of the user's own file is served, and the container finds that file in its home."""
    file = tmp_path_factory.mktemp("own") / "models.toml"
    file.write_text('[models.mine]\nhub_id = "me/mine"\ngpu = "L4"\n')
    deploy(plane, SERVICE_MODELS_FILE=str(file), SERVICE_MODEL="mine")

    function = plane.function("vllm-l4", "Server")
    assert plane.images.env(function.image_id)["SERVICE_MODELS_FILE"] == "~/service-models.toml"
    uploaded = [file for mount in plane.calls("MountGetOrCreate") for file in mount.files]
    assert "/root/service-models.toml" in {file.filename for file in uploaded}


def test_deploy_twice_keeps_the_app_and_uploads_nothing_new(plane: ModalPlane) -> None:
    """A second deploy of the same settings updates the app in place; no layer and no file is sent again."""
    deploy(plane)
    app, image = plane.apps["vllm-h100"].app_id, plane.function("vllm-h100", "Server").image_id
    uploads = len(plane.calls("MountPutFile"))
    deploy(plane)
    assert plane.apps["vllm-h100"].app_id == app
    assert plane.function("vllm-h100", "Server").image_id == image
    assert len(plane.calls("MountPutFile")) == uploads


def test_deploy_with_a_changed_setting_replaces_it(plane: ModalPlane) -> None:
    """What a later deploy says is what the class and the container have."""
    deploy(plane, SERVICE_SCALEDOWN_WINDOW="60", SERVICE_MAX_INPUTS="8", SERVICE_TARGET_INPUTS="4")
    deploy(plane, SERVICE_SCALEDOWN_WINDOW="120", SERVICE_SNAPSHOT="off", SERVICE_DIRECT_AUTH="proxy")
    function = plane.function("vllm-h100", "Server")
    assert function.autoscaler_settings.scaledown_window == 120
    assert function.max_concurrent_inputs == 64
    assert function.target_concurrent_inputs == 0
    assert not function.checkpointing_enabled
    assert plane.images.env(function.image_id)["SERVICE_SCALEDOWN_WINDOW"] == "120"


def test_deploy_with_a_secret_that_lacks_its_key_names_the_key(plane: ModalPlane) -> None:
    """A gated model's secret must have HF_TOKEN; without it nothing is published."""
    plane.secrets.put("huggingface", {"TOKEN": "hf_test"})
    done = modal_cli(plane, "deploy", "-m", "service.server", SERVICE_MODEL="llama-3.1-8b")
    assert done.returncode != 0
    assert "HF_TOKEN" in done.stdout + done.stderr
    assert not [app for app in plane.apps.values() if app.versions]


def test_deploy_with_keys_of_its_own_opens_the_endpoint(plane: ModalPlane) -> None:
    """`SERVICE_DIRECT_AUTH=keys` attaches the keys' secret and leaves Modal's proxy auth off, as the docs warn."""
    plane.secrets.put("vllm-api-key", {"API_KEY": "k"})
    deploy(plane, SERVICE_DIRECT_AUTH="keys")
    function = plane.function("vllm-h100", "Server")
    assert not function.method_definitions["serve"].webhook_config.requires_proxy_auth
    assert len(function.secret_ids) == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SERVICE_MODEL": "qwen3-8"}, "Did you mean 'qwen3-8b'?"),
        ({"SERVICE_GPU": "H1000"}, "Unknown GPU 'H1000'"),
        ({"SERVICE_SCALEDOWN_WINDOW": "15m"}, "write 900"),
        ({"SERVICE_SCALEDOWN": "60"}, "Did you mean 'SERVICE_SCALEDOWN_WINDOW'?"),
        ({"SERVICE_MODELS_FILE": "/nowhere.toml"}, "cannot be read"),
        ({"SERVICE_MODEL": "llama-3.1-8b"}, "huggingface"),
        ({"SERVICE_DIRECT_AUTH": "keys"}, "vllm-api-key"),
    ],
)
def test_deploy_with_wrong_input_publishes_nothing(plane: ModalPlane, environment: dict[str, str], words: str) -> None:
    """Wrong settings and missing secrets end the deploy with the reason, and nothing is published."""
    done = modal_cli(plane, "deploy", "-m", "service.server", **environment)
    assert done.returncode != 0
    assert words in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert not [app for app in plane.apps.values() if app.versions], "nothing is published"
