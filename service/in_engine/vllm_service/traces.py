"""Has vLLM export its spans of requests, once the parent's release has said where to.

vLLM's flag for it, `--otlp-traces-endpoint`, would come too early: a snapshot of the built engine would hold the
receiver's token and a connection to it, and the canary would be a trace. So this does what the flag does in
`AsyncLLM.__init__`, after the release. The spans are made by the API server; the engine core has none of requests.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any

from vllm_service import trace_context

FLUSH_S = 1.0  # at the end of the engine
_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
enabled = False


def enable(engine: Any, variables: dict[str, str], replica: str | None) -> None:
    """Export the spans of requests, as these variables of OpenTelemetry's say; without them nothing is exported.

    Args:
        engine: vLLM's `AsyncLLM`.
        variables: As `service.otel.variables` returns them.
        replica: Id of this replica.
    """
    global enabled  # noqa: PLW0603 - one engine, one exporter
    if not variables:
        return
    from vllm import tracing

    if "service.name=" not in variables.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        variables = {"OTEL_SERVICE_NAME": "vllm", **variables}
    endpoint = variables[_ENDPOINT]
    trace_context.limit_log(endpoint)
    os.environ.update(variables)  # where vLLM and the exporter read them, now and never again
    tracing.init_tracer("vllm.llm_engine", endpoint, {"service.instance.id": replica} if replica else None)
    for name in variables:  # no process that the engine starts gets the receiver's token
        del os.environ[name]
    engine.observability_config.otlp_traces_endpoint = endpoint
    engine.output_processor.tracing_enabled = enabled = True
    _flush_within(FLUSH_S)


def _flush_within(seconds: float) -> None:
    """Have this process export what is queued when it ends, but not wait for a receiver that does not answer."""
    from opentelemetry import trace

    shutdown: Any = trace.get_tracer_provider().shutdown
    atexit.unregister(shutdown)  # vLLM's, and OpenTelemetry's own

    def flush() -> None:
        thread = threading.Thread(target=shutdown, name="flush traces", daemon=True)
        thread.start()
        thread.join(seconds)

    atexit.register(flush)
