"""Prints what `vllm-service models --pin` pinned, to stdout."""

from __future__ import annotations

from service.cli.terminal import print_json, results_console
from service.errors import WeightsError
from service.weights.pinning import Pins


def show(pins: Pins, as_json: bool) -> None:
    """Print what was pinned, or a JSON object with the lock file, commits and failures.

    Raises:
        WeightsError: The hub named no commit of some repository; the others are pinned.
    """
    if as_json:
        print_json({"lock_file": str(pins.file), "pinned": pins.pinned, "failed": pins.failed})
    else:
        console = results_console()
        for hub_id, commit in pins.pinned.items():
            console.print(f"{hub_id} is at {commit}, recorded in {pins.file}", markup=False)
        if not pins.pinned and not pins.failed:
            console.print("Every repository has a commit already; nothing was written.", markup=False)
    if pins.failed:
        raise WeightsError(
            f"{len(pins.failed)} of {len(pins.failed) + len(pins.pinned)} repositories could not be pinned. "
            + " ".join(pins.failed.values()),
            hint="Correct the causes, then run 'vllm-service models --pin' again; what is pinned stays pinned.",
        )
