"""The program that compiles grammars, run by the engine's Python: `python -I grammar_process.py SECONDS BYTES`.

It imports xgrammar once and then forks for every job, so that what crashes, hangs or eats memory takes a fork with it
and nothing else. A job is a JSON line on standard input, its answer a JSON line on standard output; the end of standard
input, which is the end of its parent, ends it at any moment. Standard library and xgrammar only.

It judges what vLLM gives to xgrammar; what xgrammar cannot compile is `invalid`, and another backend's. Refused is what
only shows when an engine has accepted it: a compilation without end, and a choice of a token that holds up every other
request.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
from typing import Any

TOKENS = 4096  # an engine has 30 to 250 thousand, and is so much slower
MASK_S = 0.01  # for one byte; 0.3 s of an engine that knows 150 thousand, in which it serves no request
WALK_S = 0.6  # for all of them
_STEPS = 400  # bytes that are written
_CHOICES = 96  # of them not the only one possible
_RUN = 12  # of them letters, before a value's end is looked for
_LETTERS = b"etaoinshrdlu ETAOIN0123456789"
_ENDS = b'"}],:{[<>()/-.\n'
_PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: (Check failed: .* is false: )?")  # in the library's source
_FORMATS = re.compile(
    "email|date|time|date-time|duration|ipv4|ipv6|hostname|uuid|uri|uri-reference|uri-template|json-pointer|"
    "relative-json-pointer"
)
_ARRAY_WORDS = ("uniqueItems", "contains", "minContains", "maxContains")


def main() -> None:
    """Serve jobs until standard input ends."""
    limit_s, room_bytes = float(sys.argv[1]), int(sys.argv[2])
    out = os.dup(1)
    os.dup2(2, 1)  # what the library prints is no answer
    try:
        import xgrammar  # type: ignore[import-not-found]  # noqa: PLC0415 - its failure is an answer
    except Exception as error:  # noqa: BLE001 - any failure of an import means that there is no compiler
        _tell(out, {"failed": f"{type(error).__name__}: {error}"})
        return
    tokens = vocabulary()
    kind = xgrammar.VocabType.RAW
    info = xgrammar.TokenizerInfo(tokens, kind, vocab_size=len(tokens), stop_token_ids=[len(tokens) - 1])
    _limit_memory(room_bytes)
    _tell(out, {"ready": True})
    while (line := sys.stdin.buffer.readline()).endswith(b"\n"):
        _tell(out, _in_fork(lambda line=line: examine(xgrammar, info, json.loads(line)), limit_s))
    os._exit(0)  # past the libraries' farewells, which take seconds


def vocabulary() -> list[bytes]:
    """Return every byte, words of letters as a tokenizer may have them, and an end."""
    draw = random.Random(0)  # noqa: S311 - the same in every process
    words = {bytes([byte]): None for byte in range(256)}
    while len(words) < TOKENS - 1:
        words[bytes(draw.choices(_LETTERS + _ENDS, [4] * 13 + [1] * 31, k=draw.randint(2, 8)))] = None
    return [*words, b"</s>"]


def examine(xgrammar: Any, info: Any, job: dict[str, str]) -> dict[str, str]:
    """Return the verdict on a job: `ok`, `invalid` or `costly`, and the reason."""
    try:
        compiled = _compile(xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False), job)
        taken_s = _walk(xgrammar, compiled)
    except Exception as error:  # noqa: BLE001 - the library raises whatever it likes
        return _complaint(error)
    if not _is_quick(taken_s):
        return {
            "verdict": "costly",
            "reason": f"is too ambiguous: to find the next of {TOKENS} tokens took up to {max(taken_s) * 1000:.0f} ms. "
            "Put something that must come between repetitions, or repeat without a count",
        }
    return {"verdict": "ok", "reason": ""}


def _complaint(error: Exception) -> dict[str, str]:
    words = " ".join(_PLACE.sub("", str(error)).split())[:300].rstrip(". ")
    if "bad_alloc" in words or isinstance(error, MemoryError):
        return {"verdict": "costly", "reason": "takes too much memory to compile"}
    return {"verdict": "invalid", "reason": f"does not compile: {words or type(error).__name__}"}


def _compile(compiler: Any, job: dict[str, str]) -> Any:
    kind, text = job["kind"], job["text"]
    if kind == "json" and unsupported(json.loads(text)):
        raise ValueError("the JSON schema has keywords that vLLM gives to another backend")
    if kind in {"json", "tool"}:
        return compiler.compile_json_schema(text, any_whitespace=False, separators=(",", ":"))
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "choice":
        return compiler.compile_grammar(choices_as_grammar(json.loads(text)))
    if kind == "grammar":
        return compiler.compile_lark(text) if is_lark(text) else compiler.compile_grammar(text)
    return _compile_tag(compiler, json.loads(text), text)


def _compile_tag(compiler: Any, tag: dict[str, Any], text: str) -> Any:
    if "structures" not in tag:
        return compiler.compile_structural_tag(text)
    from xgrammar import StructuralTagItem  # noqa: PLC0415 - it is there when a job is

    items = [
        StructuralTagItem(begin=part["begin"], schema=json.dumps(part["schema"]), end=part["end"])
        for part in tag["structures"]
    ]
    return compiler.compile_structural_tag(items, tag["triggers"])


def _walk(xgrammar: Any, compiled: Any) -> list[float]:
    """Write a little as the grammar allows, and return what each byte took of the processor, in seconds."""
    matcher, mask = xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, TOKENS)
    taken_s: list[float] = []
    choices = 0
    while len(taken_s) < _STEPS and choices < _CHOICES and _is_quick(taken_s):
        begun = time.process_time()
        matcher.fill_next_token_bitmask(mask, 0)
        filled_s = time.process_time() - begun
        words = mask[0].tolist()
        allowed = {byte: None for byte in range(256) if words[byte // 32] >> (byte % 32) & 1}
        begun = time.process_time()
        goes_on = bool(allowed) and matcher.accept_token(_choice(allowed, choices)) and not matcher.is_terminated()
        taken_s.append(filled_s + time.process_time() - begun)
        if not goes_on:
            break
        choices += len(allowed) > 1
    return taken_s


def _is_quick(taken_s: list[float]) -> bool:
    """Judge a walk; its one slowest step may have been a hiccup."""
    return sum(taken_s) < WALK_S and sum(second > MASK_S for second in taken_s) < 2


def _choice(allowed: dict[int, None], choices: int) -> int:
    """Return the next byte: letters, not always the same, and now and then what may end a value."""
    wanted = _LETTERS + _ENDS if choices % (_RUN + 1) < _RUN else _ENDS + _LETTERS
    preferred = [byte for byte in wanted if byte in allowed] or list(allowed)
    return preferred[choices % min(3, len(preferred))]


def unsupported(schema: object) -> bool:
    """Tell whether a schema has what xgrammar would silently ignore. Source: has_xgrammar_unsupported_json_features."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            if _is_unsupported(node):
                return True
            for value in node.values():
                todo += value if isinstance(value, list) else [value]
    return False


def _is_unsupported(node: dict[str, Any]) -> bool:
    kind = node.get("type")
    types = {kind} if isinstance(kind, str) else {one for one in kind if isinstance(one, str)} if kind else set()
    several = node.get("allOf")
    return bool(
        (types & {"integer", "number"} and "multipleOf" in node)
        or ("array" in types and any(word in node for word in _ARRAY_WORDS))
        or ("string" in types and (_has_odd_format(node) or _has_pattern_and_length(node)))
        or ("object" in types and (_has_odd_names(node) or _has_odd_patterns(node)))
        or (isinstance(several, list) and len(several) > 1)
    )


def _has_odd_format(node: dict[str, Any]) -> bool:
    return "format" in node and not _FORMATS.fullmatch(str(node["format"]))


def _has_pattern_and_length(node: dict[str, Any]) -> bool:
    return ("pattern" in node or "format" in node) and ("minLength" in node or "maxLength" in node)


def _has_odd_names(node: dict[str, Any]) -> bool:
    if "propertyNames" not in node:
        return False
    names = node["propertyNames"]
    return (
        (isinstance(names, dict) and _has_pattern_and_length(names))
        or "patternProperties" in node
        or "properties" in node
        or node.get("unevaluatedProperties", True) is not True
    )


def _has_odd_patterns(node: dict[str, Any]) -> bool:
    patterns = node.get("patternProperties")
    return isinstance(patterns, dict) and ("properties" in node or len(patterns) > 1)


def is_lark(text: str) -> bool:
    """Tell Lark's syntax from EBNF as vLLM does: no line defines a rule with `::=`."""
    return not any("::=" in re.sub(r"(#|//).*$", "", line) for line in text.split("\n"))


def choices_as_grammar(choices: list[str]) -> str:
    """Return the grammar of exactly these strings."""
    named = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    quoted = re.compile(r'[\\"\x00-\x1f\x7f]')

    def escape(found: re.Match[str]) -> str:
        return named.get(found[0]) or f"\\u{ord(found[0]):04x}"

    return "root ::= " + " | ".join(f'"{quoted.sub(escape, choice)}"' for choice in choices)


def _limit_memory(room_bytes: int) -> None:
    """Allow this process and its forks so much more than it has now, whatever its libraries have mapped."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no more imports than needed
        limit = int(file.read().split()[0]) * resource.getpagesize() + room_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _in_fork(work: Any, limit_s: float) -> dict[str, str]:
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # of its processor time; what it does then is die
        _tell(write, work())
        os._exit(0)
    os.close(write)
    text = b""
    while True:
        ready = select.select([read, 0], [], [])[0]
        if 0 in ready:  # the parent sends the next job only after this one's answer, so this is the end of the pipe
            os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if not (piece := os.read(read, 65536)):
            break
        text += piece
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    return dict(json.loads(text)) if text.endswith(b"\n") else _death(status, limit_s)


def _death(status: int, limit_s: float) -> dict[str, str]:
    if not os.WIFSIGNALED(status):
        return {"verdict": "crashed", "reason": f"ends the compiler with code {os.waitstatus_to_exitcode(status)}"}
    if os.WTERMSIG(status) == signal.SIGPROF:
        return {"verdict": "costly", "reason": f"takes more than {limit_s:g} s to compile and to follow"}
    name = signal.Signals(os.WTERMSIG(status)).name
    return {"verdict": "crashed", "reason": f"crashes the compiler ({name})"}


def _tell(fd: int, word: dict[str, Any]) -> None:
    os.write(fd, json.dumps(word).encode() + b"\n")


if __name__ == "__main__":
    main()
