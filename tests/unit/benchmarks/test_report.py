"""The figures of a measurement, and what a terminal and a page show of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from service.benchmarks import page, report, text
from service.benchmarks.report import RequestRecord
from service.benchmarks.units import rate, seconds
from service.errors import ServiceError

FACTS = {
    "tool": "vLLM's benchmark 0.32.0",
    "url": "https://a-workspace-with-a-long-name--vllm-gateway-serve.modal.run",
    "model": "gemma-3-27b-h200",
    "load": "400 requests, begun at 2.5/s, 32 at a time, 128 tokens out",
    "ended_at": "2026-11-29T10:00:00Z",
}


def answered(start: float, ttft: float = 0.2, gaps: tuple[float, ...] = (0.1, 0.1)) -> RequestRecord:
    """Return the record of a request with 10 tokens in and one token a chunk."""
    return RequestRecord(start, ttft, gaps, ttft + sum(gaps), 10, len(gaps) + 1)


def failed(start: float, error: str) -> RequestRecord:
    """Return the record of a request that failed after a tenth of a second."""
    return RequestRecord(start, latency_s=0.1, error=error)


def measured() -> dict[str, Any]:
    """Return a report with two kinds of errors."""
    records = [answered(place / 10, 0.1 + place / 100) for place in range(100)]
    errors = ["503 model_waking", "503 model_waking", "<script>alert(1)</script>"]
    return report.build([*records, *(failed(3.0, error) for error in errors)], FACTS)


def test_report_of_two_requests_has_their_rates_and_latencies() -> None:
    """They took 0.4 s each, and the second began as the first ended."""
    found = report.build([answered(5.0), answered(5.4)], FACTS)
    assert found["duration_s"] == 0.8
    assert found["requests"] == {"answered": 2, "failed": 0, "answered_per_s": 2.5}
    assert found["tokens"] == {"input": 20, "output": 6, "input_per_s": 25.0, "output_per_s": 7.5}
    assert (found["ttft_s"]["p50"], found["inter_token_s"]["worst"], found["end_to_end_s"]["mean"]) == (0.2, 0.1, 0.4)
    assert found["tokens_per_s"]["worst"] == 7.5
    assert sum(found["over_time"]["in_flight"]) == pytest.approx(60)  # one at every step
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4.0)])
def test_percentile_is_between_the_two_nearest_values(percent: float, value: float) -> None:
    """As numpy.percentile has it by default."""
    assert report.percentile([1.0, 2.0, 3.0, 4.0], percent) == pytest.approx(value)


def test_report_counts_errors_by_kind_and_leaves_them_out_of_the_latencies() -> None:
    """The most frequent kind comes first."""
    found = measured()
    assert found["requests"]["failed"] == 3
    assert found["errors"][0] == {"error": "503 model_waking", "count": 2}
    assert found["ttft_s"]["p50"] == pytest.approx(0.595)
    assert sum(found["histograms"]["ttft_s"]["counts"]) == 100


def test_report_tells_of_rates_what_most_requests_reach() -> None:
    """A hundred requests of 3 tokens, from the fastest to the slowest: 99 % reach what p99 says."""
    found = measured()["tokens_per_s"]
    assert found["p50"] > found["p90"] > found["p99"] > found["worst"] == pytest.approx(3 / 1.29, abs=1e-6)


def test_report_of_failures_alone_has_no_latencies() -> None:
    """Nothing is drawn of them, and nothing divides by zero."""
    found = report.build([failed(0.0, "401 invalid_api_key")], FACTS)
    assert (found["ttft_s"], found["histograms"], found["requests"]["answered"]) == (None, {}, 0)
    assert "401 invalid_api_key" in page.render(found)
    assert "0 answered, 1 failed" in "\n".join(text.lines(found))


def test_report_of_no_request_is_refused() -> None:
    """There is nothing to tell."""
    with pytest.raises(ServiceError, match="Measure longer"):
        report.build([], FACTS)


def test_lines_fit_80_columns_but_for_addresses() -> None:
    """Figures of any size do; a URL is not cut."""
    slow = report.build([answered(place * 1.0, 1234.5, (99.9,) * 1000) for place in range(20)], FACTS)
    for found in (measured(), slow):
        assert [line for line in text.lines(found) if len(line) > 80 and "http" not in line] == []
        assert len([line for line in text.lines(found) if line.startswith("time to first token")]) == 1


class Parts(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note them."""
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_page_is_whole_in_itself_and_runs_nothing() -> None:
    """No script, link, image or address of anything to fetch; what an error says is text."""
    drawn = page.render(measured())
    parts = Parts(drawn)
    assert parts.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert parts.attributes.isdisjoint({"src", "href", "onload", "xlink:href"})
    assert not re.search(r"url\(|@import", drawn)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    assert "prefers-color-scheme: dark" in drawn
    assert 'name="viewport"' in drawn


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0, "0 ms"), (0.00421, "4.21 ms"), (0.0315, "31.5 ms"), (0.9994, "999 ms"), (1.304, "1.30 s"), (125.4, "125 s")],
)
def test_seconds_have_three_digits_and_a_unit(value: float, written: str) -> None:
    """From microseconds to minutes."""
    assert seconds(value) == written


def test_rates_have_three_digits_or_are_whole() -> None:
    """A count is no fraction."""
    assert [rate(value) for value in (0.4213, 7.0, 31.46, 1239.6)] == ["0.42", "7", "31.5", "1,240"]
