"""One answer of a chat: read from the gateway's stream, shown as it comes, and counted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from service import interrupts
from service.cli.gateways import Gateway
from service.modal_app import gateway_check

_SILENT_S = 180.0  # a gateway that is up says something every 15 s; its own container starts in seconds, mostly
_LEAST_S = 0.05  # a shorter answer has come in one piece or two, which tells nothing of the speed
_COST = re.compile(r"cost (\d+\.\d+) USD")
REPORT_COST = {"X-Report-Cost": "1"}


class Display(Protocol):
    """Where an answer is shown."""

    def waiting(self, text: str) -> None:
        """Show what the answer waits for."""

    def reasoning(self, text: str) -> None:
        """Show a piece of what the model thinks."""

    def content(self, text: str) -> None:
        """Show a piece of what the model says."""

    def finish(self) -> None:
        """End the answer's last line."""


@dataclass
class Answer:
    """An answer, as far as it came.

    Attributes:
        finish_reason: None: it was stopped.
        first_s: From the question to the first token; None: there was none.
        seconds: From the question to the last token.
        dollars: What it costs the caller; None: nothing, or the gateway does not say.
    """

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    first_s: float | None = None
    seconds: float = 0.0
    dollars: float | None = None
    stopped: bool = field(default=False)

    @property
    def tokens_per_second(self) -> float | None:
        """Those after the first; None: the answer came at once, or the engine did not count."""
        if self.first_s is None or not self.tokens_out or self.seconds - self.first_s < _LEAST_S:
            return None
        return (self.tokens_out - 1) / (self.seconds - self.first_s)

    @property
    def summary(self) -> str:
        """A line about it: tokens, speed, cost."""
        rate = self.tokens_per_second
        parts = [
            "stopped" if self.stopped else "",
            "ended by its limit of tokens" if self.finish_reason == "length" else "",
            f"{self.tokens_out} tokens" if self.tokens_out is not None else "",
            f"{rate:.1f} tokens/s" if rate else "",
            f"first token {self.first_s:.2f} s" if self.first_s is not None else "",
            f"${self.dollars:.6f}" if self.dollars is not None else "",
        ]
        return ", ".join(part for part in parts if part)

    def as_object(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        rate = self.tokens_per_second
        return {
            "content": self.content,
            "reasoning": self.reasoning or None,
            "finish_reason": self.finish_reason,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_per_second": round(rate, 1) if rate else None,
            "first_token_s": None if self.first_s is None else round(self.first_s, 3),
            "seconds": round(self.seconds, 3),
            "dollars": self.dollars,
        }


def ask(
    gateway: Gateway, body: dict[str, Any], display: Display, clock: Callable[[], float] = time.monotonic
) -> Answer:
    """Return the answer to a question; Ctrl-C stops it, and what came until then is returned.

    Args:
        gateway: Who is asked.
        body: Of the chat request, less what makes it a stream.
        display: Is shown the answer as it comes.
        clock: In seconds.

    Raises:
        ServiceError: There is none.
    """
    answer, began = Answer(), clock()

    def comment(text: str) -> None:
        if cost := _COST.fullmatch(text):
            answer.dollars = float(cost[1])
        else:
            display.waiting(text)

    body = {**body, "stream_options": {"include_usage": True}}
    try:
        with closing(gateway_check.stream(gateway.url, gateway.key, body, _SILENT_S, comment, REPORT_COST)) as events:
            for event in events:
                if _take(answer, event, display):
                    answer.seconds = clock() - began
                    answer.first_s = answer.seconds if answer.first_s is None else answer.first_s
    except KeyboardInterrupt:
        interrupts.handled()
        answer.stopped = True
    finally:
        display.finish()
    return answer


def _take(answer: Answer, event: Any, display: Display) -> bool:
    """Add an event to an answer; return whether it had a piece of it."""
    if usage := event.get("usage"):
        answer.tokens_in, answer.tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    had = False
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            answer.reasoning += thought
            display.reasoning(thought)
        if text := delta.get("content"):
            answer.content += text
            display.content(text)
        had = had or bool(thought or text)
    return had
