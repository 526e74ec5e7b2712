"""The chat: one question from a pipe, and a person on a terminal of 80 columns, with Ctrl-C at chosen moments."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from service import interrupts
from service.cli.chat import Chat, Conversation
from service.cli.gateways import Gateway
from tests.unit.cli import gateway_stub
from tests.unit.cli.gateway_stub import MODEL, Stub, ended, event
from tests.unit.cli.outputs import check_error

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "service.cli.main", "chat"]
PNG = b"\x89PNG\r\n\x1a\n"
DIM = "\x1b[2m"
WAKING = ": waking tiny on L4, 15 s, about 40 s left, position 1 of 2\n\n"
ANSWER = (event(reasoning="Let me think."), event(content="Paris."), ended(2))
_WAIT_S = 60


def environment(stub: Stub, home: Path) -> dict[str, str]:
    """Return an environment in which the chat finds the stub and nothing else."""
    return {"HOME": str(home), "PATH": os.environ["PATH"], "VLLM_GATEWAY_URL": stub.url, "TERM": "xterm"}


def piped(stub: Stub, home: Path, question: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask a question from a pipe."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(stub, home), input=question, capture_output=True, text=True,
        errors="surrogateescape", timeout=_WAIT_S, check=False,
    )  # fmt: skip


class Person:
    """A person at a terminal of 80 columns with a chat on it."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self._process, self._terminal = process, terminal
        self._seen = b""
        self._read = 0

    @property
    def seen(self) -> str:
        """All that was shown."""
        return self._seen.decode(errors="replace").replace("\r\n", "\n")

    def waits_for(self, words: str) -> None:
        """Read until these words come, after those that were waited for before."""
        deadline = time.monotonic() + _WAIT_S
        while (at := self._seen.find(words.encode(), self._read)) < 0:
            assert time.monotonic() < deadline, f"no {words!r} in {self.seen[self._read :]}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self._seen += os.read(self._terminal, 65536)
        self._read = at + len(words.encode())

    def enters(self, text: str) -> None:
        """Type at the next prompt."""
        self.waits_for("> ")
        self.types(f"{text}\r")

    def types(self, text: str) -> None:
        """Type without waiting."""
        os.write(self._terminal, text.encode())

    def interrupts(self) -> None:
        """Press Ctrl-C once it waits: what comes just before it does, `readline` notices at the next key alone."""
        stat, deadline = Path(f"/proc/{self._process.pid}/stat"), time.monotonic() + _WAIT_S
        while stat.read_text().rpartition(") ")[2][0] != "S":
            assert time.monotonic() < deadline, "it never waits"
            time.sleep(0.01)
        self._process.send_signal(signal.SIGINT)

    def ends(self) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(_WAIT_S)


@contextlib.contextmanager
def person(stub: Stub, home: Path, *arguments: str) -> Iterator[Person]:
    """Start a chat on a terminal."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(stub, home), stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        yield Person(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_piped_question_gets_the_answer_alone(tmp_path: Path) -> None:
    """Thoughts are left out; what is waited for is on standard error."""
    with gateway_stub.serving(parts=(WAKING, *ANSWER)) as stub:
        done = piped(stub, tmp_path, "What is the capital of France?\n", "--system", "Be brief.")
    assert (done.returncode, done.stdout) == (0, "Paris.\n")
    assert done.stderr == "Waking tiny on L4, 15 s, about 40 s left, position 1 of 2\n"
    assert [message["content"] for message in stub.bodies[0]["messages"]] == [
        "Be brief.",
        "What is the capital of France?",
    ]


def test_piped_question_is_answered_as_json(tmp_path: Path) -> None:
    """With thoughts, tokens, speed and cost, which the gateway tells in a comment on request."""
    with gateway_stub.serving(parts=(*ANSWER, ": cost 0.00012300 USD\n\n")) as stub:
        done = piped(stub, tmp_path, "Hi", "tiny", "--json")
    found = json.loads(done.stdout)
    assert (found["model"], found["content"], found["reasoning"]) == ("tiny", "Paris.", "Let me think.")
    assert (found["finish_reason"], found["tokens_in"], found["tokens_out"]) == ("stop", 7, 2)
    assert found["dollars"] == 0.000123
    assert stub.headers[0]["X-Report-Cost"] == "1"
    assert stub.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("question", "arguments", "code", "words"),
    [
        ("", [], 2, "Standard input is empty"),
        ("caf\udce9", [], 2, "The question is not UTF-8."),
        ("Hi", ["--url", "http://127.0.0.1:9"], 1, "vllm-service up"),
        ("Hi", ["--image", "/nowhere.png"], 1, "'/nowhere.png' cannot be read"),
        ("Hi", ["--image", "pyproject.toml"], 1, "is no picture"),
    ],
)
def test_piped_question_that_fails_prints_one_error(
    question: str, arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    """Nothing is on standard output."""
    with gateway_stub.serving() as stub:
        done = piped(stub, tmp_path, question, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    check_error(done.stderr)


def test_chat_shows_thoughts_dimmed_and_counts_the_turn(tmp_path: Path) -> None:
    """Whole words on 80 columns, the answer plain below the thoughts, then tokens, speed and cost; Ctrl-D ends."""
    long = "word " * 40
    parts = (
        event(reasoning=long),
        None,
        event(content=long),
        event(content="\x1b]0;title\x07"),
        ended(80),
        ": cost 0.25 USD\n\n",
    )
    with gateway_stub.serving(parts=parts) as stub, person(stub, tmp_path) as someone:
        someone.waits_for("llm is tiny on cpu: ready")
        someone.enters("Hi")
        someone.waits_for("word")
        time.sleep(0.1)  # an answer that came at once would have no speed
        stub.goes_on.set()
        someone.waits_for("80 tokens, ")
        someone.waits_for(" tokens/s, first token ")
        someone.waits_for(" s, $0.250000")
        someone.waits_for("> ")
        someone.types("\x04")
        assert someone.ends() == 0
    thoughts, answer = someone.seen.split("\n\n")[-2:]
    assert thoughts.count("word") == 40
    assert f"{DIM}word " in thoughts
    assert answer.split("80 tokens")[0].count("word") == 40
    shown = answer.split(f"{DIM}80 tokens")[0]
    assert DIM not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b]" not in someone.seen
    assert "\x07" not in someone.seen


def test_chat_shows_what_a_waking_pool_is_waited_for(tmp_path: Path) -> None:
    """At once what the wake costs, and then what the gateway says."""
    model = {**MODEL, "state": "cold", "gpu": "L4", "dollars_per_hour": 0.8}
    with (
        gateway_stub.serving(model=model, parts=(None, WAKING, None, *ANSWER)) as stub,
        person(stub, tmp_path) as someone,
    ):
        someone.waits_for("llm is tiny on L4: cold, $0.80/h while it is up")
        someone.enters("Hi")
        someone.waits_for("Waking tiny on L4, $0.80/h while it is up")
        stub.goes_on.set()
        someone.waits_for("Paris.")


def test_chat_keeps_the_conversation_and_its_commands(tmp_path: Path) -> None:
    """Model, system prompt and picture are in the next request; what was said is in later ones, without thoughts."""
    picture, saved, again = tmp_path / "a.png", tmp_path / "chat.md", tmp_path / "chat.json"
    picture.write_bytes(PNG)
    with gateway_stub.serving(parts=ANSWER) as stub, person(stub, tmp_path) as someone:
        someone.enters("/system Talk like a pirate.")
        someone.enters("/model tiny-l4")
        someone.waits_for("tiny-l4 is tiny")
        someone.enters("/model")
        someone.waits_for("llm")
        someone.enters(f"/image {picture}")
        someone.waits_for("With the next question: a.png")
        someone.enters("What is\\")
        someone.types("this?\r")
        someone.enters("And that?")
        someone.enters(f"/save {saved}")
        someone.enters(f"/save {again}")
        someone.enters(f"/save {saved}")
        someone.waits_for("cannot be written: File exists")
        someone.enters("/foo")
        someone.waits_for("'/foo' is no command")
        someone.enters("/help")
        someone.waits_for("/clear")
        someone.enters("/clear")
        someone.enters("Anew?")
        someone.enters("/quit")
        assert someone.ends() == 0
    first, second, third = stub.bodies
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    asked = [{"type": "text", "text": "What is\nthis?"}, {"type": "image_url", "image_url": {"url": url}}]
    system = {"role": "system", "content": "Talk like a pirate."}
    assert first["model"] == "tiny-l4"
    assert first["messages"] == [system, {"role": "user", "content": asked}]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And that?"},
    ]
    assert third["messages"] == [system, {"role": "user", "content": "Anew?"}]
    text = saved.read_text()
    assert text.startswith(
        "# tiny-l4\n\n## system\n\nTalk like a pirate.\n\n## user\n\nWhat is\nthis?\n\n(a picture)\n"
    )
    conversation: dict[str, Any] = json.loads(again.read_text())
    assert conversation["messages"] == [*second["messages"], {"role": "assistant", "content": "Paris."}]


def _stops_an_answer_and_goes_on(someone: Person, stub: gateway_stub.Stub) -> None:
    """Press Ctrl-C in the first answer, and wait for the second one to end."""
    someone.enters("Tell me a story.")
    someone.waits_for("Once")
    someone.interrupts()
    someone.waits_for("stopped")
    stub.goes_on.set()
    someone.enters("Go on.")
    someone.waits_for("2 tokens")
    someone.waits_for("> ")


def test_chat_ctrl_c_stops_the_answer_and_a_second_one_ends(tmp_path: Path) -> None:
    """What came until then stays part of the conversation, and the connection is closed."""
    with (
        gateway_stub.serving(parts=(event(content="Once upon"), None, *ANSWER)) as stub,
        person(stub, tmp_path) as someone,
    ):
        _stops_an_answer_and_goes_on(someone, stub)
        someone.interrupts()
        someone.waits_for("Ctrl-C again ends")
        someone.waits_for("> ")
        someone.interrupts()
        assert someone.ends() == 130
    assert stub.bodies[1]["messages"][1:] == [
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "Go on."},
    ]
    assert "Traceback" not in someone.seen


def test_chat_that_goes_on_after_ctrl_c_ends_as_one_without_it(tmp_path: Path) -> None:
    """An answer was stopped; Ctrl-D then ends it with 0."""
    with (
        gateway_stub.serving(parts=(event(content="Once upon"), None, *ANSWER)) as stub,
        person(stub, tmp_path) as someone,
    ):
        _stops_an_answer_and_goes_on(someone, stub)
        someone.types("\x04")
        assert someone.ends() == 0


def test_chat_ctrl_c_at_the_prompt_is_handled_unless_it_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first empties the line, and the second is the one that counts."""

    def pressed(_prompt: str) -> str:
        monkeypatch.setattr(interrupts._Interrupts, "came", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    chat = Chat(Gateway("http://127.0.0.1:9", ""), Conversation("tiny"))
    assert (chat._read(), interrupts.came()) == ("", False)
    with pytest.raises(KeyboardInterrupt):
        chat._read()
    assert interrupts.came()


def test_chat_error_of_the_gateway_does_not_end_it(tmp_path: Path) -> None:
    """The question is taken back: the next request has it no more."""
    failed = 'data: {"error": {"message": "The engine died."}}\n\n'
    with gateway_stub.serving(parts=(failed,)) as stub, person(stub, tmp_path) as someone:
        someone.enters("Hi")
        someone.waits_for("The engine died")
        stub.parts = ANSWER
        someone.enters("Again")
        someone.waits_for("Paris.")
    assert [message["content"] for message in stub.bodies[1]["messages"]] == ["Again"]


def test_chat_on_a_terminal_has_no_json(tmp_path: Path) -> None:
    """The error says how it is meant."""
    with gateway_stub.serving() as stub, person(stub, tmp_path, "--json") as someone:
        someone.waits_for("vllm-service chat --json")
        assert someone.ends() == 2
