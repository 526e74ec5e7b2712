"""The compiling process as the gateway sees it: what the gateway does when it is absent, slow, silent or gone."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.gateway import grammars, request_fields
from service.gateway.api_errors import APIError
from service.gateway.compiler import PROGRAM
from service.gateway.grammars import Grammars

READY = 'say({"ready": True})\n'
HEAD = """
import json, os, sys, time
def say(word):
    print(json.dumps(word), flush=True)
def jobs():
    for line in sys.stdin:
        with open(os.path.join(os.path.dirname(sys.argv[0]), "jobs"), "a") as file:
            file.write(line)
        yield json.loads(line)
"""
OK = READY + 'for job in jobs(): say({"verdict": "ok", "reason": ""})'


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that makes an interpreter which runs a text in the place of the compiling program."""

    def make(text: str) -> str:
        (tmp_path / "program.py").write_text(HEAD + text)
        (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/program.py"\n')
        (tmp_path / "python").chmod(0o755)
        return str(tmp_path / "python")

    return make


def asked(regex: str = "a") -> request_fields.RequestFields:
    """Return a request for an expression."""
    return request_fields.parse_fields(json.dumps({"structured_outputs": {"regex": regex}}).encode())


def jobs(python: str) -> int:
    """Return how many jobs the program of an interpreter was given."""
    file = Path(python).with_name("jobs")
    return len(file.read_text().splitlines()) if file.exists() else 0


BEFORE: list[psutil.Process] = []


@pytest.fixture(autouse=True)
def before() -> None:
    """Remember the processes of services that other tests go on to use."""
    BEFORE[:] = psutil.Process().children(recursive=True)


def children() -> list[psutil.Process]:
    """Return the processes that this test has started and not ended."""
    return [child for child in psutil.Process().children(recursive=True) if child not in BEFORE]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another process."""
    while not condition():  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.01)


async def error_of(checked: Grammars, regex: str = "a") -> APIError:
    """Return what an expression is refused with."""
    with pytest.raises(APIError) as caught:
        await checked.check(asked(regex))
    return caught.value


def test_shape_without_any_is_not_looked_at(python: Callable[[str], str]) -> None:
    """Most requests: no process is started."""

    async def run() -> None:
        checked = Grammars(python(OK))
        await checked.check(request_fields.RequestFields(model="x"))
        assert not children()
        await checked.close()

    asyncio.run(run())


def test_shape_asked_for_again_is_compiled_once(python: Callable[[str], str]) -> None:
    """A hundred clients at once, and again later: one job."""
    interpreter = python(READY + 'for job in jobs(): time.sleep(0.02); say({"verdict": "ok", "reason": ""})')

    async def run() -> None:
        checked = Grammars(interpreter)
        await asyncio.gather(*(checked.check(asked()) for _ in range(100)))
        await checked.check(asked())
        await checked.close()

    asyncio.run(run())

    assert jobs(interpreter) == 1
    assert not children()


def test_verdict_is_remembered_until_enough_others_came(
    python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest are forgotten; each shape takes two places, the request's and the constraint's."""
    monkeypatch.setattr(grammars, "REMEMBERED", 4)
    interpreter = python(OK)

    async def run() -> None:
        checked = Grammars(interpreter)
        for regex in "abab":
            await checked.check(asked(regex))
        assert jobs(interpreter) == 2
        for regex in "cda":
            await checked.check(asked(regex))
        assert jobs(interpreter) == 5
        await checked.close()

    asyncio.run(run())


def test_grammar_that_is_refused_is_refused_again_without_a_job(python: Callable[[str], str]) -> None:
    """With the reason and the place, each time as an error of its own."""
    interpreter = python(READY + 'for job in jobs(): say({"verdict": "costly", "reason": "is too ambiguous: so"})')

    async def run() -> None:
        checked = Grammars(interpreter)
        first, second = await error_of(checked), await error_of(checked)
        assert first is not second
        assert first.message == second.message
        assert first.message.startswith("structured_outputs.regex is too ambiguous: so. ")
        assert (first.status, first.code, first.param) == (400, "invalid_grammar", "structured_outputs.regex")
        await checked.close()

    asyncio.run(run())

    assert jobs(interpreter) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": "a"}},
        {"tools": [{"function": {"parameters": {"type": "object"}, "strict": True}}]},
    ],
    ids=["regex", "tool"],
)
@pytest.mark.parametrize(
    ("verdict", "passes"), [("ok", True), ("invalid", True), ("costly", False), ("crashed", False)]
)
def test_constraint_is_refused_only_if_no_engine_would_survive_it(
    python: Callable[[str], str], body: dict[str, Any], verdict: str, passes: bool
) -> None:
    """What xgrammar cannot compile may be for another of vLLM's backends, or for none: the engine tells."""
    answer = json.dumps({"verdict": verdict, "reason": "costs too much"})

    async def run() -> None:
        checked = Grammars(python(READY + f"for job in jobs(): say({answer})"))
        try:
            await checked.check(request_fields.parse_fields(json.dumps(body).encode()))
            assert passes
        except APIError as api_error:
            assert not passes
            assert str(api_error.param).startswith(next(iter(body)))
        await checked.close()

    asyncio.run(run())


def test_tool_is_judged_anew_if_a_call_is_forced(python: Callable[[str], str]) -> None:
    """The verdict on tools that are not compiled says nothing of the same tools with `tool_choice: required`."""
    tools = {"tools": [{"function": {"parameters": {"type": "object"}}}]}

    async def run() -> None:
        checked = Grammars(
            python(READY + 'for job in jobs(): say({"verdict": "costly", "reason": "is too ambiguous"})')
        )
        await checked.check(request_fields.parse_fields(json.dumps(tools).encode()))
        with pytest.raises(APIError):
            await checked.check(request_fields.parse_fields(json.dumps({**tools, "tool_choice": "required"}).encode()))
        await checked.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("time.sleep(60)", "Timeout"),
        ('say({"failed": "ModuleNotFoundError: xgrammar"})', "xgrammar"),
        ("sys.exit(7)", "code 7"),
        ('print("{")', ""),
    ],
)
def test_compiler_that_does_not_start_leaves_the_bounds_and_says_so_once(
    python: Callable[[str], str], text: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The service goes on: engines refuse for themselves."""

    async def run() -> None:
        checked = Grammars(
            "/no/such/python" if text is None else python(text), start_s=0.5 if reason == "Timeout" else 30
        )
        await checked.check(asked("a"))
        await checked.check(asked("b"))
        assert "NUL" in (await error_of(checked, "\0")).message
        await checked.close()

    asyncio.run(run())

    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert not children()


def test_compiler_that_falls_silent_is_replaced(python: Callable[[str], str]) -> None:
    """The client may come again: nothing is known of its grammar."""
    interpreter = python(
        READY + 'for job in jobs(): time.sleep(60 * (job["text"] == "a")); say({"verdict": "ok", "reason": ""})'
    )

    async def run() -> None:
        checked = Grammars(interpreter, compile_s=0.05)
        begun = time.monotonic()
        api_error = await error_of(checked, "a")
        assert time.monotonic() - begun < 5
        assert (api_error.status, api_error.code) == (503, "grammars_busy")
        assert api_error.headers["Retry-After"]
        await checked.check(asked("b"))
        await error_of(checked, "a")
        await checked.close()

    asyncio.run(run())

    assert jobs(interpreter) == 3
    assert not children()


def test_compiler_that_ends_during_a_job_is_replaced(python: Callable[[str], str]) -> None:
    """Somebody killed it, such as the kernel for want of memory: the job gets another process, once."""
    interpreter = python(READY + 'for job in jobs(): job["text"] == "a" and os._exit(9); say({"verdict": "ok"})')

    async def run() -> None:
        checked = Grammars(interpreter)
        assert (await error_of(checked, "a")).status == 503
        await checked.check(asked("b"))
        await checked.close()

    asyncio.run(run())

    assert jobs(interpreter) == 3


def test_compiler_that_ended_between_jobs_is_replaced_unseen(python: Callable[[str], str]) -> None:
    """The next job starts another."""

    async def run() -> None:
        checked = Grammars(python(OK))
        await checked.check(asked("a"))
        (process,) = children()
        process.kill()
        await until(lambda: not children())
        await checked.check(asked("b"))
        await checked.close()

    asyncio.run(run())


def test_client_that_leaves_takes_no_answer_of_others(python: Callable[[str], str]) -> None:
    """Its job ends, and is remembered; the next answer is the next job's."""
    interpreter = python(
        READY + 'for job in jobs(): time.sleep(0.05); say({"verdict": "costly", "reason": "is " + job["text"]})'
    )

    async def run() -> None:
        checked = Grammars(interpreter)
        leaving = asyncio.create_task(checked.check(asked("first")))
        await until(lambda: jobs(interpreter) == 1)
        leaving.cancel()
        assert "is second" in (await error_of(checked, "second")).message
        assert "is first" in (await error_of(checked, "first")).message
        await checked.close()

    asyncio.run(run())

    assert jobs(interpreter) == 2


def test_grammars_beyond_the_queue_are_sent_away_for_now(
    python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and waiting are bounded; the same grammar joins the job that there is."""
    monkeypatch.setattr(grammars, "WAITING", 2)
    interpreter = python(READY + 'for job in jobs(): time.sleep(0.1); say({"verdict": "ok"})')

    async def run() -> None:
        checked = Grammars(interpreter)
        waiting = [asyncio.create_task(checked.check(asked(regex))) for regex in "aab"]
        await asyncio.sleep(0)
        assert (await error_of(checked, "c")).status == 503
        await asyncio.gather(*waiting)
        await checked.check(asked("c"))
        await checked.close()

    asyncio.run(run())


def test_client_waits_no_longer_than_its_bound(python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The job goes on, and its verdict is there when the client comes again."""
    monkeypatch.setattr(grammars, "WAIT_S", 0.05)
    interpreter = python(READY + 'for job in jobs(): time.sleep(0.2); say({"verdict": "ok"})')

    async def run() -> None:
        checked = Grammars(interpreter)
        assert (await error_of(checked)).status == 503
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                await checked.check(asked())
                break
            except APIError:
                pass
        await checked.close()

    asyncio.run(run())

    assert jobs(interpreter) == 1


def test_compiler_without_jobs_is_ended(python: Callable[[str], str]) -> None:
    """It holds a few hundred megabytes; the next job starts another."""

    async def run() -> None:
        checked = Grammars(python(OK), idle_s=0.1)
        await checked.check(asked("a"))
        assert children()
        await until(lambda: not children())
        await checked.check(asked("b"))
        await checked.close()

    asyncio.run(run())

    assert not children()


def test_compiler_that_is_starting_is_ended_by_close(python: Callable[[str], str]) -> None:
    """The end of the service does not wait for imports."""

    async def run() -> None:
        checked = Grammars(python("time.sleep(60)"))
        waiting = asyncio.create_task(checked.check(asked()))
        await until(lambda: bool(children()))
        begun = time.monotonic()
        await checked.close()
        assert time.monotonic() - begun < 2
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())

    assert not children()


def test_compiler_gets_no_secret(python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars come from anybody: nothing of the gateway's environment is in reach of them."""
    for name in ("API_KEY", "MODAL_SECRET", "HF_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret-of-the-gateway")
    answer = 'say({"verdict": "costly", "reason": repr(dict(os.environ))})'

    async def run() -> None:
        checked = Grammars(python(READY + f"for job in jobs(): {answer}"))
        message = (await error_of(checked)).message
        assert "secret-of-the-gateway" not in message
        assert os.defpath in message
        await checked.close()

    asyncio.run(run())


def test_program_imports_the_standard_library_alone() -> None:
    """It runs in an environment that has no service."""
    lines = [
        line.split()[1] for line in PROGRAM.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))
    ]

    assert {name.partition(".")[0] for name in lines} <= set(sys.stdlib_module_names) | {"xgrammar"}
