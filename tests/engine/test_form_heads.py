"""Heads of a form's fields, read by the parser of vLLM's environment and by the gateway and the guard."""

from __future__ import annotations

import itertools
import json
import subprocess

from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.form_data import _name

READS = """
import json, sys
from python_multipart.multipart import parse_options_header

for head in json.load(sys.stdin):
    options = parse_options_header(head)[1]
    print(json.dumps([options.get(b"name", b"").decode("latin-1"), b"filename" in options]))
"""
NAMES = ("model", "file", "a[]", 'file; filename="', "x; name=model")
QUOTED = ('name="{}"', "name={}", 'name="{}', 'name={}"', 'NAME="{}"', "name*=UTF-8''{}", "name={};")
FILES = ("", "a", "a; b", "C:\\a", "\\", '\\"', " name=model", "; name=model; x=", "UTF-8''x", "x''%ff", "'")
RESTS = (
    *("", ";", "; x", '"', "; name=model"),
    *(head.format(file) for file in FILES for head in ('; filename="{}"', ";filename={}", "; filename*={}")),
)


def accepted(head: str) -> tuple[str, bool] | None:
    """Return the name, and whether the field is a file; None: it is refused."""
    try:
        return _name(b"Content-Disposition: " + head.encode())
    except APIError:
        return None


def test_form_heads_are_read_as_the_engines_parser_reads_them(engine_python: str) -> None:
    """A field that is the model here must not be another one there, nor a text here a file there."""
    named = [head.format(name) for head in QUOTED for name in NAMES]
    heads = [f"form-data; {''.join(parts)}" for parts in itertools.product(named, RESTS, RESTS)]
    ours = {head: read for head in heads if (read := accepted(head))}

    done = subprocess.run(
        [engine_python, "-c", READS],
        input=json.dumps(list(ours)),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    theirs = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(theirs) == len(ours) > 100
    assert {head: (ours[head], read) for head, read in zip(ours, theirs, strict=True) if ours[head] != read} == {}
