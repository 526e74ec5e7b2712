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
from service.registry.models import ModelSpec
from service.settings import Settings
from service.weights.revisions import lock_file

# nvcc and headers are needed at run time (FlashInfer and DeepGEMM compile kernels), hence -devel; vLLM 0.32 is built
# for CUDA 13.0, which Modal's driver (580) runs.
BASE = "nvidia/cuda:13.0.2-devel-ubuntu22.04"
PYTHON = "3.12"
MODELS_FILE = "service-models.toml"  # in the container's home
# huggingface_hub 1.0 dropped hf_transfer for Xet: the variable that a pinned client honours is the one that is set.
_FIRST_HUB_WITHOUT_HF_TRANSFER = 1


def engine_image(settings: Settings, spec: ModelSpec) -> modal.Image:
    """Return the image of the containers with a GPU.

    Raises:
        RegistryError: The model is a directory of this machine, which no container has.
    """
    sources = {f"Model '{spec.key}'": spec.path}
    sources |= {f"Adapter '{adapter.name}' of model '{spec.key}'": adapter.path for adapter in spec.adapters}
    for source, path in sources.items():
        if path and Path(path).is_absolute():
            raise RegistryError(
                f"{source} is the directory {path} of this machine, which no container has.",
                hint="Give its entry a hub_id to deploy it.",
            )
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


def light_image() -> modal.Image:
    """Return the image with the light environment alone: without the engine a container of it starts in seconds."""
    return modal.Image.debian_slim(python_version=PYTHON).uv_pip_install(
        requirements=[str(PINS / "light.lock")],
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
        (Path(settings.models_file).expanduser(), MODELS_FILE),
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
