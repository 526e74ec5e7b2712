"""OpenTelemetry's variables: where traces go, and what is handed on for it."""

from __future__ import annotations

import pytest

from service import otel

RECEIVER = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://host/otlp/"}
SPELLED_OUT = {
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://host/otlp/v1/traces",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "mine", "OTEL_EXPORTER_OTLP_HEADERS": "a=b"},
        RECEIVER | {"OTEL_SDK_DISABLED": "TRUE"},
        RECEIVER | {"OTEL_TRACES_EXPORTER": "none"},
        RECEIVER | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "host:4318"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
    ],
)
def test_variables_are_none_unless_traces_can_be_exported(environ: dict[str, str]) -> None:
    """A receiver must be named, and nothing may switch it off."""
    assert otel.variables(environ) == {}


def test_endpoint_of_traces_is_taken_as_it_is() -> None:
    """The common one gets the path of traces, as OpenTelemetry says."""
    own = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://other:1/x"}
    assert otel.variables(RECEIVER) == RECEIVER | SPELLED_OUT
    assert otel.variables(RECEIVER | own) == RECEIVER | SPELLED_OUT | own


def test_variables_that_load_code_or_are_about_other_signals_are_left_out() -> None:
    """What remains is read by the export of traces alone."""
    used = {
        "OTEL_SERVICE_NAME": "mine",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=b",
    }
    unused = {
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "secret=1",
        "OTEL_PYTHON_TRACER_PROVIDER": "x",
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER": "x",
        "OTEL_PROPAGATORS": "x",
        "OTEL_TRACES_EXPORTER": "otlp",
        "API_KEY": "x",
    }
    assert otel.variables(RECEIVER | used | unused) == RECEIVER | SPELLED_OUT | used


@pytest.mark.parametrize(
    ("environ", "name"),
    [({}, "own"), ({"OTEL_SERVICE_NAME": "x"}, None), ({"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=x"}, None)],
)
def test_service_has_the_name_that_the_variables_give_it(environ: dict[str, str], name: str | None) -> None:
    """Else its own."""
    assert otel.service_name(environ, "own") == name
