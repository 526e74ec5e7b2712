"""The checks of `vllm-service doctor`: what a check found, how long it may take, and those of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from service import memory
from service.boots.known_errors import Recognised, recognise
from service.boots.records import BootRecord, load, local_directory
from service.engine import environment
from service.errors import ServiceError
from service.files import user_directory
from service.hardware import check_cpu_libraries, check_driver, check_platform, probe
from service.registry.models import Registry
from service.registry.tiers import count_label
from service.settings import Settings
from service.weights import revisions
from service.weights.hub import DEFAULT as HUB

TIMEOUT_S = 10.0
_LITTLE_DISK_GB = 20.0  # the engine for a GPU needs 15, and a small model a few
State = Literal["ok", "warn", "failed"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: Its name.
        text: One sentence or less.
        next: What to do; empty: nothing.
    """

    check: str
    state: State
    text: str
    next: str = ""


Check = tuple[str, Callable[[], Finding]]


def run(checks: Iterable[Check], timeout_s: float = TIMEOUT_S) -> Iterator[Finding]:
    """Run checks one after the other and yield what they find; one that takes too long has failed."""
    for name, check in checks:
        yield _bounded(name, check, timeout_s)


def _bounded(name: str, check: Callable[[], Finding], timeout_s: float) -> Finding:
    found: list[Finding] = []

    def work() -> None:
        try:
            found.append(check())
        except ServiceError as error:
            found.append(Finding(name, "failed", error.message, error.hint))
        except Exception as error:  # noqa: BLE001 - a check must not end the others
            found.append(Finding(name, "failed", f"The check ended with {type(error).__name__}."))

    thread = threading.Thread(target=work, name=f"check {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if found:
        return found[0]
    hint = "Check the connection; status.modal.com tells of outages at Modal."
    return Finding(name, "failed", f"No answer within {timeout_s:.0f} s.", hint)


def of_this_machine() -> list[Check]:
    """Return the checks that need no account."""
    return [
        ("machine", _machine),
        ("disk", _disk),
        ("engine", _engine),
        ("settings", _settings),
        ("hub", _hub),
        ("boots", lambda: boots("boots", load(local_directory()), "vllm-service boots")),
    ]


def _machine() -> Finding:
    check_platform()
    hardware = probe()
    if hardware.gpus:
        check_driver(hardware)
        gpus = f"{count_label(hardware.gpus[0].name, len(hardware.gpus))}, driver {hardware.gpus[0].driver}"
    else:
        check_cpu_libraries()
        gpus = "no NVIDIA GPU"
    free = memory.available_bytes() / 1e9
    text = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {free:.1f} GB of memory free, {gpus}."
    return Finding("machine", "ok", text)


def _disk() -> Finding:
    directory = user_directory("XDG_CACHE_HOME", "~/.cache")
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    text = f"{free_gb:.0f} GB free at {existing}."
    if not os.access(existing, os.W_OK):
        return Finding("disk", "failed", f"{existing} cannot be written to.", "Set XDG_CACHE_HOME to another.")
    if free_gb < _LITTLE_DISK_GB:
        return Finding("disk", "warn", text, "Free some, or set XDG_CACHE_HOME and HF_HOME to a larger disk.")
    return Finding("disk", "ok", text)


def _engine() -> Finding:
    device: environment.Device = "cuda" if probe().gpus else "cpu"
    vllm = f"vLLM {environment.vllm_version(device)} for {device}"
    if environment.is_built(device):
        return Finding("engine", "ok", f"{vllm} is installed.")
    return Finding("engine", "ok", f"{vllm} is not installed yet; 'vllm-service up' does so.")


def _settings() -> Finding:
    settings, registry = settings_and_registry()
    registry.resolve(settings.model)
    given = sorted(name.upper() for name in settings.model_fields_set)
    text = f"set: SERVICE_{', SERVICE_'.join(given)}" if given else "none is set"
    return Finding("settings", "ok", f"{len(registry.specs)} models; of the settings {text}.")


def settings_and_registry() -> tuple[Settings, Registry]:
    """Return the settings and the models that they name.

    Raises:
        UsageError: One is wrong.
    """
    settings = Settings.load()
    return settings, revisions.registry(settings.models_file)


def _hub() -> Finding:
    if why := HUB.why_unreachable():
        return Finding("hub", "warn" if why.is_offline else "failed", f"{HUB.url}: {why.reason}.", why.hint)
    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set, which gated models need"
    return Finding("hub", "ok", f"{HUB.url} answers; {token}.")


def boots(check: str, records: list[BootRecord], word: str) -> Finding:
    """Tell how the newest boot of each model went.

    Args:
        check: Name of the check.
        records: Oldest first.
        word: The command that shows them.
    """
    newest = {(record.model, record.gpu): record for record in records}
    failed = [record for record in newest.values() if record.outcome == "failed"]
    if not failed:
        text = f"{len(records)} are recorded; the newest of each model got ready." if records else "None is recorded."
        return Finding(check, "ok", text)
    last = failed[-1]
    reason = " ".join((last.reason or "no reason is recorded").split()).rstrip(".")
    known = recognise([reason])
    return Finding(
        check,
        "failed",
        f"The newest boot of {last.model} on {last.gpu} failed: {reason}.",
        known[0].error.next if known else f"{word} shows all of them.",
    )


def of_text(lines: Iterable[str]) -> list[Finding]:
    """Return the known errors of a log or an error message; one finding where there is none."""
    return list(map(_explained, recognise(lines))) or [Finding("text", "ok", "No known error is in it.")]


def _explained(one: Recognised) -> Finding:
    more = f" and {one.count - 1} more" if one.count > 1 else ""
    text = f'Line {one.number}{more}: "{one.line}". {one.error.meaning}'
    return Finding(one.error.name, "failed" if one.error.is_fault else "warn", text, one.error.next)
