"""A fake engine: speaks the real pipe protocol and answers `/health`, with no vLLM behind it.

Run in the place of `python -m vllm_service.main <arguments of vllm serve>`. What it does wrong is scripted in the
variable VLLM_CPU_FAKE_ENGINE, a JSON object; a key, a step or a flag that it does not know ends it with code 64.

    output          lines written at the start
    die_at, code    step at which it ends, and how: an exit code, or a negative signal number
    last_lines      lines written just before that end
    hang_at         step that it never gets past; "heartbeat": it listens, and emits no heartbeat
    only            hold ("", "imported", "asleep") under which alone it dies or hangs; by default under each
    ignore_sigterm  true: only SIGKILL ends it
    grandchild      true: start a process of the same group that ignores SIGTERM, and write `grandchild <pid>`
    different       true: the canary after waking is another
    in_flight       true: a request runs that never ends; it is cancelled when the grace of a drain is over
    temporary       true: it makes a socket and a directory for temporary files, as vLLM does, and removes neither
    health          answers given to /health before 200: status codes, or "garbage" for what is no HTTP

`GET /die?<code>` makes a listening fake end like `die_at` does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from vllm_service import end_signals, parent_pipe
from vllm_service.events import Event

STEPS = (
    *(
        "start",
        "imported",
        "released",
        "building",
        "loaded",
        "canary",
        "asleep",
        "awake",
        "woken",
        "opening",
        "listening",
    ),
)
KEYS = {
    *("output", "die_at", "code", "last_lines", "hang_at", "ignore_sigterm", "grandchild", "different", "in_flight"),
    *("health", "only", "temporary"),
}
HOLDS = ("", "imported", "asleep")
HEARTBEAT_S = 0.05
FLAGS = {
    *("--model", "--served-model-name", "--host", "--port", "--middleware", "--shutdown-timeout", "--max-model-len"),
    *("--disable-access-log-for-endpoints", "--enforce-eager", "--no-enforce-eager", "--distributed-executor-backend"),
    *("--tensor-parallel-size", "--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser"),
    *("--exclude-tools-when-tool-choice-none", "--worker-extension-cls"),
    *("--kv-cache-memory-bytes", "--max-num-seqs", "--max-num-batched-tokens"),
    *("--enable-sleep-mode", "--safetensors-load-strategy"),
}
REFUSED = 64
SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"


def say(text: str) -> None:
    """Write a line to the log."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def refuse(what: str) -> NoReturn:
    """End because the caller asked for something this fake does not know."""
    say(f"the fake engine does not know {what}")
    sys.exit(REFUSED)


class Fake:
    """One run of the script."""

    def __init__(self, script: dict[str, Any], host: str, port: int) -> None:
        self.script, self.host, self.port = script, host, port
        self.answers = list(script.get("health", []))

    def die(self, code: int) -> NoReturn:
        """End with this code, or by this signal when it is negative."""
        for line in self.script.get("last_lines", []):
            say(line)
        if code < 0:
            os.kill(os.getpid(), -code)
            time.sleep(60)
        os._exit(code)

    def step(self, name: str) -> None:
        """Pass a step, unless the script says otherwise."""
        if self.script.get("hang_at") == name:
            time.sleep(300)
        if self.script.get("die_at") == name:
            self.die(self.script.get("code", 1))

    def run(self, pipe: parent_pipe.ParentPipe, hold: str) -> None:
        """Go through the steps that main.py and startup_plugin.py have."""
        pipe.emit(Event.STARTED, pid=os.getpid())
        for line in self.script.get("output", []):
            say(line)
        if self.script.get("grandchild"):
            child = subprocess.Popen([sys.executable, "-S", "-c", SLEEPER], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            say(f"grandchild {child.pid}")
        self.step("start")
        pipe.emit(Event.IMPORTED)
        self.step("imported")
        if hold == "imported":
            self.await_release(pipe)
        if self.script.get("temporary"):
            self.litter(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - where tempfile looks, whose import is slow
        for event in (Event.BUILDING, Event.LOADED):
            pipe.emit(event)
            self.step(event)
        if hold == "asleep":
            pipe.emit(Event.WARMED, failures=[])
        pipe.emit(Event.CANARY, tokens=[1, 2, 3])
        self.step("canary")
        if hold == "asleep":
            pipe.emit(Event.ASLEEP)
            self.step("asleep")
        if hold != "imported":
            self.await_release(pipe)
        if hold == "asleep":
            pipe.emit(Event.AWAKE)
            self.step("awake")
            self.wake(pipe)
        pipe.on_drain = lambda command: self.drain(pipe, command["grace_s"], command["cancel_s"])
        pipe.on_terminate = end_signals.end
        argv = sys.argv[1:]
        length = int(argv[argv.index("--max-model-len") + 1]) if "--max-model-len" in argv else None
        pipe.emit(Event.OPENING, max_model_len=length)
        self.step("opening")
        if self.script.get("hang_at") != "heartbeat":
            threading.Thread(target=self.beat, args=(pipe,), daemon=True).start()
        self.listen()

    def litter(self, place: str) -> None:
        """Leave what a killed vLLM leaves: the socket between its processes, and a directory of a compiler's."""
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(f"{place}/{os.getpid()}-socket")
        os.mkdir(f"{place}/{os.getpid()}-directory")  # noqa: PTH102 - nor pathlib

    def wake(self, pipe: parent_pipe.ParentPipe) -> None:
        """Generate the canary again, and end when it is another."""
        different = "token 1 is 9 instead of 1" if self.script.get("different") else None
        pipe.emit(Event.WOKEN, tokens=[9 if different else 1, 2, 3], different=different)
        if different:
            say("Traceback (most recent call last):")
            say(f"RuntimeError: The canary after waking is not the one before sleeping: {different}.")
            self.die(1)
        self.step("woken")

    def beat(self, pipe: parent_pipe.ParentPipe) -> None:
        """Emit heartbeats for ever."""
        while True:
            time.sleep(HEARTBEAT_S)
            pipe.emit(Event.HEARTBEAT)

    def drain(self, pipe: parent_pipe.ParentPipe, grace_s: float, cancel_s: float) -> None:
        """Report that nothing is in flight any more: at once, or when the grace is over."""
        say(f"drain {json.dumps({'grace_s': grace_s, 'cancel_s': cancel_s})}")
        cancelled = 1 if self.script.get("in_flight") else 0
        time.sleep(grace_s * cancelled)
        pipe.emit(Event.DRAINED, cancelled=cancelled)

    def await_release(self, pipe: parent_pipe.ParentPipe) -> None:
        """Block until the parent releases it, and write the command."""
        say(f"release {json.dumps(pipe.wait_for_release())}")
        self.step("released")

    def listen(self) -> NoReturn:
        """Answer /health one connection at a time, for ever."""
        with socket.create_server((self.host, self.port)) as server:
            self.step("listening")
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(self.answer(connection.recv(65536).decode().split(" ")[1]))

    def answer(self, path: str) -> bytes:
        """Return the whole answer to a request for `path`."""
        if path.startswith("/die?"):
            self.die(int(path.partition("?")[2]))
        if path != "/health":
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        answer = self.answers.pop(0) if self.answers else 200
        if answer == "garbage":
            return b"220 this is a mail server\r\n"
        return f"HTTP/1.1 {answer} Scripted\r\nX-Engine-Pid: {os.getpid()}\r\nContent-Length: 0\r\n\r\n".encode()


def main() -> None:
    """Check what was asked for, then run."""
    program, arguments = sys.argv[1:3], sys.argv[3:]
    flags = {argument for argument in arguments if argument.startswith("--")}
    if program != ["-m", "vllm_service.main"] or not {"--host", "--port"} <= flags <= FLAGS:
        refuse(f"the arguments {sys.argv[1:]}")
    script = json.loads(os.environ.get("VLLM_CPU_FAKE_ENGINE", "{}"))
    if unknown := set(script) - KEYS:
        refuse(f"the key {sorted(unknown)[0]}")
    for key in ("die_at", "hang_at"):
        if script.get(key, STEPS[0]) not in {*STEPS, "heartbeat"}:
            refuse(f"the step {script[key]}")
    hold = os.environ.get("ENGINE_HOLD", "")
    for known in (hold, script.get("only", hold)):
        if known not in HOLDS:
            refuse(f"the hold {known}")
    if script.get("only", hold) != hold:
        script = {key: value for key, value in script.items() if key not in {"die_at", "hang_at"}}
    end_signals.block()
    pipe = parent_pipe.current()
    if pipe is None:
        refuse("a start without pipes")
    if script.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    host, port = (arguments[arguments.index(flag) + 1] for flag in ("--host", "--port"))
    Fake(script, host, int(port)).run(pipe, hold)


if __name__ == "__main__":
    main()
