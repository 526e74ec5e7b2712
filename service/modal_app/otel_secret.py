"""How OpenTelemetry's variables reach the containers: as a secret of the app's own, made of the deployer's environment.

Headers may hold a token, so nothing of them is in an image. A container has the variables, and finds the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import modal

from service import otel


def secrets(environ: Mapping[str, str]) -> list[modal.Secret]:
    """Return the secret with the variables for the export of traces; none where nothing is exported."""
    used: dict[str, str | None] = {**otel.variables(environ)}
    return [modal.Secret.from_dict(used)] if used else []


def locks(environ: Mapping[str, str]) -> list[str]:
    """Return the lock of the packages for the export of traces; none where nothing is exported."""
    return [otel.LOCK] if otel.variables(environ) else []
