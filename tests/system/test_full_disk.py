"""A full disk under the state directory: the real service on a file system of 64 KB without a free byte."""

from __future__ import annotations

import signal
from pathlib import Path

import requests

from tests.engine.running import GONE_S, Service
from tests.system import programs

_FILL = 'mount -t tmpfs -o size=64k tmpfs "$XDG_STATE_HOME" && ! head -c 1m /dev/zero 2>&- >"$XDG_STATE_HOME/fill"'


def test_service_with_a_full_state_disk_serves_and_ends_with_0(engine_environment: None, tmp_path: Path) -> None:
    """On SIGTERM too; what could not be kept is told in sentences."""
    state = tmp_path / "state"
    state.mkdir()
    private = [programs.find("unshare"), "--map-root-user", "--mount"]
    prefix = [*private, "sh", "-c", f'{_FILL}; exec "$@"', "sh"]
    with Service(tmp_path, "tiny", prefix=prefix, XDG_STATE_HOME=str(state)) as service:
        service.wait_ready()
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
        assert requests.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 200
        service.signal(signal.SIGTERM)
        assert service.wait_ended(10 * GONE_S) == 0, service.story
        assert "Traceback" not in service.out + service.err
        assert "No space left" in service.err, service.err
        assert "The ledger cannot be written" in service.err, service.err
        assert "1 records of requests were not written to the ledger and are lost." in service.err, service.err
