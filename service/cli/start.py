"""The entry of `vllm-service`: Ctrl-C ends it with 130 from its first moment, while its modules are still imported."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import the command line and run it."""
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup and shells may ignore it
    if interrupts:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from service.cli.main import main as run  # noqa: PLC0415 - what takes the time

    if interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
