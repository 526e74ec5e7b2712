"""Structured outputs are compiled at the gateway: one that crashes xgrammar or takes it too long reaches no engine.

Where the engine's library is not at hand, only the bounds of `constraints` hold. What does not compile is the engine's
to refuse.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from service.gateway.api_errors import APIError, unavailable
from service.gateway.compiler import COMPILE_S, IDLE_S, START_S, Compiler, NoCompilerError, SilentCompilerError
from service.gateway.constraints import Constraint, constraint_error, constraints
from service.gateway.request_fields import RequestFields

REMEMBERED = 1024
WAITING = 64  # different grammars at a time
WAIT_S = 40.0  # the start of the process included
_BUSY_S = 5


@dataclass(frozen=True)
class _Verdict:
    """What is known of a request's shapes, or of one constraint.

    Attributes:
        fault: What is wrong with it; nothing, if empty.
        param: Where.
        lasting: Whether it will be so the next time.
    """

    fault: str = ""
    param: str = ""
    lasting: bool = True


class Grammars:
    """What outputs are to be like, checked once for each shape.

    Args:
        python: Interpreter of the engine's environment; without one nothing is compiled.
        compile_s: Seconds of processor time that a grammar may take.
        start_s: Seconds until the compiling process must be ready.
        idle_s: Seconds without a new grammar after which it is ended.
    """

    def __init__(
        self,
        python: str | None = None,
        *,
        compile_s: float = COMPILE_S,
        start_s: float = START_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._compiler = (
            Compiler(python, compile_s=compile_s, start_s=start_s, idle_s=idle_s) if python is not None else None
        )
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._jobs: dict[bytes, asyncio.Task[_Verdict]] = {}

    async def check(self, fields: RequestFields) -> None:
        """Let a request through, or say why its output's form cannot be served.

        Raises:
            APIError: 400 `invalid_grammar`: it is over a bound, or costs too much. 503: it could not be found out.
        """
        if not fields.constraints:
            return
        parts = [part for name, raw in fields.constraints.items() for part in (name.encode(), raw)]
        key = _digest(*parts, b"forced" * fields.forces_tool)
        verdict = self._recall(key)
        if verdict is None:
            verdict = await self._judge(fields)
            self._remember(key, verdict)
        if verdict.fault and not verdict.lasting:
            raise _later(f"{verdict.param} {verdict.fault}")
        if verdict.fault:
            raise constraint_error(verdict.param, verdict.fault)

    async def close(self) -> None:
        """End the compiling process and what waits for it."""
        for job in (jobs := list(self._jobs.values())):
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        if self._compiler:
            await self._compiler.close()

    async def _judge(self, fields: RequestFields) -> _Verdict:
        lasting = True
        for constraint in constraints(fields):
            verdict = await self._judge_one(constraint) if self._compiler else _Verdict()
            if verdict.fault:
                return _Verdict(verdict.fault, constraint.param, verdict.lasting)
            lasting = lasting and verdict.lasting
        return _Verdict(lasting=lasting)

    async def _judge_one(self, constraint: Constraint) -> _Verdict:
        """Return the verdict on a constraint; many that ask for the same wait for one job."""
        key = _digest(constraint.kind.encode(), constraint.text.encode())
        if verdict := self._recall(key):
            return verdict
        if not (job := self._jobs.get(key)):
            if len(self._jobs) >= WAITING:
                raise _later(f"{WAITING} other grammars are waiting to be compiled")
            job = self._jobs[key] = asyncio.create_task(self._compile(key, constraint))
            job.add_done_callback(lambda _: self._jobs.pop(key))
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.shield(job)  # a request that is cancelled does not cancel it for the others
        except TimeoutError:
            return _Verdict(f"was not compiled within {WAIT_S:.0f} s", lasting=False)

    async def _compile(self, key: bytes, constraint: Constraint) -> _Verdict:
        verdict = await self._ask(constraint)
        self._remember(key, verdict)
        return verdict

    async def _ask(self, constraint: Constraint) -> _Verdict:
        assert self._compiler is not None  # noqa: S101 - _judge asks
        try:
            answer = await self._compiler.compile({"kind": constraint.kind, "text": constraint.text})
        except NoCompilerError:
            return _Verdict(lasting=False)
        except SilentCompilerError:
            return _Verdict("could not be compiled", lasting=False)
        # What xgrammar cannot compile, another of vLLM's backends may: only the engine can refuse it.
        return _Verdict() if answer["verdict"] in {"ok", "invalid"} else _Verdict(answer["reason"])

    def _recall(self, key: bytes) -> _Verdict | None:
        if verdict := self._verdicts.get(key):
            self._verdicts.move_to_end(key)
        return verdict

    def _remember(self, key: bytes, verdict: _Verdict) -> None:
        if verdict.lasting:
            self._verdicts[key] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)


def _later(why: str) -> APIError:
    return unavailable(f"{why}. Send the request again in {_BUSY_S} s.", "grammars_busy", _BUSY_S)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
