"""The container images: the engine's, with CUDA's compiler, from the lock of machines with a GPU; and the light one.

The deployer's settings are the last layer: every variant sees them, and a changed setting rebuilds nothing else. A
models file of the user's and the lock file beside it are mounted, not built in.
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


def image(settings: Settings, spec: ModelSpec) -> modal.Image:
    """Return the image for these settings.

    Raises:
        RegistryError: The model is a directory of this machine, which no container has.
    """
    for named, path in (("", spec.path), *((f"Adapter '{part.name}' of m", part.path) for part in spec.adapters)):
        if path and Path(path).is_absolute():
            raise RegistryError(
                f"{named or 'M'}odel '{spec.key}' is the directory {path} of this machine, which no container has.",
                hint="Give its entry a hub_id to deploy it.",
            )
    built = (
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
        built = built.uv_pip_install("hf_transfer==0.1.9")
    return carrying(built, settings, transfer)


def light_image() -> modal.Image:
    """Build the light environment from its lock: the engine is not in it, so that it is there in seconds."""
    return modal.Image.debian_slim(python_version=PYTHON).uv_pip_install(
        requirements=[str(PINS / "light.lock")],
        extra_options="--require-hashes --no-deps",
        uv_version=pinned("light.lock", "uv"),
    )


def carrying(built: modal.Image, settings: Settings, environment: Mapping[str, str]) -> modal.Image:
    """Add the settings, as the container is to read them, with further variables, and the user's models file."""
    if not settings.models_file:
        return built.env({**environment, **settings.to_env()})
    carried = settings.model_copy(update={"models_file": f"~/{MODELS_FILE}"})
    built = built.env({**environment, **carried.to_env()})
    for local, remote in (
        (Path(settings.models_file).expanduser(), MODELS_FILE),
        (lock_file(settings.models_file), lock_file(MODELS_FILE).name),
    ):
        if local.exists():
            built = built.add_local_file(local, f"/root/{remote}")
    return built


def transfer_env(hub_version: str) -> dict[str, str]:
    """Return the variable that makes this huggingface_hub download at full speed."""
    if int(hub_version.partition(".")[0]) < _FIRST_HUB_WITHOUT_HF_TRANSFER:
        return {"HF_HUB_ENABLE_HF_TRANSFER": "1"}
    return {"HF_XET_HIGH_PERFORMANCE": "1"}
