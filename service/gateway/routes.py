"""The routes of the door, and how large their bodies may be. What is not listed here does not exist."""

from __future__ import annotations

MIB = 1024 * 1024
BODY_LIMIT = 32 * MIB  # a dozen photographs in base64
TEXT_BODY_LIMIT = 1 * MIB  # tokenizing 30 MB took an engine 40 s and 6 GB

OPEN = frozenset({"/health", "/docs", "/openapi.json"})
STREAMING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
# path -> what it does, for people
INFERENCE = {
    "/v1/chat/completions": "Chat; `stream`, tools, images, structured outputs",
    "/v1/completions": "Completion of a prompt",
    "/v1/responses": "OpenAI's Responses",
    "/v1/messages": "Anthropic's Messages",
    "/v1/messages/count_tokens": "Tokens of an Anthropic message",
    "/v1/embeddings": "Embeddings, from models that make them",
    "/tokenize": "Tokens of a text or of messages",
    "/detokenize": "Text of tokens",
}
_TEXT_ONLY = frozenset({"/tokenize", "/detokenize"})


def body_limit(path: str) -> int:
    """Return how many bytes a body may have on this route."""
    return TEXT_BODY_LIMIT if path in _TEXT_ONLY else BODY_LIMIT
