"""The logs of a container."""

from __future__ import annotations

import logging

import pytest

from service.modal_app.container_logging import log_to_stdout


def test_logs_of_the_service_are_written_to_stdout_as_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From level INFO on; other libraries' logs are not touched."""
    logger = logging.getLogger("service")
    monkeypatch.setattr(logger, "handlers", [])
    level = logger.level
    try:
        log_to_stdout()
        logging.getLogger("service.server").info("boot %s", "x")
        logging.getLogger("service.server").debug("left out")
        logging.getLogger("elsewhere").info("left out")
    finally:
        logger.setLevel(level)

    assert capsys.readouterr().out == "boot x\n"
