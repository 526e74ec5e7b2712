"""How a word of the command reaches a gateway, as a client does: its base URL, and the key in VLLM_API_KEY."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from service.errors import UsageError

KEY_VARIABLE = "VLLM_API_KEY"


def api_key() -> str:
    """Return the key of the environment without space around it, such as the newline of a file; empty: none is set."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def base_url(url: str) -> str:
    """Return a gateway's URL without `/v1` at its end.

    Raises:
        UsageError: It is no http URL, or it may hold a secret; then the message does not repeat it.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname and (parts.port or True)  # a port that is no number raises
    except ValueError:
        host = None
    if "@" in url or "?" in url or "#" in url:
        raise UsageError(
            "The gateway's URL has a user, a query or a fragment, which may be a secret: the URL is printed and "
            "written to files.",
            hint="Give scheme, host and port alone, such as https://<workspace>--vllm-gateway-serve.modal.run.",
        )
    if not host or parts.scheme not in {"http", "https"} or re.search(r"\s", url):
        raise UsageError(
            f"'{url}' is not the URL of a gateway.", hint="Give scheme, host and port, such as http://127.0.0.1:8000."
        )
    return url.rstrip("/").removesuffix("/v1")
