"""Signals as terminals, shells, supervisors and containers send them, with a stream in flight."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import requests

from service.engine.shutdown import LOCAL_SHUTDOWN
from tests.engine.dialogues import TINY, dialogue
from tests.engine.running import GONE_S, Service, wait_until
from tests.engine.streams import LONGEST, LONGEST_SETTINGS, check_whole, count_to_ninety, stream

from .services import FirstProcess, InTerminal

pytestmark = pytest.mark.usefixtures("engine_environment")
HANG_S = 10


def family(service: Service) -> list[int]:
    """Return the processes of a service, its own first."""
    return [service.pid, *(process.pid for process in psutil.Process(service.pid).children(recursive=True))]


def send(pids: list[int], number: int) -> float:
    """Send a signal to each of these processes, and return when the first got it: its effects count from then."""
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, number)
    return began


def check_gone(service: Service, asked: float) -> None:
    """Insist that a service ended in time, with code 0, and left no process."""
    assert service.wait_ended(GONE_S) == 0, service.story
    service.wait_gone(asked + GONE_S)


def test_terminal_that_is_closed_lets_a_stream_finish(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and whatever the service shows from then on cannot be written."""
    with InTerminal(tmp_path, "tiny") as service:
        service.wait_ready().engine()
        with stream(service) as events:
            count_to_ninety(events)
            asked = time.monotonic()
            service.close_terminal()
            check_whole(list(events))
        check_gone(service, asked)


def test_interrupt_by_a_terminal_lets_a_stream_finish(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal's foreground; the engine is in a session of its own."""
    with InTerminal(tmp_path, "tiny") as service:
        service.wait_ready().engine()
        with stream(service) as events:
            count_to_ninety(events)
            asked = time.monotonic()
            service.type(b"\x03")
            check_whole(list(events))
        check_gone(service, asked)


def test_service_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    """SIGHUP reloads, and the engine ignores it; a wrong models file is refused, and the old one stays."""
    models = tmp_path / "models.toml"
    models.write_text(entry := f'[models.second]\npath = "{TINY}"\n')
    with Service(tmp_path, "tiny", prefix=["nohup"], SERVICE_MODELS_FILE=str(models)) as service:
        service.wait_ready().engine()
        models.write_text(entry.replace("second", "third"))
        send(family(service), signal.SIGHUP)
        with stream(service) as events:
            check_whole(list(events))
        wait_until(lambda: "third" in names(service), HANG_S)
        assert "second" not in names(service)
        models.write_text("[models.")
        service.signal(signal.SIGHUP)
        wait_until(lambda: "Nothing was reloaded" in service.story, HANG_S)
        assert "third" in names(service)
        assert all(ignores_hang_up(pid) for pid in family(service) if pid != service.pid)
        check_gone(service, service.signal(signal.SIGTERM))


def names(service: Service) -> set[str]:
    """Return the names of the models that a service has."""
    return {model["id"] for model in requests.get(f"{service.url}/v1/models", timeout=30).json()["data"]}


def ignores_hang_up(pid: int) -> bool:
    """Tell whether a process ignores or blocks SIGHUP."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [int(mask, 16) for mask in re.findall(r"^Sig(?:Ign|Blk):\t(\w+)$", status, re.M)]
    return any(mask & 1 << (signal.SIGHUP - 1) for mask in masks)


def test_signals_to_every_process_at_once_leave_a_stream_its_whole_grace(tmp_path: Path) -> None:
    """As systemd ends a service (KillMode=control-group, then SIGHUP by SendSIGHUP): the engine outlives the drain."""
    with Service(tmp_path, "tiny", **LONGEST_SETTINGS) as service:
        service.wait_ready().engine()
        with stream(service, **LONGEST) as events:
            for _ in range(20):  # one alone ends an engine that heeds it in half of all cases
                send([process.pid for process in service.engine()], signal.SIGTERM)
            asked = send(family(service), signal.SIGTERM)
            send(family(service), signal.SIGHUP)
            *_, error, done = events
            took_s = time.monotonic() - asked
        check_gone(service, asked)
    assert (json.loads(error)["error"]["code"], done) == ("shutting_down", "[DONE]")
    assert took_s >= LOCAL_SHUTDOWN.drain_s


def test_first_process_of_a_container_lets_a_stream_finish(tmp_path: Path) -> None:
    """`docker stop` sends SIGTERM to it, and the kernel delivers none that has no handler."""
    with FirstProcess(tmp_path, "tiny") as service:
        service.wait_ready().engine()
        with stream(service) as events:
            count_to_ninety(events)
            asked = service.signal(signal.SIGTERM)
            check_whole(list(events))
        check_gone(service, asked)


def test_core_of_an_engine_that_is_killed_together_with_its_service_ends(tmp_path: Path) -> None:
    """It is idle, and nobody is left to tell it."""
    with Service(tmp_path, "tiny") as service:
        service.wait_ready()
        leader, members = service.leader(), service.engine()
        send([service.pid, leader.pid], signal.SIGKILL)
        wait_until(lambda: not any(alive(member) for member in members), GONE_S)


def alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_service_that_was_paused_for_longer_than_the_watchdog_waits_goes_on(tmp_path: Path) -> None:
    """`docker pause` stops every process, or an operator the service alone: the stream goes on where it was."""
    with Service(tmp_path, "tiny", SERVICE_HANG_S=str(HANG_S)) as service:
        service.wait_ready().engine()
        for pids in (family(service), [service.pid]):
            with stream(service) as events:
                count_to_ninety(events)
                send(pids, signal.SIGSTOP)
                time.sleep(HANG_S + 1)
                send(pids, signal.SIGCONT)
                check_whole(list(events))
        answer = requests.post(f"{service.url}/v1/chat/completions", json=dialogue("capital").request, timeout=30)
        assert answer.status_code == 200, answer.text
        check_gone(service, service.signal(signal.SIGTERM))
