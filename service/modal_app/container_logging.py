"""The logs of a container: what the service logs goes to stdout, which Modal keeps with the time of each line."""

from __future__ import annotations

import logging
import sys


def log_to_stdout() -> None:
    """Write the messages of the service's log records, from level INFO on, to stdout."""
    logger = logging.getLogger("service")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
