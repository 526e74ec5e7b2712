"""What a shell completes: models of the registry, and GPUs. Typer offers those that begin as typed."""

from __future__ import annotations


def models() -> list[str]:
    """Return the keys of the registry; none where the models file cannot be read."""
    from service.errors import ServiceError
    from service.settings import Settings
    from service.weights import revisions

    try:
        return [*revisions.registry(Settings.load().models_file).specs]
    except ServiceError:  # a completion prints nothing; the command itself says what is wrong
        return []


def gpus() -> list[str]:
    """Return Modal's names of GPUs."""
    from service.registry.gpus import GPUS

    return [*GPUS]


def targets() -> list[str]:
    """Return both."""
    return gpus() + models()
