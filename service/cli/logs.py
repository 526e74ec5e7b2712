"""Shows the log of the deployed service: lines with time and replica; a boot's phases are marked as they begin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress

import typer

from service.boots.records import BootRecord
from service.modal_app.logs import Line

_BOOT = "boot {"
_PHASE = re.compile(r"phase of (\S+) after ([\d.]+) s: (.+)")  # as `service.server` logs it


def show(lines: Iterator[Line], as_json: bool) -> None:
    """Print lines as they come: for people, or one JSON object each."""
    for line in lines:
        record, phase = _record(line.text), _PHASE.fullmatch(line.text)
        if as_json:
            fields = {"at": line.at.isoformat(), "replica": line.replica, "text": line.text}
            marked = {"boot": record.as_object() if record else None, "phase": phase[3] if phase else None}
            typer.echo(json.dumps(fields | marked))
        else:
            text = _boot(record) if record else _begun(phase) if phase else line.text
            typer.echo(f"{line.at:%H:%M:%S} {line.replica[-6:]:<6} {text}")


def _begun(phase: re.Match[str]) -> str:
    return f"== {phase[1]}: {phase[3]} (after {phase[2]} s)"


def _record(text: str) -> BootRecord | None:
    if text.startswith(_BOOT):
        with suppress(ValueError):
            return BootRecord.from_line(text.removeprefix("boot "))
    return None


def _boot(record: BootRecord) -> str:
    phases = ", ".join(f"{span.name} {span.end - span.start:.1f} s" for span in record.phases)
    return f"== {record.model} on {record.gpu}: {record.outcome} after {record.seconds:.1f} s ({phases})"
