"""The checks of `vllm-service doctor`: bounds, boot records, texts."""

from __future__ import annotations

import threading
import time

from service.boots.records import BootRecord, new_id
from service.errors import ServiceError
from service.local import checks
from service.local.checks import Finding


def record(model: str, outcome: str, reason: str | None = None) -> BootRecord:
    """Return a record of a boot on an H100."""
    return BootRecord(
        id=new_id(),
        at="2026-11-29T06:00:00+00:00",
        model=model,
        gpu="H100",
        strategy="cpu",
        restored=False,
        fast_boot=True,
        versions={},
        phases=(),
        outcome=outcome,
        reason=reason,
        seconds=9.0,
    )


def test_check_that_hangs_fails_in_time_and_the_others_are_made() -> None:
    """An error of the service is told as it is, any other by its class alone."""
    held = threading.Event()

    def hangs() -> Finding:
        held.wait()
        return Finding("hangs", "ok", "")

    def fails() -> Finding:
        raise ServiceError("It is broken.", hint="Mend it.")

    def surprises() -> Finding:
        raise KeyError("sk-secret")

    began = time.monotonic()
    found = list(checks.run([("hangs", hangs), ("fails", fails), ("surprises", surprises)], timeout_s=0.2))
    held.set()
    assert time.monotonic() - began < 5
    assert [(one.check, one.state, one.text) for one in found] == [
        ("hangs", "failed", "No answer within 0 s."),
        ("fails", "failed", "It is broken."),
        ("surprises", "failed", "The check ended with KeyError."),
    ]
    assert found[1].next == "Mend it."


def test_boots_fail_where_the_newest_of_a_model_has() -> None:
    """With the reason, and with what to do where that is known; one that got ready since is forgotten."""
    memory = record("a", "failed", "Engine exited with code 1. Last line: 'CUDA out of memory'.")
    found = checks.boots("boots", [memory, record("b", "ready")], "vllm-service boots")
    assert (found.state, "a on H100 failed" in found.text) == ("failed", True)
    assert found.next.startswith("Choose a larger GPU")
    assert checks.boots("boots", [memory, record("a", "ready")], "vllm-service boots").state == "ok"
    other = checks.boots("boots", [record("a", "failed")], "vllm-service boots")
    assert other.next == "vllm-service boots shows all of them."
    assert checks.boots("boots", [], "x").text == "None is recorded."


def test_text_with_known_errors_is_explained() -> None:
    """A cold start is a warning: it is how the service works."""
    found = checks.of_text(["x", "CUDA out of memory", "CUDA out of memory", "First request takes 2-3 minutes"])
    assert [(one.check, one.state) for one in found] == [("GPU memory", "failed"), ("cold start", "warn")]
    assert found[0].text.startswith('Line 2 and 1 more: "CUDA out of memory".')
    assert checks.of_text(["all is well"]) == [Finding("text", "ok", "No known error is in it.")]
