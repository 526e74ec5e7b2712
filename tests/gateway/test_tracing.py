"""Traces of requests: their spans, whose part they are, and a receiver that does not take them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.boots.records import Span
from service.gateway import spans, tracing
from service.gateway.clients import ClientRegistry
from service.gateway.spans import Tracing
from service.registry.models import Registry
from tests.gateway.otlp import Receiver, receiving
from tests.gateway.upstream import (
    ALICE,
    ASK,
    KEYS,
    SPECS,
    STREAMED,
    Engine,
    Request,
    answers,
    eventually,
    refuses,
    serve_gateway,
    streams,
)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
CHAT, CALL, WAIT = "POST /v1/chat/completions", "chat tiny", "wait for replica"
SWITCHES = ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"})
SERVER, CLIENT = 2, 3  # SPAN_KIND_… of the protocol


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver that OpenTelemetry's variables name."""
    with receiving() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=of-the-receiver")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        yield found


def traced() -> Tracing:
    """Return what the variables of this process make."""
    found = tracing.from_environ(os.environ)
    assert found
    return found


def context(request: Request) -> tuple[str, str, str]:
    """Return trace, span and flags that an engine got."""
    _, trace, span, flags = request.headers["traceparent"].split("-")
    return trace, span, flags


def test_trace_has_the_request_its_wait_and_its_call(receiver: Receiver) -> None:
    """The client's span is the parent of the gateway's, and the gateway's call that of the engine's spans."""

    async def run() -> Request:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), url=engine.url, tracing=traced()) as gateway,
        ):
            async with gateway.post(ASK, headers={**ALICE, **CONTEXT, "X-Request-Id": "my-id"}) as answer:
                assert answer.status == 200
            return engine.requests[0]

    sent = asyncio.run(run())
    request, wait, call = receiver.named(CHAT, WAIT, CALL)
    assert {span.trace for span in receiver.spans} == {TRACE}
    assert (request.parent, wait.parent, call.parent) == (PARENT, request.id, request.id)
    assert (request.kind, call.kind, request.state) == (SERVER, CLIENT, "vendor=1")
    assert context(sent) == (TRACE, call.id, "01")
    assert sent.headers["tracestate"] == "vendor=1"
    assert request.start <= wait.start <= wait.end <= call.start <= call.end <= request.end
    assert request.service == "vllm-gateway"
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "vllm_service.key.name": "alice",
        "vllm_service.request.id": "my-id",
    }
    port = call.attributes.pop("server.port")
    assert isinstance(port, int)
    assert call.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "http.request.method": "POST",
        "server.address": "127.0.0.1",
        "vllm_service.pool.location": "H100",
    }
    assert receiver.headers[0]["x-token"] == "of-the-receiver"


def test_trace_has_neither_keys_nor_content(receiver: Receiver) -> None:
    """The receiver gets no byte of a key, a header, a query, a prompt or an answer."""
    body = ASK | {"messages": [{"role": "user", "content": "s3cret-prompt"}], "user": "s3cret-user"}

    async def run() -> None:
        async with (
            Engine(streams(b'data: {"x": "s3cret-answer"}\n\n')).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), url=engine.url, tracing=traced()) as gateway,
        ):
            headers = {**ALICE, "User-Agent": "s3cret-agent", "X-Session-Id": "s3cret-session"}
            path = "/v1/chat/completions?s3cret-query=1"
            async with gateway.post(body | {"stream": True}, path, headers=headers) as answer:
                assert b"s3cret-answer" in await answer.read()

    asyncio.run(run())
    receiver.named(CHAT, WAIT, CALL)
    for secret in (b"s3cret", b"a-key", b"of-the-pool"):
        assert secret not in receiver.bytes_


def test_trace_that_the_client_does_not_sample_is_not_exported(receiver: Receiver) -> None:
    """Its ids go on to the engine all the same, with the flag as the client set it."""

    async def run() -> Request:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(url=engine.url, tracing=traced()) as gateway,
        ):
            async with gateway.post(ASK, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}) as answer:
                assert answer.status == 200
            async with gateway.post(ASK, "/v1/completions") as answer:  # shows that the export works
                assert answer.status == 200
            return engine.requests[0]

    trace, span, flags = context(asyncio.run(run()))
    assert (trace, flags) == (TRACE, "00")
    assert span != PARENT
    receiver.named("POST /v1/completions", "text_completion tiny")
    assert TRACE not in {span.trace for span in receiver.spans}


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": f"00-{TRACE}-{PARENT}"},
        {"traceparent": f"00-{TRACE.upper()}-{PARENT}-01"},
        {"traceparent": f"ff-{TRACE}-{PARENT}-01"},
        {"traceparent": f"00-{'0' * 32}-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{PARENT}-01-{'x' * 600}"},
        {"traceparent": "x" * 100_000},
        {"tracestate": "vendor=1"},
    ],
)
def test_trace_context_that_is_invalid_begins_a_trace(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, headers: dict[str, str]
) -> None:
    """It is no error, no line of the log, and nothing of it is handed on."""

    async def run() -> Request:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, tracing=traced()) as gateway:
            async with gateway.post(ASK, headers=headers) as answer:
                assert answer.status == 200
            return engine.requests[0]

    sent = asyncio.run(run())
    request, call = receiver.named(CHAT, CALL)
    assert request.parent == ""
    assert request.trace != TRACE
    trace, span, flags = context(sent)
    assert (trace, span, int(flags, 16) & 1) == (request.trace, call.id, 1)
    assert "tracestate" not in sent.headers
    assert caplog.records == []


def test_trace_state_over_the_limit_is_left_out(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """The trace goes on without it."""
    states = [f"v{'x' * 600}=1", ",".join(f"v{number}=1" for number in range(40))]

    async def run() -> list[Request]:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, tracing=traced()) as gateway:
            for state in states:
                async with gateway.post(ASK, headers={**CONTEXT, "tracestate": state}) as answer:
                    assert answer.status == 200
            return engine.requests

    for sent in asyncio.run(run()):
        assert context(sent)[0] == TRACE
        assert "tracestate" not in sent.headers
    assert caplog.records == []


def test_trace_of_a_wake_has_the_phases_of_the_boot(receiver: Receiver) -> None:
    """They are events of the wait, with how long they took; those that ended before it are not."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(tracing=traced()) as gateway:
            pool = gateway.app._inference._router.find("tiny").pool
            pool.url = engine.url  # type: ignore[attr-defined]
            asked = asyncio.ensure_future(_status(gateway.post(ASK)))
            while not pool._waking:  # noqa: ASYNC110 - it is state, not an event
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            kind = type(pool)
            phases = (Span("image", -9.0, -1.0), Span("weights", 0.01, 0.06))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kind, "wake_phases", phases)
                pool.may_wake.set()  # type: ignore[attr-defined]
                assert await asked == 200

    asyncio.run(run())
    (wait,) = receiver.named(WAIT)
    assert wait.events == {"weights": {"vllm_service.phase.seconds": 0.05}}
    assert wait.attributes["vllm_service.pool.state"] == "cold"
    assert wait.end - wait.start > 0.1e9


async def _status(answer: object) -> int:
    async with answer as found:  # type: ignore[attr-defined]
        await found.read()
        return int(found.status)


def test_trace_of_an_error_of_the_engine_names_its_code(receiver: Receiver) -> None:
    """The call and the request have the code of the API error; only 5xx is an error of the request's span."""

    async def run() -> None:
        async with (
            Engine(refuses(400, {"message": "no"})).serving() as engine,
            serve_gateway(url=engine.url, tracing=traced()) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert answer.status == 400

    asyncio.run(run())
    request, call = receiver.named(CHAT, CALL)
    assert (request.attributes["error.type"], call.attributes["error.type"]) == ("invalid_request", "invalid_request")
    assert request.attributes["http.response.status_code"] == 400
    assert (request.is_error, call.is_error) == (False, True)


def test_trace_of_a_pool_that_does_not_wake_is_an_error(receiver: Receiver) -> None:
    """The wait failed, there is no call, and the request is 503."""

    async def run() -> None:
        async with serve_gateway(url="http://127.0.0.1:1", tracing=traced()) as gateway:
            pool = gateway.app._inference._router.find("tiny").pool
            pool.fails = "It ended."  # type: ignore[attr-defined]
            assert await _status(gateway.post(ASK)) == 503

    asyncio.run(run())
    request, wait = receiver.named(CHAT, WAIT)
    assert request.is_error
    assert wait.is_error
    assert (request.attributes["error.type"], wait.attributes["error.type"]) == ("model_failed", "model_failed")
    assert CALL not in {span.name for span in receiver.spans}


def test_trace_of_a_fallback_has_both_models(receiver: Receiver) -> None:
    """The call is that of the model which answers; what was requested stays the request's model."""
    specs = {**SPECS, "tiny": SPECS["tiny"].model_copy(update={"fallback": ("other",), "fallback_default": "allow"})}

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(registry=Registry(specs), tracing=traced()) as gateway,
        ):
            pool = gateway.app._inference._router.find("other").pool
            pool.url = engine.url  # type: ignore[attr-defined]
            pool.may_wake.set()  # type: ignore[attr-defined]
            await pool.ready()
            assert await _status(gateway.post(ASK)) == 200

    asyncio.run(run())
    request, wait, call = receiver.named(CHAT, WAIT, "chat other")
    assert request.attributes["gen_ai.request.model"] == call.attributes["gen_ai.request.model"] == "tiny"
    assert request.attributes["gen_ai.response.model"] == call.attributes["gen_ai.response.model"] == "other"
    assert wait.attributes["error.type"] == "TimeoutError"


def test_trace_of_a_client_that_left_ends(receiver: Receiver) -> None:
    """Both spans end when the client does."""

    async def run() -> None:
        async with (
            Engine(streams(b"data: {}\n\n", ends=False)).serving() as engine,
            serve_gateway(url=engine.url, tracing=traced()) as gateway,
        ):
            async with gateway.post(STREAMED) as answer:
                await answer.content.readany()
            await asyncio.to_thread(receiver.named, CHAT, CALL)

    asyncio.run(run())
    (request,) = receiver.named(CHAT)
    assert request.attributes["http.response.status_code"] == 499


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
def test_request_that_no_engine_answers_is_not_traced(receiver: Receiver, path: str) -> None:
    """Nor is one without a valid key: anybody can send such, as many as they like."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS), tracing=traced()) as gateway:
            assert await _status(gateway.http.get(gateway.url + path, headers=ALICE)) in {200, 403}
            assert await _status(gateway.post(ASK, headers=CONTEXT)) == 401

    asyncio.run(run())
    time.sleep(0.1)
    assert receiver.spans == []


@pytest.mark.parametrize("failure", ["down", "503", "slow", "hangs"])
def test_receiver_that_fails_costs_no_request_anything(
    receiver: Receiver, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No request waits for an export, the queue is bounded, one line says why, and the end does not wait."""
    receiver.status, receiver.pause_s = 503 if failure == "503" else 200, {"slow": 0.8, "hangs": 60.0}.get(failure, 0)
    monkeypatch.setattr(spans, "FLUSH_S", 0.3)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    if failure == "down":
        with socket.create_server(("127.0.0.1", 0)) as closed:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")

    async def run() -> None:
        made = traced()
        (processor,) = made._provider._active_span_processor._span_processors
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, tracing=made) as gateway:
            began = time.monotonic()
            for _ in range(50):  # ten exports, of which each takes 0.8 s or more
                assert await _status(gateway.post(ASK)) == 200
                assert len(processor._batch_processor._queue) <= 20  # type: ignore[attr-defined]
            assert time.monotonic() - began < 7
            if failure == "slow":
                await asyncio.to_thread(receiver.named, CHAT)
            else:
                await eventually(lambda: bool(caplog.records), 15)
            began = time.monotonic()
            await asyncio.to_thread(made.close)
            assert time.monotonic() - began < 2

    asyncio.run(run())
    for thread in threading.enumerate():
        if thread.name == "flush traces":
            thread.join(10)
    lines = [record.getMessage() for record in caplog.records]
    if failure == "slow":
        assert lines == []
    else:
        assert len(lines) == 1, lines
        assert lines[0].startswith("Traces do not reach http://127.0.0.1:")
        assert "v1/traces" not in lines[0]


def test_end_of_the_gateway_exports_what_is_queued(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that ends before the next export loses no span."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, tracing=traced()) as gateway:
            assert await _status(gateway.post(ASK)) == 200
            assert receiver.spans == []

    asyncio.run(run())
    receiver.named(CHAT, CALL, within_s=0.5)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "s3cret:4318"}, "is no URL (its value is not shown)"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'grpc' is not http/prot"),
    ],
)
def test_variables_that_cannot_work_are_a_warning(
    variables: dict[str, str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Shells have them for other programs: the service starts without traces."""
    assert tracing.from_environ(variables) is None
    assert words in caplog.text
    assert "s3cret" not in caplog.text


def test_package_that_is_missing_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says what to install, and the gateway serves."""
    monkeypatch.delitem(sys.modules, "service.gateway.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert tracing.from_environ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}) is None
    (record,) = caplog.records
    assert "pip install opentelemetry-exporter-otlp-proto-http, " in record.getMessage()


def test_gateway_without_a_receiver_imports_nothing_of_opentelemetry() -> None:
    """Off costs neither memory nor time."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}
    off = [{}, {"OTEL_SERVICE_NAME": "mine"}, *(endpoint | more for more in SWITCHES)]
    code = (
        "import sys; from service.gateway import app, local_server, tracing; import service.local.serve\n"
        f"assert [tracing.from_environ(off) for off in {off}] == [None] * 4\n"
        "assert not [name for name in sys.modules if 'opentelemetry' in name or name == 'requests']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_span_in_memory_is_of_the_service_that_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the operator set is not replaced."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    exporter = InMemorySpanExporter()
    made = Tracing(SimpleSpanProcessor(exporter))

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, tracing=made) as gateway:
            assert await _status(gateway.post(ASK)) == 200

    asyncio.run(run())
    assert {span.resource.attributes["service.name"] for span in exporter.get_finished_spans()} == {"mine"}
