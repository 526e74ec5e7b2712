"""Has FFmpeg open recordings and videos as such alone.

It would also take a text that a client sends for a list of files, which it then reads from this machine, or for the
description of a stream, on whose packets it waits at ports that it opens: `ffconcat` and SDP.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

FORMATS = (
    *("wav", "w64", "mp3", "flac", "ogg", "matroska", "webm", "mov", "mp4", "aac", "aiff", "amr", "caf", "au"),
    *("mpeg", "mpegts", "avi", "flv"),
)
_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}  # of FFmpeg


def enable() -> None:
    """Bound what PyAV and OpenCV open; vLLM calls this in each of its processes."""
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "|".join(f"{name};{value}" for name, value in _OPTIONS.items())
    with contextlib.suppress(ImportError):  # an engine whose pins leave it out hears nothing
        import av

        av.open = bounded(av.open)


def bounded(opens: Any) -> Any:
    """Return `av.open` that reads nothing but these formats."""

    @functools.wraps(opens)
    def open_media(file: Any, mode: Any = None, format: Any = None, options: Any = None, **rest: Any) -> Any:  # noqa: A002
        if mode in {None, "r"}:
            options = {**(options or {}), **_OPTIONS}
        return opens(file, mode, format, options, **rest)

    return open_media
