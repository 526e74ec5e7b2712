"""`vllm-service deploy` ended by Ctrl-C at ten random moments, and completed by the same command."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from pathlib import Path

from tests.contract.commands import run, started
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

DEPLOY = ("deploy", "tiny", "--gpu", "L4", "--yes")
MOMENTS = 10
FIRST_CALLS, CALLS = 400, 110  # of the first deploy to an empty account, and of one that publishes both apps again
END_S = 60  # from Ctrl-C to the end of the command
LAST_LINE = "Stopped. What was finished is kept; the same command goes on from there."


def ended_after(plane: ModalPlane, calls: int, **environment: str) -> tuple[int, str]:
    """Deploy, press Ctrl-C when the plane has seen so many calls of it; return exit code and all that was printed."""
    before = len(plane.transcript)
    with started(plane, *DEPLOY, **environment) as process:
        plane.wait_until(
            lambda: len(plane.transcript) >= before + calls or process.poll() is not None, 120, f"{calls} calls"
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=END_S)
    assert "Traceback" not in err
    if process.returncode == -signal.SIGINT:  # all is done and printed, and the interpreter is ending
        assert "vllm-service connect" in out, out + err
        return 0, out + err
    return process.returncode, out + err


def test_deploy_ended_at_ten_random_moments_is_completed_by_the_same_command(tmp_path: Path) -> None:
    """Exit code 130 each time; in the end one token, both secrets, one key that was shown once, and both apps."""
    chance = random.Random(14)  # noqa: S311 - moments, not keys
    runtime = ContainerRuntime(client_path=client_directory(tmp_path / "client"))
    with ModalPlane(tmp_path / "plane", container=runtime) as plane:
        codes, said = [], ""
        for number in range(MOMENTS):  # the settings change, so that each deploy publishes both apps
            calls = chance.randrange(1, CALLS if number else FIRST_CALLS)
            code, text = ended_after(plane, calls, SERVICE_MAX_INPUTS=str(10 + number))
            codes.append(code)
            said += text
            assert code == 0 or text.splitlines()[-1] == LAST_LINE or "shown once: sk-" in text, text
        assert set(codes) <= {130, 0}
        assert codes.count(130) >= MOMENTS - 2, codes
        last: subprocess.CompletedProcess[str] = run(plane, *DEPLOY, SERVICE_MAX_INPUTS=str(9 + MOMENTS))
        assert last.returncode == 0, last.stderr
        shown = set(re.findall(r"sk-[\w-]{40,}", said + last.stdout + last.stderr))
        assert len(shown) == 1
        assert len(plane.proxy_tokens.keys()) == 1
        assert {"vllm-api-key", "vllm-proxy-token"} <= set(plane.secrets.names())
        assert {name for name, app in plane.apps.items() if app.is_deployed} == {"vllm-l4", "vllm-gateway"}
        inputs = plane.images.env(plane.function("vllm-l4", "Server").image_id)["SERVICE_MAX_INPUTS"]
        assert inputs == str(9 + MOMENTS)
        again = run(plane, *DEPLOY, "--dry-run", SERVICE_MAX_INPUTS=inputs)
        assert "Nothing has changed." in again.stdout
        assert plane.failures == []
