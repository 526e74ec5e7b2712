"""A key, a prompt and an upstream token that nobody else has: searched for wherever a service leaves something."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.contract.conftest import modal_cli
from tests.contract.gateways import APP, TAG
from tests.fakes.modal import ModalPlane

from .payloads import Payloads, paths
from .targets import KEY, OTHER_KEY, Answer, Target, request

PROMPT = "pr0mptcanary7Qz"
WRONG_KEY = "sk-Wr0ngKeyCanary"
CANARIES = (KEY, OTHER_KEY, WRONG_KEY, PROMPT)
TOKEN, SECRET, CLIENT = "wk-Upstre4mCanary", "ws-Upstre4mSecretCanary", "sk-Cl1entCanary"


def prompts(document: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield bodies with the prompt in every field of every route: most are refused, some are served."""
    for path in paths(document):
        payloads = Payloads(document, path, "tiny")
        for name in payloads.fields:
            for value in (
                PROMPT,
                [PROMPT],
                {PROMPT: PROMPT},
                [{"role": "user", "content": PROMPT}],
                [{"type": PROMPT}],
            ):
                if name != "model":  # a name is no content
                    yield path, json.dumps({**payloads.base, name: value}).encode()
        yield path, json.dumps(payloads.base).encode().replace(b'"Hi"', f'"{PROMPT} \\ud800"'.encode())
        yield path, f'{{"model": "tiny", "messages": "{PROMPT}'.encode()
        yield path, json.dumps({**payloads.base, "stream": True, "user": PROMPT, "max_tokens": 2**70}).encode()


def spread(target: Target, document: Mapping[str, Any]) -> None:
    """Send prompt and keys along every way on which they could stick."""
    with target.connection() as connection:
        for path, body in prompts(document):
            connection.ask(request("POST", path, {"Authorization": f"Bearer {KEY}"}, body))
        for path in ("/v1/models", "/metrics", "/v1/nope", f"/v1/models?api_key={KEY}"):
            for key in (KEY, OTHER_KEY, WRONG_KEY):
                connection.ask(request("GET", path, {"Authorization": f"Bearer {key}", "x-api-key": key}))


def files_of(directory: Path, since: float) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file that was written since."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mtime >= since:
            yield str(path), path.read_bytes()


def left_by(target: Target) -> Iterator[tuple[str, bytes]]:
    """Yield what a service shows to others than its clients: a name and a content."""
    yield "log", target.log().encode()
    for path in ("/metrics", "/metrics?model=tiny", "/v1/models", "/health", "/docs", "/openapi.json"):
        answer: Answer = target.ask("GET", path)
        yield path, answer.body
        yield f"headers of {path}", json.dumps(dict(answer.headers)).encode()
    for process in target.processes():
        yield f"command line of {process.pid}", "\0".join(process.cmdline()).encode()
        if process.pid != target.command:  # its user put the keys into its environment
            yield f"environment of {process.pid}", json.dumps(process.environ()).encode()
    for directory in target.directories:
        yield from files_of(directory, target.began)


def test_keys_and_prompts_are_left_nowhere(attacked: Target, document: Mapping[str, Any]) -> None:
    """Logs, metrics, records, command lines, environments, temporary files, state."""
    spread(attacked, document)
    found = [(name, canary) for name, content in left_by(attacked) for canary in CANARIES if canary.encode() in content]
    assert found == []


def test_key_is_found_where_it_is(attacked_gateway: Target) -> None:
    """The search sees the environment of the command, where the user put the keys."""
    assert attacked_gateway.command
    assert KEY in json.dumps(psutil.Process(attacked_gateway.command).environ())


def test_secrets_of_a_deploy_are_in_no_layer_and_no_definition(tmp_path: Path) -> None:
    """Images are built from layers that a workspace keeps, and definitions of functions are shown in its pages."""
    with ModalPlane(tmp_path) as plane:
        plane.secrets.put("vllm-api-key", {"API_KEYS": f"alice={CLIENT}"})
        plane.secrets.put("vllm-proxy-token", {"MODAL_KEY": TOKEN, "MODAL_SECRET": SECRET})
        environment = {"SERVICE_MODEL": "tiny", "API_KEYS": f"alice={CLIENT}", "HF_TOKEN": SECRET}
        for module in ("service.server", "service.gateway_app"):
            done = modal_cli(plane, "deploy", "-m", module, **environment)
            assert done.returncode == 0, done.stdout + done.stderr
            assert not any(canary in done.stdout + done.stderr for canary in (TOKEN, SECRET, CLIENT))
        functions = [plane.function(app, tag) for app, tag in ((APP, TAG), ("vllm-l4", "Server"))]
        for function in functions:
            layers = "\n".join(plane.images.layers(function.image_id)) + json.dumps(plane.images.env(function.image_id))
            for canary in (TOKEN, SECRET, CLIENT):
                assert canary not in layers
                assert canary.encode() not in function.SerializeToString()
