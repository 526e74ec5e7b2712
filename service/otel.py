"""OpenTelemetry's own variables: whether traces are exported, and which variables gateway and engines get for it.

Nothing is exported unless OTEL_EXPORTER_OTLP_ENDPOINT, or its form for traces, names a receiver. Pure, and imports
nothing of OpenTelemetry. Headers may hold a token of the receiver, so no value is ever logged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT, TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
PROTOCOL = "http/protobuf"
LOCK = "traces.lock"  # of the packages that the gateway needs for it
# What the export of traces reads. None that names a module to load, or is about metrics and logs.
_USED = re.compile(
    r"OTEL_(SERVICE_NAME|RESOURCE_ATTRIBUTES|TRACES_SAMPLER(_ARG)?|BSP_\w+|SPAN_\w+|ATTRIBUTE_\w+"
    r"|EXPORTER_OTLP_(TRACES_)?(ENDPOINT|HEADERS|PROTOCOL|TIMEOUT|COMPRESSION|CERTIFICATE|CLIENT_KEY|CLIENT_CERTIFICATE))"
)
_URL = re.compile(r"https?://[^\s/?#]+\S*", re.IGNORECASE)


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for the export of traces, endpoint and protocol spelled out; empty: nothing is exported."""
    endpoint = _endpoint(environ)
    if endpoint is None or why_off(environ):
        return {}
    used = {name: value for name, value in environ.items() if _USED.fullmatch(name) and value}
    return used | {TRACES_ENDPOINT: endpoint, TRACES_PROTOCOL: PROTOCOL}


def why_off(environ: Mapping[str, str]) -> str | None:
    """Return why traces are not exported although a receiver is named; None: they are, or none is named."""
    endpoint = _endpoint(environ)
    if endpoint is None:
        return None
    if not _URL.fullmatch(endpoint):
        return f"{ENDPOINT} is no URL (its value is not shown). Write http://<host>:4318, or unset it."
    protocol = environ.get(TRACES_PROTOCOL) or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or PROTOCOL
    if protocol != PROTOCOL:
        return (
            f"OTEL_EXPORTER_OTLP_PROTOCOL='{protocol[:40]}' is not {PROTOCOL}, which this service speaks. Set it to "
            f"{PROTOCOL}, and {ENDPOINT} to the receiver's port for it, as a rule 4318."
        )
    return None


def service_name(used: Mapping[str, str], default: str) -> str | None:
    """Return the name of the service that spans have; None: the variables name one."""
    named = used.get("OTEL_SERVICE_NAME") or "service.name=" in used.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return None if named else default


def _endpoint(environ: Mapping[str, str]) -> str | None:
    """Return the URL that traces are sent to; None: none is named, or OpenTelemetry is switched off."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    if endpoint := environ.get(TRACES_ENDPOINT, "").strip():
        return endpoint
    endpoint = environ.get(ENDPOINT, "").strip()
    return f"{endpoint.removesuffix('/')}/v1/traces" if endpoint else None
