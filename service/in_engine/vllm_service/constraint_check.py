"""Judges the constraint of a request in a bounded process, before vLLM compiles it on the event loop and in the engine.

A JSON schema, regular expression, grammar, list of choices or structural tag of a few bytes can cost vLLM minutes or
gigabytes, and while its API server compiles it to validate it, nobody else is answered. Here vLLM's own validation and
the engine's own compilation run first beside the engine (`constraint_compile`). Beyond the bounds, or without a
backend that takes it, the request is answered 400. A verdict is kept, so that a constraint costs once. Work that
nobody waits for is killed. Clients take turns at the steps, and each pays with the time that its own took.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import hashlib
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from vllm_service.bounded_fork import Bounds
from vllm_service.bounded_process import BoundedProcess, ProcessLostError
from vllm_service.client_turns import Turns, client
from vllm_service.constraint_errors import COMBINATION, REMEDY, later, of_tool, refused, sentence, subject_of
from vllm_service.schema_faults import plain, schemas_in

BOUNDS = Bounds(cpu_s=2.0, memory_bytes=500 * 1024**2, wall_s=60.0)
KEPT_BYTES = 16 * 1024**2  # of verdicts; the grammar of a list of choices may have 300 KiB
_VERDICT_BYTES = 1024  # of one, beside its texts
WAITING = 16  # constraints of one client
_NOT_OF_THE_JOB = ("wall", "SIGKILL")  # no processor was free, or somebody killed it: the kernel for memory, say
_BLAMED = 16  # tools, each compiled alone to find the one at fault
_GUIDANCE = "guidance"  # it compiles while it generates, within limits of its own
# What guidance refuses and xgrammar ignores, in guidance's errors.
_UNENFORCED = re.compile(
    r"Unimplemented.*"
    r'"(not|if|then|else|(min|max)?[cC]ontains|uniqueItems|depend\w+|unevaluated\w+|\$dynamic\w+)"'
    r"|Resource '|Unknown format|oneOf constraints|regex parse error|lookaround|Expected positive integer"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a constraint comes from, for its errors.

    Attributes:
        param: The field of the body.
        schemas: Name and schema of each tool that vLLM made it of.
        is_strict: Whether the client asked for a JSON schema with `strict`: what cannot be enforced is refused then.
    """

    param: str
    schemas: Sequence[tuple[str, Any]] = ()
    is_strict: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a constraint.

    Attributes:
        fault: Why it is refused, after its subject; empty if it is served.
        subject: What the fault is in, when that is not the constraint as a whole.
        backend: The one that serves it.
        was_auto: Whether there was a choice.
        grammar: What vLLM made of a list of choices.
    """

    fault: str = ""
    subject: str = ""
    backend: str = ""
    was_auto: bool = False
    grammar: str | None = None

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return _VERDICT_BYTES + sum(sys.getsizeof(text) for text in (self.fault, self.subject, self.grammar))


class ConstraintCheck:
    """Verdicts on constraints. Belongs to one event loop.

    Args:
        process: Runs the steps of `ConstraintCompiler`.
        is_auto: Whether the engine has a backend for each request, and not one for all.
    """

    def __init__(self, process: BoundedProcess, *, is_auto: bool = True) -> None:
        self._process, self._is_auto = process, is_auto
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._kept_bytes = 0
        self._jobs: dict[tuple[str, bytes], _Job] = {}  # by client: one must not wait for the turn of another
        self._turns = Turns()

    async def check(self, outputs: Any, source: Source) -> Verdict:
        """Return the verdict on a constraint that vLLM can serve.

        Args:
            outputs: vLLM's `StructuredOutputsParams`.
            source: Where it comes from.

        Raises:
            VLLMValidationError: It cannot be served, or costs too much.
            GracefulHTTPError: 503: it was not found out.
        """
        constraint = _fields_of(outputs)
        key = b"strict" * source.is_strict + _digest(constraint)
        verdict = await self._verdict(key, lambda: self._decide(constraint, source))
        if verdict.fault:
            subject = verdict.subject or (COMBINATION if source.schemas else subject_of(constraint))
            raise refused(f"{subject} {verdict.fault}", source.param)
        return verdict

    async def xgrammar_takes(self, outputs: Any) -> bool:
        """Tell whether a constraint passes xgrammar's validation."""
        constraint = _fields_of(outputs)

        async def validate() -> Verdict:
            validated = await self._validate(constraint, "xgrammar")
            return Verdict("" if "backend" in validated else "is refused by xgrammar")

        return not (await self._verdict(b"xgrammar" + _digest(constraint), validate)).fault

    async def _verdict(self, key: bytes, decide: Callable[[], Coroutine[Any, Any, Verdict]]) -> Verdict:
        """Return a verdict that is kept, or a job's; several requests of a client wait for one job."""
        if (verdict := self._verdicts.get(key)) is None:
            verdict = await self._judge((client.get(), key), decide)
        self._keep(key, verdict)
        return verdict

    async def _judge(self, key: tuple[str, bytes], decide: Callable[[], Coroutine[Any, Any, Verdict]]) -> Verdict:
        if (job := self._jobs.get(key)) is None:
            if self._turns.waiting(client.get()) >= WAITING:
                raise later(f"{WAITING} other constraints of this client are waiting to be compiled")
            job = self._jobs[key] = _Job(asyncio.create_task(self._job(key[1], decide)))
        job.waiting += 1
        try:
            return await asyncio.shield(job.task)
        except ProcessLostError as error:
            raise later("The constraint could not be compiled") from error
        finally:
            job.waiting -= 1
            if not job.waiting:
                del self._jobs[key]  # at once: a request that comes now begins anew
                job.task.cancel()

    async def _job(self, key: bytes, decide: Callable[[], Coroutine[Any, Any, Verdict]]) -> Verdict:
        _key.set(key)
        try:
            verdict = await decide()
        except _JudgedError:
            return self._verdicts[key]
        self._keep(key, verdict)
        return verdict

    def _keep(self, key: bytes, verdict: Verdict) -> None:
        """Keep a verdict as the newest one, and forget the oldest beyond the bound."""
        if before := self._verdicts.pop(key, None):
            self._kept_bytes -= before.size
        self._verdicts[key] = verdict
        self._kept_bytes += verdict.size
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._verdicts.popitem(last=False)[1].size

    async def _decide(self, constraint: dict[str, Any], source: Source) -> Verdict:
        """Return the verdict with the first backend that serves a constraint, or why vLLM's choice does not."""
        chosen: dict[str, Any] = {}
        lacking = ""
        for backend in self._backends(constraint):
            validated = await self._validate(constraint, backend)
            if backend == _GUIDANCE and source.is_strict:
                lacking = validated.get("fault", "")
            if lacking and (_UNENFORCED.search(lacking) or validated.get("backend") == "outlines"):
                return await self._explain(constraint, source, lacking, _GUIDANCE)
            compiled = await self._compile(constraint, validated)
            if compiled.get("is_served"):
                grammar = validated["grammar"] if "choice" in constraint else None
                return Verdict(backend=validated["backend"], was_auto=self._is_auto, grammar=grammar)
            if backend is None:
                chosen = {**compiled, "was_validated": "backend" in validated}
        if "fault" in chosen and not chosen["was_validated"]:
            return await self._explain(constraint, source, chosen["fault"])
        return await self._blame(source, Verdict(fault=sentence(chosen, BOUNDS)))

    def _backends(self, constraint: dict[str, Any]) -> tuple[str | None, ...]:
        """Return the backends to try; None is the one that vLLM chooses, or that the command line names."""
        if not self._is_auto or "structural_tag" in constraint:
            return (None,)
        # xgrammar ignores in silence most of what it lacks of JSON Schema; guidance refuses it
        return (_GUIDANCE, None) if "json" in constraint else (None, _GUIDANCE)

    async def _validate(self, constraint: dict[str, Any], backend: str | None) -> dict[str, Any]:
        return await self._run(step="validate", constraint=constraint, backend=backend)

    async def _run(self, **job: Any) -> dict[str, Any]:
        """Run a step in the process when its client has a turn; what had no processor for a minute is not judged."""
        async with self._turns.take(client.get()):
            if _key.get() in self._verdicts:
                raise _JudgedError
            answer = await self._process.run(job)
        if answer.get("exceeded") in _NOT_OF_THE_JOB:
            raise ProcessLostError
        return answer

    async def _blame(self, source: Source, verdict: Verdict) -> Verdict:
        """Return a verdict that names the first tool whose schema alone is at fault too."""
        for name, schema in source.schemas[:_BLAMED]:
            found = await self._compile({"json": schema}, {"backend": "xgrammar"})
            if not found.get("is_served"):
                return Verdict(sentence(found, BOUNDS), of_tool(name))
        return verdict

    async def _compile(self, constraint: dict[str, Any], validated: dict[str, Any]) -> dict[str, Any]:
        """Compile what validation made of a constraint; return what it found out if it failed itself."""
        if "backend" not in validated:
            return validated
        if "choice" in constraint and validated["grammar"]:
            constraint = {"grammar": validated["grammar"]}
        return await self._run(step="compile", constraint=constraint, backend=validated["backend"])

    async def _explain(
        self, constraint: dict[str, Any], source: Source, fault: str, backend: str | None = None
    ) -> Verdict:
        """Return a verdict that names the place of a fault; the schemas that hold it are those of tools, or its own."""
        schemas = [(of_tool(name), schema) for name, schema in source.schemas]
        schemas = schemas or [("", schema) for schema in schemas_in(constraint)]
        found = await self._run(step="explain", constraint=constraint, schemas=schemas, backend=backend)
        place = f" (at {found['place']})" if "place" in found else ""
        reason = plain(found.get("fault") or fault)
        return Verdict(f"is refused by vLLM: {reason}{place}. {REMEDY}", found.get("name", ""))


class _JudgedError(Exception):
    """While a job waited for its turn, that of another client for the same constraint has ended."""


_key: contextvars.ContextVar[bytes] = contextvars.ContextVar("_key")  # of the verdict that a job looks for


def _fields_of(outputs: Any) -> dict[str, Any]:
    return {
        field.name: value
        for field in dataclasses.fields(outputs)
        if not field.name.startswith("_") and (value := getattr(outputs, field.name)) not in (None, False)
    }


def _digest(constraint: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(constraint).encode()).digest()


@dataclasses.dataclass
class _Job:
    """The work on one constraint, and how many requests wait for it."""

    task: asyncio.Task[Verdict]
    waiting: int = 0
