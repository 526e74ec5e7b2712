"""Runs a client's cases one after the other and prints what became of each, as one JSON object.

A script of a client says `ready` on stderr when all is imported, and is told on stdin what to ask. A case that fails
does not keep the others from running: its outcome is the exception then, in the words that a user of the client sees.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

sys.stderr.write("ready\n")
sys.stderr.flush()
ASKED: dict[str, Any] = json.load(sys.stdin)
_CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Take a function as the case of its name; what it returns is the case's outcome."""
    _CASES[function.__name__] = function
    return function


def run() -> None:
    """Run the cases that are asked for, or all."""
    wanted = ASKED.get("cases") or _CASES
    json.dump({name: _outcome(_CASES[name]) for name in wanted}, sys.stdout)


def _outcome(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": function()}
    except Exception as error:  # noqa: BLE001 - the test judges it
        status = getattr(error, "status_code", None)
        return {"raised": type(error).__name__, "status": status, "message": str(error)}
