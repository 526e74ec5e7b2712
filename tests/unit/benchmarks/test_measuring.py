"""What is read of vLLM's benchmark, what a load test is asked for, and the prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.benchmarks import locust_run, prompts, report, vllm_bench
from service.benchmarks.report import RequestRecord
from service.cli import measure
from service.errors import ServiceError, UsageError
from service.modal_app import load_options
from service.modal_app.gateway_access import base_url
from service.modal_app.measured_service import MeasuredService, check_answered

ROOT = Path(__file__).parents[3]
SERVICE = MeasuredService("http://127.0.0.1:9", "", "tiny")
ANSWERED = RequestRecord(1.0, 0.1, (0.1,), 0.2, 5, 2)
TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
aiohttp.client_exceptions.ClientPayloadError: Response payload is not completed
"""
RESULT = {
    "start_times": [1.0, 2.0, 3.0, 4.0],
    "ttfts": [0.1, 0.0, 0.1, 0.1],
    "itls": [[0.1, 0.2], [], [0.1], [0.1]],
    "latencies": [0.4, 0.0, 0.2, 0.0],
    "input_lens": [5, 1, 1, 1],
    "output_lens": [3, 0, 1, 0],
    "errors": ["", "Service Unavailable", "", TRACEBACK],
}


def test_record_of_vllms_benchmark_names_each_error_in_a_line() -> None:
    """A status by number and phrase, an exception by its class, and a stream without a count of tokens as cut short."""
    found = list(vllm_bench.records(RESULT, 3))
    assert [one.error for one in found] == [
        "",
        "503 Service Unavailable",
        vllm_bench.CUT_SHORT,
        "ClientPayloadError: Response payload is not completed",
    ]
    assert (found[0].output_tokens, found[0].input_tokens, found[2].output_tokens) == (3, 5, 0)


def users(run_time: str = "1m", pause: str = "1-5", count: int = 36, spawn_rate: float = 1.0) -> locust_run.Users:
    """Return the users of a load test."""
    return load_options.users(SERVICE, count, spawn_rate, run_time, pause, output_tokens=8, processes=4)


@pytest.mark.parametrize(("run_time", "asked"), [("30s", 30), ("5m", 300), ("1h", 3600), ("1m30s", 90), ("45", 45)])
def test_run_time_is_read_as_locust_reads_it(run_time: str, asked: int) -> None:
    """Hours, minutes, seconds, or a number of seconds."""
    assert users(run_time).run_time_s == asked


@pytest.mark.parametrize("run_time", ["", "0", "soon", "2h", "-5s", "1m m"])
def test_run_time_that_is_none_is_refused(run_time: str) -> None:
    """With the forms that there are."""
    with pytest.raises(UsageError, match="Write 30s, 5m or 1h"):
        users(run_time)


@pytest.mark.parametrize(("pause", "span"), [("1-5", (1.0, 5.0)), ("0", (0.0, 0.0)), ("0.5-2", (0.5, 2.0))])
def test_pause_is_a_span_or_a_number_of_seconds(pause: str, span: tuple[float, float]) -> None:
    """Between an answer and the next question."""
    assert users(pause=pause).pause_s == span


@pytest.mark.parametrize("pause", ["5-1", "-1", "a-b", ""])
def test_pause_that_is_none_is_refused(pause: str) -> None:
    """With the forms that there are."""
    with pytest.raises(UsageError, match="Write 1-5, or 0"):
        users(pause=pause)


def test_load_test_without_users_is_refused() -> None:
    """`modal run` checks no range."""
    with pytest.raises(UsageError, match="--users 0"):
        users(count=0)


def test_load_test_of_few_users_has_no_more_processes_than_users() -> None:
    """A process without a user only waits."""
    assert (users(count=2).processes, users().processes) == (2, 4)


def test_prompts_differ_from_their_first_word_on_and_have_about_the_tokens() -> None:
    """So that no prefix cache answers; the same seed gives the same ones."""
    made = prompts.build(50, 100, 1.25)
    assert len({prompt.split()[0] for prompt in made}) == 50
    assert {len(prompt.split()) for prompt in made} == {80}
    assert made == prompts.build(50, 100, 1.25)


def test_locust_is_asked_for_nothing_that_names_the_key() -> None:
    """It is in a variable of the process alone; variables of this service and of Modal are not handed on."""
    environ = {"VLLM_API_KEY": "sk-1", "MODAL_TOKEN_SECRET": "as-1", "API_KEYS": "a=b", "PATH": "/bin", "LOCUST_X": "1"}
    given = locust_run._environment(environ, users(), "sk-2", "/records")
    assert (given["VLLM_API_KEY"], given["PATH"]) == ("sk-2", "/bin")
    assert set(given) == {"VLLM_API_KEY", "PATH", "LOADTEST_JOB"}
    assert "sk-" not in " ".join(locust_run._options(users())) + given["LOADTEST_JOB"]


def test_vllms_benchmark_gets_the_key_as_openais_variable_and_no_other_secret() -> None:
    """And no GPU."""
    given = vllm_bench._environment({"HF_TOKEN": "hf_1", "API_KEY": "sk-1", "HOME": "/root"}, "sk-2")
    assert (given["OPENAI_API_KEY"], given["CUDA_VISIBLE_DEVICES"], given["HOME"]) == ("sk-2", "", "/root")
    assert {"HF_TOKEN", "API_KEY"}.isdisjoint(given)
    assert "OPENAI_API_KEY" not in vllm_bench._environment({}, "")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"])
def test_url_is_taken_with_or_without_v1(url: str) -> None:
    """OpenAI's clients want it."""
    assert base_url(url) == "http://127.0.0.1:8000"


def test_url_without_a_scheme_is_refused() -> None:
    """With one that has it."""
    with pytest.raises(UsageError, match=r"such as http://127\.0\.0\.1:8000"):
        base_url("127.0.0.1:8000")


@pytest.mark.parametrize("word", ["bench", "loadtest"])
def test_measurement_of_a_url_with_a_secret_is_refused_without_repeating_it(word: str, tmp_path: Path) -> None:
    """The URL is printed, is in the page, and in Locust's command line."""
    done = command(word, VLLM_GATEWAY_URL="https://me:t0psecret@host")
    assert (done.returncode, done.stdout) == (2, "")
    assert "may be a secret" in done.stderr
    assert "t0psecret" not in done.stderr


@pytest.mark.parametrize("word", ["bench", "loadtest"])
def test_page_that_cannot_be_written_is_refused_before_anything_is_measured(word: str, tmp_path: Path) -> None:
    """Five minutes of load would be lost. It is an error of usage, as in the other words that write a file."""
    for page in (tmp_path / "no" / "load.html", tmp_path):
        done = command(word, "--url", "http://127.0.0.1:9", "--html", str(page))
        assert (done.returncode, done.stdout) == (2, "")
        assert f"'{page}' cannot be written" in done.stderr


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command as people do."""
    return subprocess.run(
        [sys.executable, "-m", "service.cli.main", *arguments],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_page_that_cannot_be_written_after_all_costs_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are printed first, and the error names the option."""
    with pytest.raises(ServiceError, match=r"--html .* cannot be written: Is a directory"):
        measure._show([ANSWERED], SERVICE, "a tool", "a load", html=tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["requests"]["answered"] == 1


STUB = """\
import json, os, pathlib, sys
if {count}:
    pathlib.Path(json.loads(os.environ["LOADTEST_JOB"])["directory"], "1.jsonl").write_text({record!r} * {count})
print("the last words")
sys.exit({code})
"""


def ran(tmp_path: Path, count: int, code: int) -> list[RequestRecord]:
    """Run a load test by a program that measures so many requests, and ends with a code as Locust would."""
    record = json.dumps({"start_s": 1.0, "latency_s": 2.0, "output_tokens": 8}) + "\n"
    (tmp_path / "stub.py").write_text(STUB.format(count=count, record=record, code=code))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'stub.py'}\n")
    python.chmod(0o755)
    return locust_run.run(str(python), users(), "", lambda *_: None)


def test_load_test_that_broke_off_keeps_its_figures_and_is_no_success(tmp_path: Path) -> None:
    """It has one error more, with Locust's code and its last words; a whole one has none."""
    assert [one.error for one in ran(tmp_path, 2, 0)] == ["", ""]
    found = ran(tmp_path, 2, 137)
    assert [one.error for one in found] == ["", "", "Locust ended with code 137: the last words"]
    with pytest.raises(ServiceError, match="1 of 3 requests failed"):
        check_answered(report.build(found, {}))


def test_load_test_that_measured_nothing_raises_what_locust_said(tmp_path: Path) -> None:
    """There are no figures to keep."""
    with pytest.raises(ServiceError, match="Locust ended with code 1: the last words"):
        ran(tmp_path, 0, 1)


def test_measurement_with_failures_ends_the_command_with_an_error() -> None:
    """So that a script notices."""
    check_answered({"requests": {"answered": 3, "failed": 0}})
    with pytest.raises(ServiceError, match="1 of 4 requests failed"):
        check_answered({"requests": {"answered": 3, "failed": 1}})
