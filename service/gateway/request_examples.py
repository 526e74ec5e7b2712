"""Bodies to begin with, for each route that an engine answers: what `Try it out` of `/docs` sends unless it is changed.

`tests/engine/test_http.py` sends each of them to a running service.
"""

from __future__ import annotations

from typing import Any

_HELLO = [{"role": "user", "content": "What is the capital of France?"}]
_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
_PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

# path -> name -> body
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "chat": {"model": "llm", "messages": _HELLO, "max_tokens": 200},
        "stream": {
            "model": "llm",
            "messages": _HELLO,
            "max_tokens": 200,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "structured output": {
            "model": "llm",
            "messages": _HELLO,
            "max_tokens": 200,
            "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _WEATHER}},
        },
        "tools": {
            "model": "llm",
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "max_tokens": 200,
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": _WEATHER},
                }
            ],
        },
        "image, for models that see": {
            "model": "gemma-3-12b",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": _PIXEL}},
                    ],
                }
            ],
            "max_tokens": 200,
        },
    },
    "/v1/completions": {
        "completion": {"model": "llm", "prompt": "Once upon a time", "max_tokens": 50},
        "stream": {"model": "llm", "prompt": "Once upon a time", "max_tokens": 50, "stream": True},
    },
    "/v1/responses": {
        "response": {"model": "llm", "input": "What is the capital of France?", "max_output_tokens": 200},
        "stream": {
            "model": "llm",
            "input": "What is the capital of France?",
            "max_output_tokens": 200,
            "stream": True,
        },
    },
    "/v1/messages": {
        "message": {"model": "llm", "max_tokens": 200, "messages": _HELLO},
        "stream": {"model": "llm", "max_tokens": 200, "messages": _HELLO, "stream": True},
    },
    "/v1/messages/count_tokens": {"messages": {"model": "llm", "messages": _HELLO}},
    "/v1/embeddings": {"texts": {"model": "llm", "input": ["What is the capital of France?", "Paris"]}},
    "/v1/rerank": {
        "documents": {
            "model": "llm",
            "query": "What is the capital of France?",
            "documents": ["Paris", "A cat sleeps."],
        }
    },
    "/v1/score": {
        "documents": {
            "model": "llm",
            "queries": "What is the capital of France?",
            "documents": ["Paris", "A cat sleeps."],
        }
    },
    "/classify": {"texts": {"model": "llm", "input": ["What a lovely day", "It rains again"]}},
    "/tokenize": {
        "text": {"model": "llm", "prompt": "What is the capital of France?"},
        "messages": {"model": "llm", "messages": _HELLO},
    },
    "/detokenize": {"tokens": {"model": "llm", "tokens": [1, 2, 3]}},
}
