"""The recorded boots that cannot work, as the command line reads and removes them from Modal's volume. Blocks."""

from __future__ import annotations

from collections.abc import Iterable

import modal

from service.boots.failures import BootFailure, directory_of
from service.modal_app.account import translate_errors
from service.volumes import VLLM_CACHE, volume_name


def clear(apps: Iterable[str], volume_prefix: str | None) -> list[BootFailure]:
    """Remove what is recorded of these apps, so that the next request boots; return what still held.

    Raises:
        ServiceError: Modal does not answer.
    """
    volume = modal.Volume.from_name(volume_name(VLLM_CACHE, volume_prefix))
    found: list[BootFailure | None] = []
    with translate_errors("clear the recorded failures"):
        for app in apps:
            try:
                paths = [entry.path for entry in volume.listdir(directory_of(app))]
            except (modal.exception.NotFoundError, FileNotFoundError):  # none was ever recorded
                continue
            for path in paths:
                found.append(BootFailure.parse(b"".join(volume.read_file(path))))
                volume.remove_file(path)
    return [failure for failure in found if failure]
