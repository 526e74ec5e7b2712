"""What people see of pins that are behind the hub. To stdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from service.cli.terminal import print_json, print_table, results_console
from service.weights.outdated import Pin

_ADVICE = (
    "To take it, write it into the entry's revision; where the entry names none: "
    "vllm-service prefetch <model> --update."
)


def show(pins: Sequence[Pin], as_json: bool) -> None:
    """Print the outdated pins as a table, or all as a JSON array with one object a repository."""
    if as_json:
        print_json([{**asdict(pin), "outdated": pin.is_outdated} for pin in pins])
        return
    console = results_console()
    outdated = [pin for pin in pins if pin.is_outdated]
    if outdated:
        rows = [(pin.model, pin.hub_id, str(pin.revision)[:12], str(pin.newest)[:12]) for pin in outdated]
        print_table(("model", "repository", "pinned", "on the hub"), rows)
    for pin in pins:
        if pin.refusal:
            console.print(f"{pin.model}: {pin.refusal}", markup=False)
        elif not pin.revision:
            console.print(f"{pin.model}: {pin.hub_id} names no commit and none is recorded yet", markup=False)
    told = sum(bool(pin.newest) for pin in pins)
    console.print(f"{len(outdated)} of {told} repositories that the hub told of have a newer commit.", markup=False)
    if outdated:
        console.print(_ADVICE, markup=False)
