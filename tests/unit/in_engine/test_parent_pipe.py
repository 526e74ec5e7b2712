"""The engine's end of the pipes, in a process of its own: commands in, events out, and the end of the parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from service.engine.args import IN_ENGINE

PROGRAM = """
import json, os, sys
from vllm_service import parent_pipe

def show(what):
    os.write(1, (json.dumps(what) + "\\n").encode())

pipe = parent_pipe.current()
pipe.on_drain = show
show([parent_pipe.current() is pipe, "ENGINE_PIPES" in os.environ])
show(pipe.wait_for_release())
pipe.emit("event", number=1)
child = os.fork()
if not child:
    show(parent_pipe.current())
    os._exit(0)
os.waitpid(child, 0)
show([os.get_inheritable(int(fd)) for fd in sys.argv[1].split(",")])
sys.stdin.readline()
"""


class Engine:
    """A process with nothing but the parent pipe in it."""

    def __init__(self) -> None:
        commands, self.commands = os.pipe()
        self.events, events = os.pipe()
        pipes = f"{commands},{events}"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", PROGRAM, pipes],
            env={"PYTHONPATH": str(IN_ENGINE), "ENGINE_PIPES": pipes},
            pass_fds=(commands, events),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(commands)
        os.close(events)
        assert self.heard() == [True, False]  # one parent pipe; no child could take the pipes for its own

    def send(self, *commands: dict[str, Any]) -> None:
        """Send commands, all at once."""
        os.write(self.commands, "".join(json.dumps(command) + "\n" for command in commands).encode())

    def heard(self) -> Any:
        """Return what the process writes next."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def hang_up(self) -> int:
        """Close the commands' pipe, as a parent's death does; return how the process ended."""
        os.close(self.commands)
        self.commands = -1
        return self.process.wait(10)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Return a process with a parent pipe; it is killed after the test."""
    started = Engine()
    yield started
    started.process.kill()
    started.process.communicate(timeout=10)
    for fd in {started.commands, started.events} - {-1}:
        os.close(fd)


def test_release_hands_over_all_that_it_carried(engine: Engine) -> None:
    """The digests of the keys are in no command line, variable or snapshot."""
    command = {"command": "release", "digests": ["ab" * 32]}
    engine.send(command)

    assert engine.heard() == command


def test_event_carries_its_name_its_time_and_its_fields(engine: Engine) -> None:
    """As one line of JSON, in one write."""
    engine.send({"command": "release"})
    event = json.loads(os.read(engine.events, 65536))

    assert (event.pop("event"), event.pop("number")) == ("event", 1)
    assert list(event) == ["at"]


def test_drain_comes_before_and_after_the_release(engine: Engine) -> None:
    """Each command goes to its own handler; a drain ends no hold."""
    engine.send({"command": "drain", "grace_s": 1.5}, {"command": "release"})
    assert engine.heard() == {"command": "drain", "grace_s": 1.5}
    assert engine.heard() == {"command": "release"}
    assert [engine.heard(), engine.heard()] == [None, [False, False]]
    engine.send({"command": "drain", "grace_s": 0})

    assert engine.heard() == {"command": "drain", "grace_s": 0}


def test_command_in_pieces_is_put_together(engine: Engine) -> None:
    """A pipe keeps bytes, not lines."""
    for piece in (b'{"command": "rel', b'ease", "digests"', b': ["x"]}', b"\n"):
        os.write(engine.commands, piece)

    assert engine.heard() == {"command": "release", "digests": ["x"]}


def test_command_longer_than_a_read_is_put_together(engine: Engine) -> None:
    """A thousand keys are more than a pipe holds at once."""
    command = {"command": "release", "digests": ["ab" * 32] * 2000}
    data = (json.dumps(command) + "\n").encode()
    while data:
        data = data[os.write(engine.commands, data) :]

    assert engine.heard() == command


def test_command_that_is_unknown_is_ignored(engine: Engine) -> None:
    """It ends nothing and delays nothing."""
    engine.send({"command": "dance"}, {"command": "release", "digests": []})

    assert engine.heard() == {"command": "release", "digests": []}


def test_parent_pipe_of_a_forked_child_is_none_and_passes_to_no_program(engine: Engine) -> None:
    """The engine core must neither read the parent's commands nor keep the events' pipe open in what it starts."""
    engine.send({"command": "release"})
    engine.heard()

    assert engine.heard() is None
    assert engine.heard() == [False, False]


@pytest.mark.parametrize("released", [False, True])
def test_end_of_the_commands_kills_the_group(engine: Engine, released: bool) -> None:
    """When the parent has ended, no process may hold a GPU without a parent that watches it."""
    if released:
        engine.send({"command": "release"})
        engine.heard()

    assert engine.hang_up() == -signal.SIGKILL
