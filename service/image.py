"""The container images: the engine's, with CUDA's compiler, from the lock of machines with a GPU; and the light one.

The deployer's settings are the last layer: every variant reads them, and a changed setting rebuilds no other layer. The
user's models file and the lock file beside it are mounted when a container starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import modal

from service.engine.environment import PINS, pinned
from service.errors import RegistryError
from service.files import expand_user
from service.registry.models import ModelSpec
from service.settings import Settings
from service.weights.revisions import lock_file

# nvcc and headers are needed at run time (FlashInfer and DeepGEMM compile kernels), hence -devel; vLLM 0.32 is built
# for CUDA 13.0, which Modal's driver (580) runs.
# The digest is that of the manifest for amd64, which others have published after `docker manifest inspect`; it was not
# pulled here. `modal.Image.debian_slim` of the light image is Modal's own, which has no digest.
BASE = "nvidia/cuda:13.0.2-devel-ubuntu22.04@sha256:6b6617592b94e7dcc6ffbe6d00720eed27bc6e3b4f06b26b93b4070c31f57391"
PYTHON = "3.12"
MODELS_FILE = "service-models.toml"  # in the container's home
# huggingface_hub 1.0 dropped hf_transfer for Xet: the variable that a pinned client honours is the one that is set.
_FIRST_HUB_WITHOUT_HF_TRANSFER = 1


def engine_image(settings: Settings, spec: ModelSpec) -> modal.Image:
    """Return the image of the containers with a GPU.

    Raises:
        RegistryError: The model is a directory of this machine, which no container has.
    """
    check_sources(spec)
    image = (
        modal.Image.from_registry(BASE, add_python=PYTHON)
        .entrypoint([])
        .uv_pip_install(
            requirements=[str(PINS / "engine-cuda.lock")],
            extra_options="--require-hashes --no-deps",
            uv_version=pinned("light.lock", "uv"),
        )
    )
    transfer = transfer_env(pinned("engine-cuda.lock", "huggingface-hub"))
    if "HF_HUB_ENABLE_HF_TRANSFER" in transfer:
        image = image.uv_pip_install("hf_transfer==0.1.9")
    return with_settings(image, settings, transfer)


def check_sources(spec: ModelSpec) -> None:
    """Refuse a model of which a part is a directory of this machine.

    Raises:
        RegistryError: No container has that directory.
    """
    sources = {f"Model '{spec.key}'": spec.path}
    sources |= {f"Adapter '{adapter.name}' of model '{spec.key}'": adapter.path for adapter in spec.adapters}
    for source, path in sources.items():
        if path and Path(path).is_absolute():
            raise RegistryError(
                f"{source} is the directory {path} of this machine, which no container has.",
                hint="Upload it (vllm-service upload), and give its entry volume instead of path; or give it a hub_id.",
            )


def light_image(*also: str) -> modal.Image:
    """Return the image with the light environment: without the engine a container of it starts in seconds.

    Args:
        also: Further locks of the pins, which agree with the light one's versions.
    """
    return modal.Image.debian_slim(python_version=PYTHON).uv_pip_install(
        requirements=[str(PINS / lock) for lock in ("light.lock", *also)],
        extra_options="--require-hashes --no-deps",
        uv_version=pinned("light.lock", "uv"),
    )


def with_settings(image: modal.Image, settings: Settings, environment: Mapping[str, str]) -> modal.Image:
    """Return the image with settings and `environment` as variables, and with the user's models file and its lock."""
    if not settings.models_file:
        return image.env({**environment, **settings.to_env()})
    in_container = settings.model_copy(update={"models_file": f"~/{MODELS_FILE}"})
    image = image.env({**environment, **in_container.to_env()})
    for local, remote in (
        (expand_user(settings.models_file), MODELS_FILE),
        (lock_file(settings.models_file), lock_file(MODELS_FILE).name),
    ):
        if local.exists():
            image = image.add_local_file(local, f"/root/{remote}")
    return image


def transfer_env(hub_version: str) -> dict[str, str]:
    """Return the variable with which this version of huggingface_hub downloads at full speed."""
    if int(hub_version.partition(".")[0]) < _FIRST_HUB_WITHOUT_HF_TRANSFER:
        return {"HF_HUB_ENABLE_HF_TRANSFER": "1"}
    return {"HF_XET_HIGH_PERFORMANCE": "1"}
