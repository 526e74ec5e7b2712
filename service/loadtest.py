"""Only wiring to Modal: `modal run -m service.loadtest` runs the users of a load test in a container at Modal.

There the way to the service is short, and the processors are not this machine's. The key of VLLM_API_KEY goes into a
secret of this run alone; the report comes back and is printed here.
"""
# No `from __future__ import annotations`: Modal's command reads the annotations as types.

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import modal

from service.benchmarks import locust_run, report, text
from service.errors import ServiceError, UsageError
from service.files import require_writable
from service.image import light_image
from service.modal_app import load_options
from service.modal_app.gateway_access import KEY_VARIABLE, api_key, base_url
from service.modal_app.measured_service import MeasuredService, check_answered, write_page
from service.settings import Settings

CPU = 4.0  # a process of Locust each
MARGIN_S = 300  # of the container's time, beside the longest test

app = modal.App("vllm-loadtest")


@app.function(
    image=light_image(locust_run.LOCK),
    secrets=[modal.Secret.from_dict({KEY_VARIABLE: api_key()})],
    cpu=CPU,
    memory=2048,
    timeout=load_options.LONGEST_S + MARGIN_S,
)
def run(users: locust_run.Users) -> dict[str, Any]:
    """Run the users, and return the report."""
    found = locust_run.run(locust_run.ensure_python(), users, api_key(), _say_progress)
    return report.build(
        found,
        {
            "tool": f"Locust {locust_run.version()} on Modal",
            "url": users.url,
            "model": users.model,
            "load": load_options.phrase(users),
            "ended_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        },
    )


@app.local_entrypoint()
def main(  # noqa: PLR0917 - every one is an option with a name
    url: str = "",
    model: str = "llm",
    users: int = 36,
    spawn_rate: float = 1.0,
    run_time: str = "1m",
    pause: str = "1-5",
    output_tokens: int = 128,
    processes: int = int(CPU),
    html: str = "",
) -> None:
    """Test the deployed gateway, or the service at `--url`, and print the report."""
    page = Path(html) if html else None
    try:
        if page:
            require_writable(page)
        service = MeasuredService(_base_url(url), api_key(), model)
        given = load_options.users(
            service, users, spawn_rate, run_time, pause, output_tokens=output_tokens, processes=processes
        )
        service.wake(output_tokens, float(Settings.load().startup_timeout_s), _say)
        found = run.remote(given)
        for line in text.lines(found):
            _say(line)
        if page:
            write_page(page, found)
        check_answered(found)
    except ServiceError as error:
        raise SystemExit(error.to_terminal()) from None


def _base_url(url: str) -> str:
    if found := url or os.environ.get("VLLM_GATEWAY_URL", ""):
        return base_url(found)
    from service.modal_app import deployed  # noqa: PLC0415 - no container needs it

    if not api_key():
        raise UsageError(
            f"{KEY_VARIABLE} is not set, and the gateway answers nobody without a key.", hint="Set it to one."
        )
    return deployed.find(deployed.Names(Settings.load()), None).url or ""


def _say_progress(seconds: int, ended: int) -> None:
    if seconds % 10 == 0:
        _say(f"{seconds} s: {ended} requests have ended")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
