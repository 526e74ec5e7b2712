"""OpenAI's client for Python with recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
from cases import ASKED, case, run

client = openai.OpenAI(base_url=f"{ASKED['url']}/v1", api_key=ASKED["key"], max_retries=0, timeout=120)
MODEL, FILE = ASKED["model"], Path("speech.wav")


@case
def transcription() -> Any:
    """The text, and the seconds that are charged."""
    answer = client.audio.transcriptions.create(model=MODEL, file=FILE, language="en")
    return {"is_text": isinstance(answer.text, str), "usage": answer.usage.to_dict() if answer.usage else None}


@case
def verbose() -> Any:
    """The text in pieces with times."""
    answer = client.audio.transcriptions.create(
        model=MODEL,
        file=FILE,
        language="en",
        response_format="verbose_json",
        timestamp_granularities=["segment"],
        extra_body={"max_completion_tokens": 4},
    )
    return {"duration": float(answer.duration), "language": answer.language}


@case
def stream() -> Any:
    """Whether it comes in events."""
    return len(list(client.audio.transcriptions.create(model=MODEL, file=FILE, language="en", stream=True))) > 0


@case
def translation() -> Any:
    """The text."""
    return isinstance(client.audio.translations.create(model=MODEL, file=FILE).text, str)


@case
def no_recording() -> Any:
    """A file that is none."""
    return client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"no recording"))


@case
def unknown_model() -> Any:
    """A name that no model has."""
    return client.audio.transcriptions.create(model=ASKED["unknown"], file=FILE)


if __name__ == "__main__":
    run()
