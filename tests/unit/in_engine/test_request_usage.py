"""What an engine counts of each request, and how it tells the gateway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm_service import request_usage, usage_report
from vllm_service.request_usage import RequestUsage, RunningTime
from vllm_service.usage_report import EngineUsage

USAGE = EngineUsage(12, 4, 57, 0.5)


class Clock:
    """A clock that stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        """Return its time."""
        return self.now


def sequence(prompt: int, cached: int, generated: int, index: int = 0, *, prefilling: bool = False) -> Any:
    """Return what vLLM keeps of a sequence."""
    detokenizer = SimpleNamespace(num_output_tokens=lambda: generated)
    return SimpleNamespace(
        prompt_len=prompt,
        num_cached_tokens=cached,
        detokenizer=detokenizer,
        request_index=index,
        is_prefilling=prefilling,
    )


def test_each_second_is_divided_among_the_requests_that_run_in_it() -> None:
    """All shares together are the time in which any ran."""
    clock = Clock()
    running = RunningTime(clock)
    first = running.begin()
    clock.now += 2
    second = running.begin()
    clock.now += 2
    assert running.share(first) == pytest.approx(3.0)
    running.end()
    clock.now += 1
    assert running.share(second) == pytest.approx(2.0)
    running.end()
    clock.now += 60

    assert running.share(running.begin()) == 0


def test_answers_to_one_prompt_count_it_once() -> None:
    """Another prompt of the same request counts too; a prompt that the engine has not read yet does not."""
    usage = RequestUsage(RunningTime())
    for one in (sequence(10, 4, 5), sequence(10, 4, 6, index=1), sequence(3, 0, 1), sequence(8, 0, 0, prefilling=True)):
        usage.add(one)

    found = usage.report()

    assert (found.tokens_in, found.tokens_cached, found.tokens_out) == (13, 4, 12)


def test_sequences_are_counted_for_the_request_that_made_them() -> None:
    """The engine's own requests, such as probes, belong to no client."""
    states: dict[str, Any] = {}
    processor = SimpleNamespace(
        request_states=states, add_request=lambda one, *_: states.update({one.request_id: sequence(2, 0, 1)})
    )
    request_usage.enable(SimpleNamespace(output_processor=processor))
    usage = RequestUsage(RunningTime())
    processor.add_request(SimpleNamespace(request_id="probe"), None)
    request_usage.current.set(usage)
    processor.add_request(SimpleNamespace(request_id="a"), None)
    request_usage.current.set(None)

    assert usage.has_run
    assert usage.report().tokens_in == 2


def test_report_survives_its_text() -> None:
    """Header and comment have the same."""
    assert usage_report.parse(USAGE.to_text()) == USAGE
    assert usage_report.parse(b"in=1 cached=2") is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (USAGE.to_comment(), b""),
        (b"data: [DONE]\n\n" + USAGE.to_comment(), b"data: [DONE]\n\n"),
    ],
)
def test_comment_at_the_end_of_a_stream_is_taken_out(before: bytes, after: bytes) -> None:
    """The client gets what vLLM sent."""
    assert usage_report.without_comment(before) == (after, USAGE)


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"data: {}\n\n",
        USAGE.to_comment()[:-1],
        USAGE.to_comment() + b"data: {}\n\n",
        b": usage unknown\n\n",
        b'data: {"text": "' + USAGE.to_comment().strip() + b'"}\n\n',
    ],
)
def test_other_bytes_of_a_stream_stay(chunk: bytes) -> None:
    """No text of a model is mistaken for the engine's comment."""
    assert usage_report.without_comment(chunk) == (chunk, None)
