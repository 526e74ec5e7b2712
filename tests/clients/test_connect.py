"""Programs that `vllm-service connect` alone has connected, each in an empty home: they answer through the gateway.

Those of agents are in test_agents.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from tests.engine.running import REPOSITORY, Service, free_port

from . import client_env
from .clients import COUNT, KEY, LiteLLM, bearer, environment, logged
from .programs import connected

_START_S = 400  # 20 s of processor time; the machine of a test is not always idle
_POLL_S = 0.5  # it answers in its own event loop, which is busy
_CLIENTS = """
import os
from anthropic import Anthropic
from openai import OpenAI

messages = [{"role": "user", "content": "What is the capital of France?"}]
for client in (OpenAI(), OpenAI(base_url=os.environ["LLM_BASE_URL"], api_key=os.environ["LLM_API_KEY"])):
    print(client.chat.completions.create(model="llm", messages=messages).choices[0].message.content)
model = os.environ["ANTHROPIC_MODEL"]
print(Anthropic().messages.create(model=model, max_tokens=500, messages=messages).content[-1].text)
"""
_NOWHERE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
_NOWHERE |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")


def test_connect_env_connects_clients_of_openai_and_anthropic(served: Service, tmp_path: Path) -> None:
    """They read their own variables; the seeds' two say the same. The key is the shell's own."""
    exports = connected(tmp_path, "env", VLLM_GATEWAY_URL=served.url, VLLM_API_KEY=KEY)
    script = f'eval "$EXPORTS"; exec {client_env.bin_directory() / "python"} -c "$PROGRAM"'
    given = environment(HOME=str(tmp_path), VLLM_API_KEY=KEY, EXPORTS=exports, PROGRAM=_CLIENTS, **_NOWHERE)
    done = subprocess.run(
        ["sh", "-euc", script], env=given, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n" * 3


def test_chat_from_a_pipe_answers_through_the_gateway(served: Service, tmp_path: Path) -> None:
    """The answer alone, and as JSON with its tokens; a machine of one's own costs nothing."""
    command = [sys.executable, "-m", "service.cli.main", "chat"]
    given = environment(HOME=str(tmp_path), VLLM_GATEWAY_URL=served.url, VLLM_API_KEY=KEY)
    question = "What is the capital of France?"
    run = functools.partial(
        subprocess.run, cwd=REPOSITORY, env=given, input=question, capture_output=True, text=True, timeout=120
    )
    assert run(command, check=True).stdout == "The capital of France is Paris.\n"
    found = json.loads(run([*command, "tiny", "--json"], check=True).stdout)
    assert (found["content"], found["finish_reason"]) == ("The capital of France is Paris.", "stop")
    assert found["tokens_out"] == 10
    assert found["dollars"] is None


def test_connect_litellm_connects_its_proxy(served: Service, tmp_path: Path) -> None:
    """With the gateway's URL in the file and the key in its environment; a stream, as `hosted_vllm`."""
    models = Path(served.environment["SERVICE_MODELS_FILE"])
    with LiteLLM(tmp_path, served.url, models, ("connect", "litellm"), **_NOWHERE) as proxy:
        assert f"api_base: {served.url}/v1" in proxy.config
        answer = requests.post(
            f"{proxy.url}/v1/chat/completions",
            json={"model": "llm", **COUNT.request},
            headers=bearer(proxy.MASTER_KEY),
            timeout=60,
        )
    assert answer.ok, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == COUNT.content


@contextlib.contextmanager
def open_webui(home: Path, exports: str) -> Iterator[str]:
    """Run Open WebUI with these exports; yields its URL. It needs no account, and reaches no other machine."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    own = {"WEBUI_AUTH": "False", "DATA_DIR": str(home / "data"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    given = environment(HOME=str(home), VLLM_API_KEY=KEY, EXPORTS=exports, **own, **_NOWHERE)
    program = client_env.openwebui() / "open-webui"
    command = ["sh", "-euc", f'eval "$EXPORTS"; exec {program} serve --host 127.0.0.1 --port {port}']
    log = home / "open-webui.log"
    with log.open("wb") as out, subprocess.Popen(command, env=given, cwd=home, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + _START_S
            while not _is_up(url):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(_POLL_S)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _is_up(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=5).ok
    return False


def test_connect_openwebui_connects_it(served: Service, tmp_path: Path) -> None:
    """It lists the gateway's models, and passes a chat and a stream on, as its page in a browser has it do."""
    exports = connected(tmp_path, "openwebui", VLLM_GATEWAY_URL=served.url, VLLM_API_KEY=KEY)
    before = len(logged(served, "clients", 0))
    with open_webui(tmp_path, exports) as url:
        session = requests.post(f"{url}/api/v1/auths/signin", json={"email": "", "password": ""}, timeout=60).json()
        headers = bearer(session["token"])
        models = requests.get(f"{url}/api/models", headers=headers, timeout=60).json()["data"]
        assert {"llm", "tiny"} <= {model["id"] for model in models}
        asked = {"model": "tiny", "messages": COUNT.request["messages"]}
        whole = requests.post(f"{url}/api/chat/completions", json=asked, headers=headers, timeout=120)
        assert whole.ok, whole.text
        assert whole.json()["choices"][0]["message"]["content"] == COUNT.content
        streamed = requests.post(
            f"{url}/api/chat/completions", json={**asked, "stream": True}, headers=headers, timeout=120
        )
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ())]
    assert "".join(pieces) == COUNT.content
    lines = logged(served, "clients", before + 2)[before:]
    assert {(line["path"], line["status"]) for line in lines} >= {("/v1/chat/completions", 200), ("/v1/models", 200)}
