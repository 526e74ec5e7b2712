"""Traces from a client through the gateway to the engine, at a receiver of the real protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from tests.engine.running import GONE_S, Service, wait_until
from tests.gateway.otlp import receiving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED = "1af7651916cd43dd8448eb211c80319c"
KEY = "sk-of-alice"


@pytest.mark.usefixtures("engine_environment")
def test_trace_goes_from_the_client_through_the_gateway_to_the_engine(tmp_path: Path) -> None:
    """One trace with the client's id has the spans of all three; one that the client does not sample has none."""
    with receiving() as receiver:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-token=of-the-receiver",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "API_KEYS": f"alice={KEY}",
        }
        with Service(tmp_path, "tiny", **variables) as service:
            service.wait_ready().engine()

            def ask(trace: str, flags: str, **body: object) -> requests.Response:
                answer = requests.post(
                    f"{service.url}/v1/chat/completions",
                    json={"model": "tiny", "messages": [{"role": "user", "content": "s3cret-prompt"}], **body},
                    headers={"Authorization": f"Bearer {KEY}", "traceparent": f"00-{trace}-{PARENT}-{flags}"},
                    timeout=60,
                )
                assert answer.status_code == 200, service.story
                return answer

            ask(UNSAMPLED, "00", max_tokens=5)
            usage = ask(TRACE, "01", max_tokens=5).json()["usage"]
            request, call, engine = receiver.named("POST /v1/chat/completions", "chat tiny", "llm_request")
            ask(TRACE, "01", max_tokens=5, stream=True)  # is queued when the end begins
            for process in service.engine():
                assert "of-the-receiver" not in str([process.cmdline(), process.environ()])
            asked = service.signal()
            assert service.wait_ended(GONE_S) == 0, service.story
            service.wait_gone(asked + GONE_S)
        wait_until(lambda: len(receiver.spans) == 6, 5)

    assert {span.trace for span in receiver.spans} == {TRACE}
    assert (request.parent, call.parent, engine.parent) == (PARENT, request.id, call.id)
    assert (request.service, call.service, engine.service) == ("vllm-gateway", "vllm-gateway", "vllm")
    tokens = usage["prompt_tokens"], usage["completion_tokens"]
    found = call.attributes
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == tokens
    streamed = [span.attributes for span in receiver.spans if span.name == call.name and span is not call]
    assert [attributes["gen_ai.usage.output_tokens"] for attributes in streamed] == [5]
    found = engine.attributes
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == tokens
    assert {headers["x-token"] for headers in receiver.headers} == {"of-the-receiver"}
    for secret in (b"s3cret-prompt", KEY.encode()):
        assert secret not in receiver.bytes_
    assert "of-the-receiver" not in service.story
