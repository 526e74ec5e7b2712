"""The deploy that settings and registry describe, its image, volumes and pools."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import modal
import pytest

from service import image, pools, volumes
from service.errors import (
    GpuMemoryError,
    RegistryError,
    ServiceError,
    SettingsError,
    UnknownGpuError,
    UnknownModelError,
    UsageError,
)
from service.modal_app import deployment
from service.modal_app.deployment import Deployment
from service.registry.gpus import GPUS
from service.registry.models import ModelSpec, Registry
from service.registry.tiers import Tier
from service.settings import Settings


def resolve(**fields: str) -> Deployment:
    """Resolve a deployment from these settings."""
    return Deployment.resolve({f"SERVICE_{name.upper()}": text for name, text in fields.items()})


@pytest.mark.parametrize(
    ("fields", "app", "request_"),
    [
        ({}, "vllm-h100", "H100"),
        ({"gpu": "H200"}, "vllm-h200", "H200"),
        ({"gpu": "h200", "n_gpu": "2"}, "vllm-h200x2", "H200:2"),
        ({"n_gpu": "4"}, "vllm-h100x4", "H100:4"),
        ({"gpu": "H100!"}, "vllm-h100-only", "H100!"),
        ({"gpu": "B200+"}, "vllm-b200-plus", "B200+"),
        ({"gpu": "A100"}, "vllm-a100", "A100-80GB"),
        ({"gpu": "A100-80GB"}, "vllm-a100", "A100-80GB"),
        ({"gpu": "a100-40gb"}, "vllm-a100-40gb", "A100-40GB"),
        ({"model": "gemma-3-27b-a100"}, "vllm-a100", "A100-80GB"),
        ({"model": "gemma-3-12b"}, "vllm-l40s", "L40S"),
        ({"model": "gemma-3-12b-h100"}, "vllm-h100", "H100"),
        ({"model": "gemma-3-12b-h100", "gpu": "H200"}, "vllm-h200", "H200"),
        ({"model": "qwen3-235b"}, "vllm-h200x2", "H200:2"),
        ({"model": "qwen3-235b", "gpu": "B300"}, "vllm-b300", "B300"),
        ({"model": "qwen3-235b", "n_gpu": "4"}, "vllm-h200x4", "H200:4"),
        ({"model": "llm"}, "vllm-h100", "H100"),
        ({"model": "openai/GPT-OSS-20b"}, "vllm-h100", "H100"),
        ({"app": "my-app", "gpu": "L4"}, "my-app", "L4"),
    ],
)
def test_deployment_names_app_and_gpu_after_the_tier(fields: dict[str, str], app: str, request_: str) -> None:
    """One app is one GPU tier; setting, then the GPU in the model's name, then the entry's own."""
    deployment = resolve(**fields)

    assert (deployment.app_name, deployment.tier.request) == (app, request_)


@pytest.mark.parametrize("key", sorted(Registry.load().specs))
def test_deployment_of_every_entry_is_the_entrys_own_tier(key: str) -> None:
    """Each entry deploys on the GPU it names."""
    deployment = resolve(model=key)

    assert deployment.tier == Tier(GPUS[deployment.spec.gpu], deployment.spec.n_gpu)
    assert deployment.settings.model == key


@pytest.mark.parametrize(
    "fields",
    [{}, {"model": "gemma-3-12b-h100"}, {"model": "openai/GPT-oss-20b"}, {"gpu": "h100!", "n_gpu": "2"},
     {"model": "llm", "direct_auth": "keys", "snapshot": "off", "fast_boot": "0"}, {"snapshot": "gpu"},
     {"snapshot": "gpu", "fast_boot": "1"}],
)  # fmt: skip
def test_deployment_resolves_the_same_in_the_container(fields: dict[str, str]) -> None:
    """The image carries the resolved settings; secrets, GPU and options must come out identical there."""
    here = resolve(**fields)
    there = Deployment.resolve(here.settings.to_env())

    assert there.settings == here.settings
    assert (there.app_name, there.tier, there.secrets) == (here.app_name, here.tier, here.secrets)
    assert there.fast_boot == here.fast_boot
    assert there.class_options() == here.class_options()


@pytest.mark.parametrize(
    ("fields", "secrets"),
    [
        ({}, {}),
        ({"model": "gemma-3-12b"}, {"huggingface": ["HF_TOKEN"]}),
        ({"model": "llama-3.1-8b", "hub_secret": "mine"}, {"mine": ["HF_TOKEN"]}),
        ({"hub_secret": "mine"}, {"mine": ["HF_TOKEN"]}),
        ({"direct_auth": "keys"}, {"vllm-api-key": []}),
        ({"direct_auth": "proxy", "keys_secret": "team"}, {}),
        ({"direct_auth": "keys", "keys_secret": "t", "model": "gemma-3-27b"}, {"huggingface": ["HF_TOKEN"], "t": []}),
    ],
)  # fmt: skip
def test_deployment_asks_for_the_secrets_it_needs(fields: dict[str, str], secrets: dict[str, list[str]]) -> None:
    """The hub's for gated models, the keys' where the engine authenticates requests, no other."""
    assert resolve(**fields).secrets == secrets


@pytest.mark.parametrize(
    ("fields", "there", "secrets"),
    [
        ({}, {"huggingface"}, {"huggingface": ["HF_TOKEN"]}),
        ({}, set(), {}),
        ({"model": "gemma-3-12b"}, {"huggingface"}, {"huggingface": ["HF_TOKEN"]}),
        ({"hub_secret": "mine"}, {"mine", "huggingface"}, {"mine": ["HF_TOKEN"]}),
    ],
)
def test_deployment_with_a_gated_entry_attaches_the_hubs_secret_where_it_exists(
    fields: dict[str, str], there: set[str], secrets: dict[str, list[str]]
) -> None:
    """Whatever the default model is: the app serves every model of the registry; the container has the same."""
    here = resolve(**fields).with_hub_secret(lambda name: None if name in there else "not found")

    assert here.secrets == Deployment.resolve(here.settings.to_env()).secrets == secrets


@pytest.mark.parametrize(
    ("fields", "secret"),
    [({"model": "gemma-3-12b"}, "huggingface"), ({"hub_secret": "mine"}, "mine")],
)
def test_deployment_without_the_hubs_secret_that_it_needs_names_the_command(
    fields: dict[str, str], secret: str
) -> None:
    """It is needed where the default model is gated, or the user has named it."""
    with pytest.raises(ServiceError) as caught:
        resolve(**fields).with_hub_secret(lambda name: f"Secret '{name}' not found")

    assert f"Secret '{secret}' not found. Create it: modal secret create {secret} HF_TOKEN=<token>" in str(caught.value)


@pytest.mark.parametrize(
    ("gated", "named", "expected"),
    [(False, None, None), (True, None, "huggingface"), (True, "mine", "mine"), (False, "mine", "mine")],
)
def test_hub_secret_is_needed_when_a_model_is_gated(gated: bool, named: str | None, expected: str | None) -> None:
    """Or when the user named one: a draft may be gated too."""
    specs = [ModelSpec(key="open", hub_id="org/open"), ModelSpec(key="mine", hub_id="org/mine", gated=gated)]

    assert deployment.hub_secret(specs, named) == expected


def test_deployment_of_a_registry_without_gated_models_asks_for_no_secret() -> None:
    """Modal is not asked either."""
    deployment = resolve()
    registry = Registry({key: spec for key, spec in deployment.registry.specs.items() if not spec.gated})

    def missing(_: str) -> str:
        raise AssertionError("nothing of it is needed")

    assert dataclasses.replace(deployment, registry=registry).with_hub_secret(missing).secrets == {}


def test_deployment_with_direct_keys_reads_them_from_the_containers_environment() -> None:
    """Modal's proxy asks for none of ours; a secret without a key would leave the engine open."""
    keyed = resolve(direct_auth="keys", keys_secret="team")

    assert resolve().direct_keys({"API_KEY": "k"}) == {}
    assert list(keyed.direct_keys({"API_KEY": "k"}).values()) == ["default"]
    with pytest.raises(UsageError, match="secret 'team' has neither API_KEY nor API_KEYS") as caught:
        keyed.direct_keys({})
    assert "modal secret create --force team API_KEY=<key>" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "option", "expected"),
    [
        ({}, "gpu", "H100"),
        ({}, "scaledown_window", 900),
        ({"scaledown_window": "120"}, "scaledown_window", 120),
        ({"min_containers": "1"}, "min_containers", 1),
        ({"max_containers": "3"}, "max_containers", 3),
        ({}, "max_containers", 1),
        ({"min_containers": "2"}, "max_containers", 2),
        ({"buffer_containers": "2"}, "max_containers", 3),
        ({"buffer_containers": "2"}, "buffer_containers", 2),
        ({}, "startup_timeout", 1860),
        ({"startup_timeout_s": "600"}, "startup_timeout", 660),
        ({}, "timeout", 3600),
        ({"request_timeout_s": "60"}, "timeout", 60),
        ({"region": "us-west"}, "region", "us-west"),
        ({}, "enable_memory_snapshot", True),
        ({}, "region", None),
        ({}, "min_containers", None),
        ({"snapshot": "off"}, "enable_memory_snapshot", None),
        ({"snapshot": "gpu"}, "enable_memory_snapshot", True),
        ({}, "experimental_options", None),
        ({"snapshot": "off"}, "experimental_options", None),
        ({"snapshot": "gpu"}, "experimental_options", {"enable_gpu_snapshot": True}),
    ],
)
def test_deployment_turns_settings_into_the_classs_options(
    fields: dict[str, str], option: str, expected: object
) -> None:
    """What is unset is not passed: Modal's own default holds."""
    assert resolve(**fields).class_options().get(option) == expected


@pytest.mark.parametrize(
    ("fields", "fast_boot"),
    [
        ({}, True),
        ({"snapshot": "off"}, True),
        ({"snapshot": "gpu"}, False),
        ({"snapshot": "gpu", "fast_boot": "true"}, True),
        ({"snapshot": "gpu", "fast_boot": ""}, False),
        ({"snapshot": "off", "fast_boot": "false"}, False),
        ({"fast_boot": "false"}, False),
    ],
)
def test_deployment_compiles_where_a_snapshot_keeps_it(fields: dict[str, str], fast_boot: bool) -> None:
    """Compilation and graphs are paid once under a GPU snapshot, at each boot elsewhere; an explicit setting wins."""
    assert resolve(**fields).fast_boot is fast_boot


@pytest.mark.parametrize("fields", [{"n_gpu": "2"}, {"model": "qwen3-235b"}])
def test_deployment_of_several_gpus_is_refused_a_gpu_snapshot(fields: dict[str, str]) -> None:
    """Whether the setting or the entry requests them; the hint has the alternatives."""
    with pytest.raises(SettingsError) as caught:
        resolve(snapshot="gpu", **fields)

    for part in ("SERVICE_SNAPSHOT=gpu", "run on 2", "SERVICE_SNAPSHOT=cpu", "a GPU that holds the model alone"):
        assert part in str(caught.value)


@pytest.mark.parametrize("fields", [{"n_gpu": "1"}, {"model": "qwen3-235b", "gpu": "B300"}])
def test_deployment_of_one_gpu_may_have_a_gpu_snapshot(fields: dict[str, str]) -> None:
    """An entry of several GPUs runs on one when a larger one is chosen."""
    assert resolve(snapshot="gpu", **fields).tier.n_gpu == 1


@pytest.mark.parametrize(
    ("fields", "kind", "named"),
    [
        ({"model": "qwen3-8"}, UnknownModelError, "SERVICE_MODEL: Unknown model 'qwen3-8'. Did you mean 'qwen3-8b'"),
        ({"gpu": "H1000"}, SettingsError, "SERVICE_GPU: Unknown GPU 'H1000'"),
        ({"gpu": "A10", "n_gpu": "8"}, SettingsError, "SERVICE_N_GPU: 8 x A10"),
        ({"model": "qwen3-4b", "n_gpu": "8"}, UnknownGpuError, "8 x A10"),
        ({"model": "gemma-3-27b", "gpu": "L40S"}, GpuMemoryError, "Use SERVICE_GPU=A100-80GB"),
        ({"model": "gemma-3-27b-l40s"}, GpuMemoryError, "or SERVICE_GPU=H100 (H100, $3.95/h"),
        ({"model": "qwen3-235b", "n_gpu": "1"}, GpuMemoryError, "or SERVICE_GPU=H200 SERVICE_N_GPU=2 (2 x H200"),
        ({"models_file": "/nowhere.toml"}, RegistryError, "/nowhere.toml"),
        ({"modle": "x"}, SettingsError, "SERVICE_MODLE"),
    ],
)
def test_deployment_with_wrong_input_is_a_usage_error(
    fields: dict[str, str], kind: type[UsageError], named: str
) -> None:
    """The error names the setting; Modal was not asked."""
    with pytest.raises(kind) as caught:
        resolve(**fields)

    assert named in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("version", "variable"),
    [
        ("0.36.2", "HF_HUB_ENABLE_HF_TRANSFER"),
        ("1.0.0", "HF_XET_HIGH_PERFORMANCE"),
        ("2.4.0", "HF_XET_HIGH_PERFORMANCE"),
    ],
)
def test_image_switches_on_the_transfer_that_the_pinned_client_honours(version: str, variable: str) -> None:
    """huggingface_hub 1.0 dropped hf_transfer for Xet."""
    assert image.transfer_env(version) == {variable: "1"}


def test_image_of_a_directory_of_this_machine_is_refused() -> None:
    """No container has it."""
    with pytest.raises(RegistryError, match=r"'mine' is the directory /models/mine of this machine.*hub_id"):
        image.engine_image(Settings(), ModelSpec(key="mine", path="/models/mine"))


def test_image_takes_a_models_file_from_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` means the same here as for the registry, which has just read the file."""
    (tmp_path / "models.toml").write_text('[models.mine]\nhub_id = "org/mine"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    added: list[str] = []

    def add(self: modal.Image, local: str | Path, remote: str, *, copy: bool = False) -> modal.Image:
        assert remote.startswith("/root/")
        assert copy in {True, False}
        added.append(str(local))
        return self

    monkeypatch.setattr(modal.Image, "add_local_file", add)
    deployment = resolve(models_file="~/models.toml")
    image.engine_image(deployment.settings, deployment.spec)

    assert added == [str(tmp_path / "models.toml")]


def test_volumes_are_mounted_where_the_caches_are() -> None:
    """The contract's three volumes."""
    named = {path: volume.name for path, volume in volumes.volumes().items()}

    assert named == {f"/root/.cache/{name}": f"{name}-cache" for name in ("huggingface", "vllm", "flashinfer")}
    assert {volume.name for volume in volumes.volumes("a-").values()} == {f"a-{name}" for name in named.values()}


class DeployedClass:
    """A fake `modal.Cls` of a deployed app: it records its calls and has no other methods."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def from_name(self, app: str, name: str) -> DeployedClass:
        """Look up the class."""
        self.calls.append((f"{app}.{name}", {}))
        return self

    def with_options(self, *, gpu: str, scaledown_window: int | None) -> DeployedClass:
        """Return a variant."""
        self.calls.append(("with_options", {"gpu": gpu, "scaledown_window": scaledown_window}))
        return self

    def __call__(self, **parameters: object) -> str:
        """Return the pool of these parameters."""
        self.calls.append(("parameters", parameters))
        return "pool"


def test_pool_variant_is_looked_up_in_its_tier_with_parameters_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the parameters is part of a pool's identity on Modal."""
    deployed = DeployedClass()
    monkeypatch.setattr(modal, "Cls", deployed)

    assert pools.variant("qwen3-235b", "h200", 2, scaledown_window=120) == "pool"
    assert deployed.calls[:2] == [
        ("vllm-h200x2.Server", {}),
        ("with_options", {"gpu": "H200:2", "scaledown_window": 120}),
    ]
    assert list(deployed.calls[2][1].items()) == [("model", "qwen3-235b"), ("n_gpu", 2)]


@pytest.mark.parametrize("fast_boot", [True, False])
def test_pool_variant_with_fast_boot_passes_it_second(monkeypatch: pytest.MonkeyPatch, fast_boot: bool) -> None:
    """Left out, the deployed value holds, which depends on the snapshot."""
    deployed = DeployedClass()
    monkeypatch.setattr(modal, "Cls", deployed)
    pools.variant("qwen3-8b", "H100", fast_boot=fast_boot)

    assert list(deployed.calls[2][1].items()) == [("model", "qwen3-8b"), ("fast_boot", fast_boot), ("n_gpu", 1)]


def test_pool_variant_may_come_from_another_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """One deployed tier serves any GPU from Python."""
    deployed = DeployedClass()
    monkeypatch.setattr(modal, "Cls", deployed)
    pools.variant("qwen3-8b", "L4", app="vllm-h100")

    assert deployed.calls[0][0] == "vllm-h100.Server"


@pytest.mark.parametrize(
    ("gpu", "n_gpu", "app"),
    [("A100", 1, "vllm-a100"), ("a100-80gb", 1, "vllm-a100"), ("A100-40GB", 2, "vllm-a100-40gbx2")],
)
def test_pool_variant_on_an_a100_is_found_in_the_tier_that_a_deploy_of_it_makes(
    gpu: str, n_gpu: int, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every spelling of the card means the same tier."""
    deployed = DeployedClass()
    monkeypatch.setattr(modal, "Cls", deployed)
    pools.variant("qwen3-8b", gpu, n_gpu)

    assert deployed.calls[0][0] == f"{app}.Server"


def test_pool_variant_whose_weights_do_not_fit_is_refused_before_modal_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By any name of a model of the registry; the hint has arguments that fit. An unknown model is not checked."""
    deployed = DeployedClass()
    monkeypatch.setattr(modal, "Cls", deployed)
    for name in ("gemma-3-27b", "google/gemma-3-27b-it", "gemma-3-27b-h100"):
        with pytest.raises(GpuMemoryError, match=r"Use gpu='A100-80GB', n_gpu=1 \(.*or gpu='H100', n_gpu=1 \("):
            pools.variant(name, "L40S")

    assert deployed.calls == []
    assert pools.variant("gemma-3-27b", "L40S", 2) == "pool"
    assert pools.variant("of-the-deployers-registry", "T4") == "pool"


@pytest.mark.parametrize(("gpu", "n_gpu"), [("H1000", 1), ("A10", 5)])
def test_pool_variant_on_gpus_that_modal_does_not_offer_is_refused(gpu: str, n_gpu: int) -> None:
    """Before Modal is asked."""
    with pytest.raises(UnknownGpuError):
        pools.variant("qwen3-8b", gpu, n_gpu)
    assert gpu not in GPUS or n_gpu > GPUS[gpu].max_count
