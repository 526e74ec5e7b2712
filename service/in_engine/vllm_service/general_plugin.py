"""What vLLM calls in each of its processes, before it builds anything there."""

from __future__ import annotations

from vllm_service import amx_workaround, end_signals, media_connector, media_formats, structured_outputs


def prepare() -> None:
    """Apply this service's changes to vLLM and torch."""
    amx_workaround.enable_amx()
    media_connector.enable()
    media_formats.enable()
    structured_outputs.enable()
    end_signals.enable()
