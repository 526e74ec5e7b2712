"""Prints which pinned commits are older than the hub's, to stdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from service.cli.terminal import print_json, print_table, results_console
from service.weights.outdated import Pin

_ADVICE = (
    "To serve it, write it into the entry's revision; for an entry that names none: "
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
            console.print(
                f"{pin.model}: {pin.hub_id} has no revision in its entry, and none is recorded yet", markup=False
            )
    known = sum(bool(pin.newest) for pin in pins)
    console.print(f"{len(outdated)} of {known} repositories have a newer commit on the hub.", markup=False)
    if outdated:
        console.print(_ADVICE, markup=False)
