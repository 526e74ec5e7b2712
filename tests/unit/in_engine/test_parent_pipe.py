"""The engine's end of the pipes, in a process of its own: words in, events out, and the end of the parent."""

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
from vllm_service import parent_pipe as control

def show(what):
    os.write(1, (json.dumps(what) + "\\n").encode())

link = control.current()
link.on_drain = show
show([control.current() is link, "ENGINE_PIPES" in os.environ])
show(link.wait_for_release())
link.tell("event", number=1)
child = os.fork()
if not child:
    show(control.current())
    os._exit(0)
os.waitpid(child, 0)
show([os.get_inheritable(int(fd)) for fd in sys.argv[1].split(",")])
sys.stdin.readline()
"""


class Engine:
    """A process with nothing but the control in it."""

    def __init__(self) -> None:
        words, self.words = os.pipe()
        self.events, events = os.pipe()
        pipes = f"{words},{events}"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", PROGRAM, pipes],
            env={"PYTHONPATH": str(IN_ENGINE), "ENGINE_PIPES": pipes},
            pass_fds=(words, events),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(words)
        os.close(events)
        assert self.heard() == [True, False]  # one control; no child of it could take the pipes for its own

    def say(self, *words: dict[str, Any]) -> None:
        """Say words, all at once."""
        os.write(self.words, "".join(json.dumps(word) + "\n" for word in words).encode())

    def heard(self) -> Any:
        """Return what the process tells next."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def hang_up(self) -> int:
        """Close the words' pipe, as a parent's death does; return how the process ended."""
        os.close(self.words)
        self.words = -1
        return self.process.wait(10)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Return a process with a control; it is gone after the test."""
    started = Engine()
    yield started
    started.process.kill()
    started.process.communicate(timeout=10)
    for fd in {started.words, started.events} - {-1}:
        os.close(fd)


def test_release_hands_over_all_that_it_carried(engine: Engine) -> None:
    """The digests of the keys are in no command line, variable or snapshot."""
    word = {"word": "release", "digests": ["ab" * 32]}
    engine.say(word)

    assert engine.heard() == word


def test_event_carries_its_name_its_time_and_its_fields(engine: Engine) -> None:
    """As one line of JSON, in one write."""
    engine.say({"word": "release"})
    event = json.loads(os.read(engine.events, 65536))

    assert (event.pop("event"), event.pop("number")) == ("event", 1)
    assert list(event) == ["at"]


def test_drain_comes_before_and_after_the_release(engine: Engine) -> None:
    """Each word goes its own way; a drain ends no hold."""
    engine.say({"word": "drain", "grace_s": 1.5}, {"word": "release"})
    assert engine.heard() == {"word": "drain", "grace_s": 1.5}
    assert engine.heard() == {"word": "release"}
    assert [engine.heard(), engine.heard()] == [None, [False, False]]
    engine.say({"word": "drain", "grace_s": 0})

    assert engine.heard() == {"word": "drain", "grace_s": 0}


def test_word_in_pieces_is_put_together(engine: Engine) -> None:
    """A pipe keeps bytes, not lines."""
    for piece in (b'{"word": "rel', b'ease", "digests"', b': ["x"]}', b"\n"):
        os.write(engine.words, piece)

    assert engine.heard() == {"word": "release", "digests": ["x"]}


def test_word_longer_than_a_read_is_put_together(engine: Engine) -> None:
    """A thousand keys are more than a pipe holds at once."""
    word = {"word": "release", "digests": ["ab" * 32] * 2000}
    data = (json.dumps(word) + "\n").encode()
    while data:
        data = data[os.write(engine.words, data) :]

    assert engine.heard() == word


def test_word_of_another_version_is_passed_over(engine: Engine) -> None:
    """What is not known ends nothing and holds up nothing."""
    engine.say({"word": "dance"}, {"word": "release", "digests": []})

    assert engine.heard() == {"word": "release", "digests": []}


def test_control_of_a_forked_child_is_none_and_passes_to_no_program(engine: Engine) -> None:
    """The engine core must neither take the parent's words nor keep the events' pipe open in what it starts."""
    engine.say({"word": "release"})
    engine.heard()

    assert engine.heard() is None
    assert engine.heard() == [False, False]


@pytest.mark.parametrize("released", [False, True])
def test_end_of_the_words_kills_the_group(engine: Engine, released: bool) -> None:
    """The parent is gone: nothing may go on holding a GPU that nobody watches."""
    if released:
        engine.say({"word": "release"})
        engine.heard()

    assert engine.hang_up() == -signal.SIGKILL
