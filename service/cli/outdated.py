"""What people see of pins that are behind the hub. To stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from service.weights.outdated import Pin

_WIDTH = 120
_ADVICE = (
    "To take it, write it into the entry's revision; where the entry names none: "
    "vllm-service prefetch <model> --update."
)


def show(pins: Sequence[Pin], as_json: bool) -> None:
    """Print the outdated pins as a table, or all as a JSON array with one object a repository."""
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        rows = [{**asdict(pin), "outdated": pin.is_outdated} for pin in pins]
        console.print(json.dumps(rows, indent=2), markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("model", "repository", "pinned", "on the hub"):
        table.add_column(header, no_wrap=True)
    outdated = [pin for pin in pins if pin.is_outdated]
    for pin in outdated:
        table.add_row(pin.model, pin.hub_id, str(pin.revision)[:12], str(pin.newest)[:12])
    if outdated:
        Console(highlight=False, width=_WIDTH).print(table)
    for pin in pins:
        if pin.refusal:
            console.print(f"{pin.model}: {pin.refusal}", markup=False)
        elif not pin.revision:
            console.print(f"{pin.model}: {pin.hub_id} names no commit and none is recorded yet", markup=False)
    told = sum(bool(pin.newest) for pin in pins)
    console.print(f"{len(outdated)} of {told} repositories that the hub told of have a newer commit.", markup=False)
    if outdated:
        console.print(_ADVICE, markup=False)
