"""Recordings for requests."""

from __future__ import annotations

import io
import math
import struct
import wave


def recording(seconds: float, *, rate: int = 16_000, channels: int = 1, silent: bool = False) -> bytes:
    """Return a tone, or silence, as a WAV file."""
    file, frames = io.BytesIO(), int(seconds * rate)
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        if silent:
            writer.writeframes(bytes(2 * channels * frames))
        else:
            tone = (int(8000 * math.sin(frame / 20)) for frame in range(frames))
            writer.writeframes(b"".join(struct.pack("<h", value) * channels for value in tone))
    return file.getvalue()
