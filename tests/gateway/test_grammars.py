"""Structured outputs compiled by the engine's own library, those first that have taken engines down.

Each is named after what it comes from: issues of vLLM and xgrammar, and what one core of a laptop cannot compile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.engine import environment
from service.gateway import request_fields
from service.gateway.api_errors import APIError
from service.gateway.compiler import COMPILE_S, PROGRAM
from service.gateway.grammars import Grammars

ROOT = Path(__file__).parents[2]
Outputs = dict[str, Any]


def schema(**more: Any) -> Outputs:
    """Return the structured output of an object with these properties, all required."""
    return {"json": {"type": "object", "properties": more, "required": [*more]}}


def chain(levels: int) -> Outputs:
    """Return a grammar of so many rules, each twice the one before."""
    rules = "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(levels))
    return {"grammar": f'root ::= r0\n{rules}r{levels} ::= "b"'}


SERVED: dict[str, Outputs] = {
    "object": schema(name={"type": "string"}, age={"type": "integer", "minimum": 0, "maximum": 20_000_000_000}),
    "formats": schema(a={"type": "string", "format": "email"}, b={"type": "string", "format": "date-time"}),
    "string of a length, vllm 863": schema(m={"type": "string", "pattern": r"^[^\n\r]{1,129}$"}),
    "long strings": schema(**{f"s{i}": {"type": "string", "maxLength": 1000} for i in range(10)}),
    "lists of lists": schema(a={"type": "array", "maxItems": 200, "items": {"type": "array", "maxItems": 50}}),
    "1000 properties": schema(**{f"p{i}": {"type": "string"} for i in range(1000)}),
    "300 optional properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(300)}}},
    "10000 values": {"json": {"enum": [f"value {i}" for i in range(10_000)]}},
    "recursion": {"json": {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}}},
    "reference to itself": {"json": {"$ref": "#"}},
    "63 levels": {"json": json.loads('{"type":"array","items":' * 63 + "{}" + "}" * 63)},
    "anything": {"json": {}},
    "as a string": {"json": '{"type":"string"}'},
    "address": {"regex": r"[\w.-]+@[\w.-]+\.\w{2,6}"},
    "empty alternative, vllm 37642": {"regex": "^(|.*)$"},
    "list of words": {"regex": "([a-z]{1,20},){1,100}"},
    "words": {"regex": "([a-z]+ ){1,50}[a-z]+"},
    "nested repetition": {"regex": "(a+)+b"},
    "exponential automaton": {"regex": "(a|b)*a(a|b){30}"},
    "large count": {"regex": "[abc]{100000}"},
    "1000 parentheses": {"regex": "(" * 1000 + "a" + ")" * 1000},
    "choice": {"choice": ['say "yes"', "no\n", "back\\slash", "\x00\x7f", "ümläut"]},
    "1000 choices": {"choice": [f"choice {i}" for i in range(1000)]},
    "grammar": {"grammar": 'root ::= "SELECT " c ("," c)*\nc ::= [a-z]+'},
    "left recursion": {"grammar": 'root ::= root "a" | "b"'},
    "no end": {"grammar": 'root ::= "a" root'},
    "2 to the 40 letters": chain(40),
    "lark": {"grammar": 'start: "a" | WORD\n%import common.WORD'},
    "structural tag": {"structural_tag": '{"type":"structural_tag","format":{"type":"json_schema","json_schema":{}}}'},
    "old structural tag": {
        "structural_tag": '{"structures":[{"begin":"<f>","schema":{},"end":"</f>"}],"triggers":["<f"]}'
    },
}
# Not for xgrammar: vLLM gives some of them to guidance, and refuses the others itself.
OTHERS_TO_JUDGE: dict[str, Outputs] = {
    "vllm 17313": {"regex": "("},
    "vllm 19270": {"regex": "[a-z"},
    "vllm 43920": {"grammar": 'root ::= "a"\nroot ::= "b"'},
    "vllm 17248": {"json": {"type": "str"}},
    "lookahead": {"regex": "(?=a)b"},
    "back reference": {"regex": r"(a)\1"},
    "word boundary": {"regex": r"\bfoo\b"},
    "letters of any script": {"regex": r"\p{L}+"},
    "count of 23 digits": {"regex": "a{99999999999999999999999}"},
    "bad pattern": schema(a={"type": "string", "pattern": "("}),
    "missing reference": {"json": {"$ref": "#/$defs/no"}},
    "nothing fits": schema(a=False),
    "integer of 41 digits": {"json": {"type": "integer", "maximum": 10**40}},
    "multipleOf": schema(a={"type": "integer", "multipleOf": 3}),
    "uniqueItems": schema(a={"type": "array", "uniqueItems": True}),
    "pattern and length": schema(a={"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 8}),
    "no rule": {"grammar": "root ::= "},
    "no root": {"grammar": 'a ::= "a"'},
    "undefined rule": {"grammar": "root ::= b"},
    "5000 parentheses": {"grammar": f"root ::= {'(' * 5000}'a'{')' * 5000}"},
    "bad lark": {"grammar": "start: ("},
    "tag without its trigger": {
        "structural_tag": '{"structures":[{"begin":"<f>","schema":{},"end":"</f>"}],"triggers":["x"]}'
    },
}
# Compiles, and vLLM's own validation lets it pass.
COSTLY: dict[str, tuple[Outputs, str]] = {
    "optional separator": ({"regex": "([a-z]{1,30} ?){1,30}"}, "ambiguous"),
    "optional separator, far in": ({"regex": "I say: ([a-z]{1,30} ?){1,30}"}, "ambiguous"),
    "counts of counts": ({"regex": "([a-z0-9_.]{1,1000}x?){1,1000}"}, "ambiguous"),
    "counts of counts in a schema": (schema(a={"type": "string", "pattern": "^(([a-z]{1,99}){1,99}){1,99}$"}), "ambig"),
    "counts of counts in a grammar": ({"grammar": "root ::= (([a-z] [a-z]?){1,1000}){1,1000}"}, "ambiguous"),
    "every way to cut nothing": ({"grammar": 'root ::= root root | "" | "a"'}, ""),
    "5000 levels in lark": (
        {"grammar": "start: %json " + '{"type":"array","items":' * 5000 + "{}" + "}" * 5000},
        "",  # memory or time, whichever ends first
    ),
    "150 properties, counted": (
        {"json": {"allOf": [{"type": "object", "properties": {f"p{i}_{j}": {} for i in range(95)}, "minProperties": 1}
                            for j in range(1)],
                  "anyOf": [{"type": "object", "properties": {f"q{i}_{j}": {} for i in range(99)}, "minProperties": 1}
                            for j in range(12)]}},
        "",
    ),
}  # fmt: skip


def body(outputs: Outputs) -> bytes:
    """Return the body of a request."""
    return json.dumps({"model": "x", "structured_outputs": outputs}).encode()


OTHERS: list[psutil.Process] = []  # of services that other tests go on to use


def compilers() -> list[psutil.Process]:
    """Return the compiling processes and their forks."""
    return [child for child in psutil.Process().children(recursive=True) if str(PROGRAM) in child.cmdline()]


@pytest.fixture
def own_compilers() -> Callable[[], list[psutil.Process]]:
    """Return a function that returns those that a test has started."""
    before = compilers()
    return lambda: [process for process in compilers() if process not in before]


@pytest.fixture(scope="module")
def engine_python() -> str:
    """Interpreter of the engine's environment."""
    return environment.ensure().python


class Running:
    """Grammars in a loop that goes on between the tests."""

    def __init__(self, runner: asyncio.Runner, grammars: Grammars) -> None:
        self._runner, self._grammars = runner, grammars

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something to its end."""
        return self._runner.run(work)

    def check(self, outputs: Outputs) -> APIError | None:
        """Return what a structured output is refused with."""
        try:
            return self.run(self._grammars.check(request_fields.parse_fields(body(outputs))))
        except APIError as api_error:
            return api_error


@pytest.fixture(scope="module")
def gateway(engine_python: str) -> Iterator[Running]:
    """Grammars with the engine's library; nothing is left of them."""
    OTHERS[:] = compilers()
    with asyncio.Runner() as runner:
        grammars = Grammars(engine_python)
        yield Running(runner, grammars)
        runner.run(grammars.close())
    assert not [process for process in compilers() if process not in OTHERS]


@pytest.mark.parametrize("name", SERVED)
def test_structured_output_that_engines_serve_passes(gateway: Running, name: str) -> None:
    """Large, nested and recursive ones among them, and some that look worse than they are."""
    assert gateway.check(SERVED[name]) is None


@pytest.mark.parametrize("name", OTHERS_TO_JUDGE)
def test_structured_output_that_xgrammar_cannot_compile_is_left_to_the_engine(gateway: Running, name: str) -> None:
    """Plain vLLM serves some of them by another backend, so that none is refused in front of it."""
    assert gateway.check(OTHERS_TO_JUDGE[name]) is None


@pytest.mark.parametrize("name", COSTLY)
def test_structured_output_that_would_hold_up_an_engine_is_refused_within_its_time(gateway: Running, name: str) -> None:
    """One such request has an engine compile for minutes, or stand still before every token of everybody."""
    outputs, words = COSTLY[name]
    begun = time.monotonic()
    api_error = gateway.check(outputs)

    assert api_error is not None
    assert (api_error.status, api_error.code) == (400, "invalid_grammar")
    assert words in api_error.message
    assert time.monotonic() - begun < 4 * COMPILE_S
    again = time.thread_time()
    assert gateway.check(outputs) is not None
    assert time.thread_time() - again < 0.1
    assert gateway.check(SERVED["object"] | {"x": name}) is None


def test_structured_output_asked_for_again_costs_microseconds(gateway: Running) -> None:
    """A client sends the same schema with every request."""
    gateway.check(SERVED["1000 properties"])
    asked = request_fields.parse_fields(body(SERVED["1000 properties"]))

    async def again() -> float:
        begun = time.perf_counter()
        for _ in range(1000):
            await gateway._grammars.check(asked)
        return time.perf_counter() - begun

    assert gateway.run(again()) / 1000 < 0.0005


def test_one_process_is_enough_for_all_of_them(gateway: Running) -> None:
    """Even what crashes, hangs or eats memory takes only a fork with it."""
    gateway.check({"regex": "x{1,3}"})
    (before,) = (process for process in compilers() if process not in OTHERS)
    for outputs, _ in COSTLY.values():
        gateway.check({**outputs, "another": 1})
    (after,) = (process for process in compilers() if process not in OTHERS)

    assert before.pid == after.pid


@pytest.mark.parametrize(("name", "signal_"), [("crash", "SIGSEGV"), ("abort", "SIGABRT")])
def test_job_that_crashes_the_compiler_is_refused_and_remembered(
    engine_python: str, tmp_path: Path, name: str, signal_: str
) -> None:
    """The library's own crashes are found and mended one by one; here it is made to crash."""
    broken = tmp_path / "grammar_process.py"
    change = f'    if "{name}" in job["text"]: os.kill(os.getpid(), signal.{signal_})\n    kind, text = '
    broken.write_text(PROGRAM.read_text().replace("    kind, text = ", change, 1))

    async def run() -> None:
        grammars = Grammars(engine_python)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("service.gateway.compiler.PROGRAM", broken)
            for _ in range(2):
                with pytest.raises(APIError) as caught:
                    await grammars.check(request_fields.parse_fields(body({"regex": name})))
                assert (caught.value.status, caught.value.code) == (400, "invalid_grammar")
                assert f"crashes the compiler ({signal_})" in caught.value.message
            await grammars.check(request_fields.parse_fields(body({"regex": "fine"})))
        await grammars.close()

    asyncio.run(run())


def test_job_that_outlasts_everything_ends_and_the_next_job_works(
    engine_python: str, own_compilers: Callable[[], list[psutil.Process]]
) -> None:
    """The compiling process itself is stopped: it is killed with its fork, and another started."""

    async def run() -> None:
        grammars = Grammars(engine_python, compile_s=1)
        await grammars.check(request_fields.parse_fields(body({"regex": "a"})))
        (process,) = own_compilers()
        process.suspend()
        with pytest.raises(APIError) as caught:
            await grammars.check(request_fields.parse_fields(body({"regex": "b"})))
        assert caught.value.status == 503
        assert not process.is_running()
        await grammars.check(request_fields.parse_fields(body({"regex": "b"})))
        await grammars.close()

    asyncio.run(run())

    assert not own_compilers()


def test_time_is_the_processors_not_the_clocks(
    engine_python: str, own_compilers: Callable[[], list[psutil.Process]]
) -> None:
    """What takes longer than its limit is ended by the fork's own timer, and the process stays."""

    async def run() -> None:
        grammars = Grammars(engine_python, compile_s=2)
        with pytest.raises(APIError) as caught:
            await grammars.check(request_fields.parse_fields(body(COSTLY["150 properties, counted"][0])))
        assert "takes more than 2 s" in caught.value.message
        (process,) = own_compilers()
        await grammars.check(request_fields.parse_fields(body({"regex": "a"})))
        assert process.is_running()
        await grammars.close()

    asyncio.run(run())


@pytest.mark.parametrize("outputs", [{"regex": "x"}, COSTLY["150 properties, counted"][0]], ids=["idle", "compiling"])
def test_compiler_ends_with_its_parent(
    engine_python: str, own_compilers: Callable[[], list[psutil.Process]], outputs: Outputs
) -> None:
    """Killed, not asked: the parent has no time to end anything."""
    program = f"""
import asyncio, sys
from service.gateway import request_fields
from service.gateway.grammars import Grammars
async def run():
    grammars = Grammars({engine_python!r})
    await grammars.check(request_fields.parse_fields(b'{{"structured_outputs":{{"regex":"x"}}}}'))
    print("ready", flush=True)
    await grammars.check(request_fields.parse_fields({body(outputs)!r}))
    await asyncio.sleep(600)
asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 5
            while len(own_compilers()) < 1 + ("json" in outputs) and time.monotonic() < deadline:
                time.sleep(0.01)
            family = own_compilers()
        finally:
            parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(family, timeout=10)

    assert len(gone) == 1 + ("json" in outputs)
    assert not alive


def test_what_vllm_serves_is_served(gateway: Running, engine_python: str) -> None:
    """Nothing is refused that vLLM's own validation lets pass with its default, `auto`, but for what is costly."""
    samples = [*SERVED.values(), *OTHERS_TO_JUDGE.values(), *odd_schemas()]
    program = """
import json, sys
from types import SimpleNamespace
from transformers import AutoTokenizer
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
model, auto = SimpleNamespace(is_diffusion=False), StructuredOutputsConfig()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def backend(outputs):
    asked = SamplingParams(structured_outputs=StructuredOutputsParams(**outputs))
    try:
        asked._validate_structured_outputs(model, auto, tokenizer)
    except Exception:
        return None
    return asked.structured_outputs._backend
print(json.dumps([backend(outputs) for outputs in json.load(sys.stdin)]))
"""
    env = {"PATH": os.defpath, "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "HOME": os.environ["HOME"]}
    done = subprocess.run(
        [engine_python, "-c", program, str(ROOT / "service" / "assets" / "tiny")],
        env=env,
        input=json.dumps(samples),
        capture_output=True,
        text=True,
        check=True,
    )
    backends = json.loads(done.stdout.splitlines()[-1])

    assert {"xgrammar", "guidance", "outlines", None} == set(backends)
    for outputs, backend in zip(samples, backends, strict=True):
        assert backend is None or gateway.check(outputs) is None, (backend, outputs)


def odd_schemas() -> Iterator[Outputs]:
    """Yield schemas with every keyword that xgrammar ignores, and with its neighbours that it does not."""
    draw = random.Random(3)  # noqa: S311 - the same in every run
    words: dict[str, list[Any]] = {
        "type": ["string", "array", "object", "integer", ["string", "null"], ["number"], "boolean"],
        "multipleOf": [2], "uniqueItems": [True], "contains": [{}], "minContains": [1], "minItems": [1],
        "format": ["email", "regex", "uuid", "phone"], "pattern": ["^a$"], "minLength": [1], "maxLength": [9],
        "propertyNames": [{}, {"pattern": "^a$"}, {"pattern": "^a$", "maxLength": 3}],
        "patternProperties": [{"^a": {}}, {"^a": {}, "^b": {}}], "properties": [{"a": {"type": "integer"}}],
        "unevaluatedProperties": [True, False], "allOf": [[{}], [{"type": "string"}, {"enum": ["a"]}]],
    }  # fmt: skip
    for _ in range(120):
        inner = {word: draw.choice(words[word]) for word in ["type", *draw.sample(sorted(words), 2)]}
        yield {"json": draw.choice([inner, {"type": "object", "properties": {"x": inner}}, {"anyOf": [inner]}])}
