"""The clients that `vllm-service connect` connects."""

from __future__ import annotations

from enum import StrEnum


class Client(StrEnum):
    """A client, by the word of the command."""

    CODEX = "codex"
    CLAUDE = "claude"
    OPENCODE = "opencode"
    OPENWEBUI = "openwebui"
    LITELLM = "litellm"
    ENV = "env"
