"""Verdicts on constraints: who waits for whom, what is kept, what an error says; the compiling process is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from vllm_service import client_turns, constraint_check, constraint_errors
from vllm_service.bounded_process import ProcessLostError
from vllm_service.constraint_check import ConstraintCheck, Source, Verdict

Answer = dict[str, Any] | Exception
SERVED = {"validate": {"backend": "xgrammar", "was_auto": True, "grammar": None}, "compile": {"is_served": True}}
HERE = Source("structured_outputs")


class ValidationError(Exception):
    """vLLM's error of a bad request."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class HTTPError(Exception):
    """vLLM's error with a status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass
class Outputs:
    """Some of the fields of vLLM's `StructuredOutputsParams`."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False


class Process:
    """A scripted process.

    Args:
        answers: By step.
        gate: Jobs wait for it.
    """

    def __init__(self, answers: dict[str, Answer] | None = None, gate: asyncio.Event | None = None) -> None:
        self._answers, self._gate = {**SERVED, **(answers or {})}, gate
        self.jobs: list[dict[str, Any]] = []
        self.cancelled = 0

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a step."""
        self.jobs.append(job)
        try:
            if self._gate:
                await self._gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        answer = self._answers[job["step"]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def regexes(self) -> list[str]:
        """The expressions of the jobs, in order."""
        return [job["constraint"]["regex"] for job in self.jobs if job["step"] == "validate"]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for vLLM's exceptions."""
    module: Any = ModuleType("vllm.exceptions")
    module.VLLMValidationError, module.GracefulHTTPError = ValidationError, HTTPError
    monkeypatch.setitem(sys.modules, "vllm.exceptions", module)
    constraint_errors._constraint_error.cache_clear()


def checking(process: Process) -> ConstraintCheck:
    """Return a check with a scripted process."""
    return ConstraintCheck(process)  # type: ignore[arg-type]


def refusal(answers: dict[str, Answer], outputs: Outputs, source: Source = HERE) -> str:
    """Return the sentence with which a constraint is refused, the same when it is sent again."""

    async def run() -> str:
        check = checking(process := Process(answers))
        sentences = set()
        for _ in range(2):
            with pytest.raises(ValidationError) as caught:
                await check.check(outputs, source)
            assert caught.value.parameter == source.param
            sentences.add(str(caught.value))
            jobs = len(process.jobs)
        assert len(process.jobs) == jobs
        (sentence,) = sentences
        return sentence

    return asyncio.run(run())


async def settle() -> None:
    """Let all tasks run as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait for their end."""
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_constraint_of_many_requests_is_compiled_once() -> None:
    """At the same time, and again later."""

    async def run() -> None:
        check = checking(process := Process())
        verdicts = await asyncio.gather(*(check.check(Outputs(regex="a"), HERE) for _ in range(100)))
        verdicts.append(await check.check(Outputs(regex="a"), HERE))
        assert set(verdicts) == {Verdict(backend="xgrammar", was_auto=True)}
        assert [job["step"] for job in process.jobs] == ["validate", "compile"]

    asyncio.run(run())


def test_whether_xgrammar_takes_a_constraint_is_found_out_once() -> None:
    """Whatever serves it."""

    async def run() -> None:
        for answer, takes in ((SERVED["validate"], True), ({"fault": "no"}, False)):
            check = checking(process := Process({"validate": answer}))
            assert [await check.xgrammar_takes(Outputs(regex="a")) for _ in range(2)] == [takes, takes]
            assert [job["backend"] for job in process.jobs] == ["xgrammar"]

    asyncio.run(run())


def test_choices_are_compiled_as_the_grammar_that_vllm_makes_of_them() -> None:
    """The engine gets that grammar too."""

    async def run() -> None:
        validated = {"backend": "xgrammar", "was_auto": True, "grammar": 'root ::= "a"'}
        check = checking(process := Process({"validate": validated}))
        assert (await check.check(Outputs(choice=["a"]), HERE)).grammar == 'root ::= "a"'
        assert process.jobs[1]["constraint"] == {"grammar": 'root ::= "a"'}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"validate": {"exceeded": "cpu"}}, "The regular expression takes more than 2 s of processor time"),
        ({"compile": {"exceeded": "cpu"}}, "takes more than 2 s of processor time"),
        ({"compile": {"exceeded": "memory"}}, "takes more than 500 MiB of memory to compile. Make"),
        ({"compile": {"exceeded": "SIGABRT"}}, "or crashes the compiler (SIGABRT)"),
        ({"compile": {"slow": [52, 0.6]}}, "is too ambiguous: to find its first 52 tokens took 600 ms"),
        ({"compile": {"fault": "[11:11:11] /x/y.cc:9: It is\n odd."}}, "does not compile: It is odd. Correct it"),
        ({"validate": {"fault": "It is odd"}, "explain": {}}, "is refused by vLLM: It is odd. Correct it"),
        ({"validate": {"fault": "It is odd"}, "explain": {"exceeded": "cpu"}}, "is refused by vLLM: It is odd. "),
    ],
)
def test_constraint_is_refused_with_the_reason(answers: dict[str, Answer], words: str) -> None:
    """Each time, from one compilation."""
    assert words in refusal(answers, Outputs(regex="a"))


def test_schema_is_refused_with_the_place() -> None:
    """The fault's own reason is told, not that of the last backend."""
    found = {"name": "", "place": "#/properties/a/pattern", "fault": "Lookahead"}
    sentence = refusal({"validate": {"fault": "no backend"}, "explain": found}, Outputs(json={"type": "object"}))

    assert sentence.startswith("The JSON schema is refused by vLLM: Lookahead (at #/properties/a/pattern). ")


@pytest.mark.parametrize(
    ("words", "is_strict", "is_served"),
    [
        ('Unimplemented keys: ["not"]', True, False),
        ('Unimplemented keys: ["not"]', False, True),
        ('Unimplemented keys: ["propertyNames", "dependentSchemas"]', True, False),
        ('Unimplemented keys: ["propertyNames"]', True, True),
        ("Resource 'http://localhost' is not present", True, False),
        ("regex parse error: look-around", True, False),
    ],
)
def test_schema_that_no_backend_can_enforce_is_refused_only_if_it_is_strict(
    words: str, is_strict: bool, is_served: bool
) -> None:
    """Else xgrammar serves it, which ignores what it lacks."""

    class Unimplemented(Process):
        async def run(self, job: dict[str, Any]) -> dict[str, Any]:
            is_lacking = job["step"] == "validate" and job["backend"] == "guidance"
            return {"fault": f"Grammar error: {words}"} if is_lacking else await super().run(job)

    async def run() -> None:
        check = checking(Unimplemented({"explain": {"name": "", "place": "#/not", "fault": "Unimplemented"}}))
        expected: Any = contextlib.nullcontext() if is_served else pytest.raises(ValidationError, match="#/not")
        with expected:
            assert (
                await check.check(Outputs(json={"not": {}}), Source("text", is_strict=is_strict))
            ).backend == "xgrammar"

    asyncio.run(run())


def test_strict_schema_that_only_outlines_would_take_is_refused() -> None:
    """It ignores most keywords."""

    class OnlyOutlines(Process):
        async def run(self, job: dict[str, Any]) -> dict[str, Any]:
            if job["step"] != "validate":
                return await super().run(job)
            return {"fault": "odd"} if job["backend"] else {"backend": "outlines", "grammar": None}

    async def run() -> None:
        check = checking(OnlyOutlines({"explain": {"name": "", "place": "#/odd", "fault": "odd"}}))
        assert (await check.check(Outputs(json={}), Source("text"))).backend == "outlines"
        with pytest.raises(ValidationError, match="at #/odd"):
            await check.check(Outputs(json={}), Source("text", is_strict=True))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("outputs", "is_auto", "backends"),
    [
        (Outputs(json={}), True, ["guidance", None]),
        (Outputs(regex="a"), True, [None, "guidance"]),
        (Outputs(structural_tag="{}"), True, [None]),
        (Outputs(json={}), False, [None]),
    ],
)
def test_backends_are_tried_in_turn(outputs: Outputs, is_auto: bool, backends: list[str | None]) -> None:
    """One that the command line names is the only one; None is vLLM's choice."""

    async def run() -> None:
        process = Process({"compile": {"exceeded": "cpu"}})
        with pytest.raises(ValidationError):
            await ConstraintCheck(process, is_auto=is_auto).check(outputs, HERE)  # type: ignore[arg-type]
        assert [job["backend"] for job in process.jobs if job["step"] == "validate"] == backends

    asyncio.run(run())


def test_schema_of_a_tool_is_refused_with_the_tools_name() -> None:
    """What vLLM made of the tools is nothing that the client has seen."""
    found = {"name": "The schema of tool 'f'", "place": "#/pattern", "fault": "Lookahead"}
    source = Source("tools", [("f", {"pattern": "(?=a)"})])
    sentence = refusal({"validate": {"fault": "no"}, "explain": found}, Outputs(structural_tag="{}"), source)

    assert sentence.startswith("The schema of tool 'f' is refused by vLLM: Lookahead (at #/pattern). ")


def test_tool_that_costs_too_much_is_named() -> None:
    """The tools are compiled together first, and each alone only then."""

    class OneCostlyTool(Process):
        async def run(self, job: dict[str, Any]) -> dict[str, Any]:
            is_costly = job["constraint"].get("json") == {"costly": True} or "structural_tag" in job["constraint"]
            return {"exceeded": "cpu"} if job["step"] == "compile" and is_costly else await super().run(job)

    async def run() -> None:
        source = Source("tools", [("cheap", {}), ("costly", {"costly": True})])
        with pytest.raises(ValidationError, match="The schema of tool 'costly' takes more than 2 s"):
            await checking(OneCostlyTool()).check(Outputs(structural_tag="{}"), source)

    asyncio.run(run())


def test_tools_that_cost_too_much_only_together_are_refused_as_such() -> None:
    """None of them alone is at fault, and neither is what the client wrote beside them."""

    class OnlyTogether(Process):
        async def run(self, job: dict[str, Any]) -> dict[str, Any]:
            is_tag = job["step"] == "compile" and "structural_tag" in job["constraint"]
            return {"exceeded": "cpu"} if is_tag else await super().run(job)

    async def run() -> None:
        source = Source("tools", [("one", {}), ("two", {})])
        with pytest.raises(ValidationError, match=r"^The combination of all tools and constraints takes more than 2 s"):
            await checking(OnlyTogether()).check(Outputs(structural_tag="{}"), source)

    asyncio.run(run())


def test_work_that_nobody_waits_for_is_cancelled() -> None:
    """One of two clients that leaves does not cancel it for the other."""

    async def run() -> None:
        check = checking(process := Process(gate=asyncio.Event()))
        first, second = (asyncio.create_task(check.check(Outputs(regex="a"), HERE)) for _ in range(2))
        await settle()
        await ended(first)
        await settle()
        assert not process.cancelled
        await ended(second)
        await settle()
        assert process.cancelled == 1

    asyncio.run(run())


def test_request_that_comes_when_work_is_cancelled_begins_anew() -> None:
    """It must not end as those did that left."""

    async def run() -> None:
        gate = asyncio.Event()
        check = checking(process := Process(gate=gate))
        first = asyncio.create_task(check.check(Outputs(regex="a"), HERE))
        await settle()
        first.cancel()
        second = asyncio.create_task(check.check(Outputs(regex="a"), HERE))
        gate.set()
        assert (await second).backend == "xgrammar"
        await ended(first)
        assert process.regexes == ["a", "a"]

    asyncio.run(run())


def test_work_waited_for_in_vain_is_not_begun() -> None:
    """Its turn goes to the next."""

    async def run() -> None:
        gate = asyncio.Event()
        check = checking(process := Process(gate=gate))
        tasks = [asyncio.create_task(check.check(Outputs(regex=regex), HERE)) for regex in "abc"]
        await settle()
        await ended(tasks[1])
        gate.set()
        await asyncio.gather(tasks[0], tasks[2])
        assert process.regexes == ["a", "c"]

    asyncio.run(run())


def test_client_whose_constraints_take_long_does_not_hold_up_another(
    client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn comes between two steps of the other's, and it has several until it has taken as much time."""

    async def ask(check: ConstraintCheck, name: str, regex: str) -> None:
        client(name)
        await check.check(Outputs(regex=regex), HERE)

    class Slow(Process):
        async def run(self, job: dict[str, Any]) -> dict[str, Any]:
            answer = await super().run(job)
            now[0] += 2.0 if job["constraint"].get("regex", "").startswith("slow") else 0.1
            return answer

    now = [0.0]
    monkeypatch.setattr(client_turns.time, "monotonic", lambda: now[0])

    async def run() -> None:
        check = ConstraintCheck(process := Slow(gate=(gate := asyncio.Event())))  # type: ignore[arg-type]
        tasks = []
        for name, regex in [("one", "slow1"), ("one", "slow2"), ("two", "quick1"), ("two", "quick2")]:
            tasks.append(asyncio.create_task(ask(check, name, regex)))
            await settle()
        gate.set()
        await asyncio.gather(*tasks)
        steps = [f"{job['step']} {job['constraint']['regex']}" for job in process.jobs]
        assert steps[0] == "validate slow1"
        assert {step.split()[1] for step in steps[1:5]} == {"quick1", "quick2"}

    asyncio.run(run())


def test_constraint_of_two_clients_is_compiled_once() -> None:
    """Each waits in its own turn, and the second finds the verdict of the first."""

    async def run() -> None:
        gate = asyncio.Event()
        check = checking(process := Process(gate=gate))
        tasks = []
        for name in ("one", "two"):
            client_turns.client.set(name)
            tasks.append(asyncio.create_task(check.check(Outputs(regex="a"), HERE)))
            await settle()
        gate.set()
        await asyncio.gather(*tasks)
        assert [job["step"] for job in process.jobs].count("compile") == 1

    asyncio.run(run())


@pytest.fixture
def client() -> Callable[[str], None]:
    """Return a function that says whose request the current task is."""

    def name(text: str) -> None:
        client_turns.client.set(text)

    return name


def test_client_with_too_many_waiting_constraints_is_told_to_come_back(client: Callable[[str], None]) -> None:
    """Another client is not."""

    async def ask(check: ConstraintCheck, name: str, number: int) -> None:
        client(name)
        await check.check(Outputs(regex=f"{name}{number}"), HERE)

    async def run() -> None:
        gate = asyncio.Event()
        check = checking(Process(gate=gate))
        tasks = [asyncio.create_task(ask(check, "one", number)) for number in range(constraint_check.WAITING + 1)]
        await settle()
        with pytest.raises(HTTPError) as caught:
            await asyncio.create_task(ask(check, "one", 99))
        assert caught.value.status == 503
        tasks.append(asyncio.create_task(ask(check, "two", 0)))
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_client_that_left_has_none_waiting(client: Callable[[str], None]) -> None:
    """While another one's constraint is at work."""

    async def ask(check: ConstraintCheck, name: str, number: int) -> None:
        client(name)
        await check.check(Outputs(regex=f"{name}{number}"), HERE)

    async def run() -> None:
        check = checking(Process(gate=(gate := asyncio.Event())))
        first = asyncio.create_task(ask(check, "two", 0))
        await settle()
        left = [asyncio.create_task(ask(check, "one", number)) for number in range(constraint_check.WAITING)]
        await settle()
        await ended(*left)
        last = asyncio.create_task(ask(check, "one", 99))
        await settle()
        gate.set()
        await asyncio.gather(first, last)

    asyncio.run(run())


@pytest.mark.parametrize(
    "answer",
    [ProcessLostError(), {"exceeded": "wall"}, {"exceeded": "SIGKILL"}],
    ids=["lost", "no processor", "killed"],
)
def test_constraint_that_could_not_be_compiled_is_compiled_the_next_time(answer: Answer) -> None:
    """It may be without fault."""

    async def run() -> None:
        process = Process({"compile": answer})
        check = checking(process)
        with pytest.raises(HTTPError) as caught:
            await check.check(Outputs(regex="a"), HERE)
        assert caught.value.status == 503
        process._answers = SERVED
        await check.check(Outputs(regex="a"), HERE)

    asyncio.run(run())


def test_oldest_verdicts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(constraint_check, "KEPT_BYTES", 2 * Verdict(backend="xgrammar").size)

    async def run() -> None:
        check = checking(process := Process())
        for regex in "abacab":
            await check.check(Outputs(regex=regex), HERE)
        assert process.regexes == ["a", "b", "c", "b"]

    asyncio.run(run())


def test_verdicts_of_large_lists_of_choices_take_bounded_memory() -> None:
    """Each holds the grammar that vLLM made of the list."""
    grammar = "x" * 300_000

    async def run() -> None:
        validated = {"backend": "xgrammar", "was_auto": True, "grammar": grammar}
        check = checking(Process({"validate": validated}))
        for number in range(200):
            assert (await check.check(Outputs(choice=[str(number)]), HERE)).grammar == grammar
        kept = sum(len(verdict.grammar or "") for verdict in check._verdicts.values())
        assert 0 < kept <= constraint_check.KEPT_BYTES

    asyncio.run(run())
