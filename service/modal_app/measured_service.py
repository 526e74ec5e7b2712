"""The service that a benchmark or a load test measures: where it is, and that it is awake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.benchmarks import page
from service.errors import ServiceError, UsageError
from service.modal_app import gateway_check

_HELLO = [{"role": "user", "content": "Hello!"}]


@dataclass(frozen=True)
class MeasuredService:
    """A service, of ours or vLLM's own.

    Attributes:
        url: Without `/v1`.
        key: Empty: it needs none.
        model: As requests name it.
    """

    url: str
    key: str
    model: str

    def wake(self, needed_tokens: int, timeout_s: float, say: Callable[[str], None]) -> None:
        """Wait until the model answers, so that no figure has a boot in it.

        Args:
            needed_tokens: What a request will take of the context.
            timeout_s: How long the service may be silent.
            say: Called with a sentence where the model has to wake first.

        Raises:
            ServiceError: The service cannot be reached, or does not answer with this model.
            UsageError: Its context is too short.
        """
        found = self._described()
        if (context := found.get("max_model_len")) and needed_tokens > context:
            raise UsageError(
                f"'{self.model}' has a context of {context} tokens, and a request would take {needed_tokens}.",
                hint="Lower --input-tokens or --output-tokens.",
            )
        if found and found["state"] != "ready":
            price = found.get("dollars_per_hour")
            say(
                f"Waking {found['display_name']} on {found['gpu']}"
                + (f", which costs ${price:.2f}/h while it is up" if price else "")
            )
        body = {"model": self.model, "messages": _HELLO, "max_tokens": 1}
        for _ in gateway_check.stream(self.url, self.key, body, timeout_s):
            pass

    def tokens_per_word(self, words: str) -> float:
        """Return how many tokens a word has on average; 1 where the service does not count them."""
        count = gateway_check.count_tokens(self.url, self.key, self.model, words)
        return count / len(words.split()) if count else 1.0

    def _described(self) -> dict[str, Any]:
        """Return how the gateway describes the model; nothing where the service is vLLM's own, or has no such model."""
        try:
            return gateway_check.model(self.url, self.key, self.model)
        except ServiceError:
            gateway_check.models(self.url, self.key)  # raises where the service or the key is the reason
            return {}


def write_page(file: Path, report: dict[str, Any]) -> None:
    """Write the page of a report that is printed already.

    Raises:
        ServiceError: It cannot be written.
    """
    try:
        file.write_text(page.render(report), encoding="utf-8")
    except OSError as error:
        raise ServiceError(
            f"--html {file} cannot be written: {error.strerror}.", hint="The figures above are complete."
        ) from error


def check_answered(report: dict[str, Any]) -> None:
    """Insist that every request was answered.

    Raises:
        ServiceError: Some were not.
    """
    requests = report["requests"]
    if failed := requests["failed"]:
        raise ServiceError(
            f"{failed} of {failed + requests['answered']} requests failed.",
            hint="What each kind of error means: docs/trouble.md.",
        )
