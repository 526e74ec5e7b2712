"""What a client needs to use a gateway: the values of its configuration, and the file in which it looks for them.

A key is in none of them: each has a reference to the variable VLLM_API_KEY, in the client's own form. A file of
`NAME=value` lines has no such form, so that one holds the key, and its owner alone can read it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from service.cli import config_files
from service.cli.clients import Client
from service.cli.config_files import Change
from service.files import user_directory
from service.modal_app.gateway_access import KEY_VARIABLE

_REFERENCE = f"${KEY_VARIABLE}"
_NO_KEY = "none"  # a service without keys accepts any; the clients insist on one
_PROVIDER, _TITLE = "vllm", "vllm-service"
_SHARE_OF_CONTEXT, _MOST_TOKENS = 4, 32_000  # an answer may have a quarter of the context; agents ask for 32,000


@dataclass(frozen=True)
class Connection:
    """A gateway, and the model that the client is to ask.

    Attributes:
        url: Without `/v1`.
        needs_key: The client must send VLLM_API_KEY.
        model: As requests name it.
        context: Tokens of prompt and answer together; None: unknown.
        timeout_s: How long a request may take that wakes the model.
    """

    url: str
    needs_key: bool
    model: str
    context: int | None
    timeout_s: int

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of an answer that leave room for the prompt."""
        return min(_MOST_TOKENS, self.context // _SHARE_OF_CONTEXT) if self.context else None


def own_file(client: Client) -> Path | None:
    """Return where a client looks for its configuration; None: it has no such place."""
    match client:
        case Client.CODEX:
            return user_directory("CODEX_HOME", "~/.codex") / "config.toml"
        case Client.CLAUDE:
            return user_directory("CLAUDE_CONFIG_DIR", "~/.claude") / "settings.json"
        case Client.OPENCODE:
            directory = user_directory("XDG_CONFIG_HOME", "~/.config") / "opencode"
            commented = directory / "opencode.jsonc"
            return commented if commented.exists() else directory / "opencode.json"
        case _:
            return None


def values(client: Client, connection: Connection, *, is_new: bool = False) -> dict[str, Any]:
    """Return what a client's configuration must have; None stands for what it must not have.

    Args:
        client: Whose.
        connection: To which gateway.
        is_new: The client has no configuration yet: what it does besides is set too, such as its telemetry.
    """
    match client:
        case Client.CODEX:
            return _codex(connection, is_new)
        case Client.CLAUDE:
            return _claude(connection, is_new)
        case Client.OPENCODE:
            return _opencode(connection, is_new)
        case Client.OPENWEBUI:
            return _openwebui(connection)
        case _:
            return _env(connection)


def text(client: Client, found: Mapping[str, Any]) -> str:
    """Return a configuration in the client's own format."""
    match client:
        case Client.CODEX:
            return config_files.merged_toml("", _present(found))
        case Client.CLAUDE | Client.OPENCODE:
            return json.dumps(_present(found), indent=2) + "\n"
        case _:
            return "".join(f"export {name}={_shell(value)}\n" for name, value in found.items())


def change(client: Client, wanted: Mapping[str, Any], file: Path, key: str) -> Change:
    """Return how a client's file gets its values.

    Args:
        client: Whose.
        wanted: What `values` returned.
        file: Where.
        key: Stands in the place of its reference where the file's form has none.

    Raises:
        ServiceError: The file cannot be read, or not be understood.
    """
    merge: Callable[[str], str]
    match client:
        case Client.CODEX:
            merge, load, has_key = partial(config_files.merged_toml, wanted=wanted), config_files.load_toml, False
        case Client.CLAUDE | Client.OPENCODE:
            merge, load, has_key = partial(config_files.merged_json, wanted=wanted), config_files.load_json, False
        case _:
            lines = {name: key if value == _REFERENCE else value for name, value in wanted.items()}
            merge, load = partial(config_files.merged_dotenv, wanted=lines), config_files.load_dotenv
            has_key = lines != wanted
    return config_files.plan(file, merge, load, has_secret=has_key)


def _codex(to: Connection, is_new: bool) -> dict[str, Any]:
    provider = {
        "name": _TITLE,
        "base_url": f"{to.url}/v1",
        "env_key": KEY_VARIABLE if to.needs_key else None,
        "wire_api": "responses",
    }
    found: dict[str, Any] = {"model": to.model, "model_provider": _PROVIDER, "model_context_window": to.context}
    if is_new:  # plugins are fetched from GitHub at every start
        found["check_for_update_on_startup"] = False
        found |= {"analytics": {"enabled": False}, "features": {"plugins": False}}
    return found | {"model_providers": {_PROVIDER: provider}}


def _claude(to: Connection, is_new: bool) -> dict[str, Any]:
    names = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")))
    env: dict[str, str | None] = {
        "ANTHROPIC_BASE_URL": to.url,
        "ANTHROPIC_API_KEY": None,  # of another service, which must not be sent to this one
        "ANTHROPIC_AUTH_TOKEN": None if to.needs_key else _NO_KEY,
        **dict.fromkeys(names, to.model),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(to.context) if to.context else None,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(to.answer_tokens) if to.answer_tokens else None,
        # 401 is repeated where a helper gives the key, whatever the answer says: ten times take three minutes
        "CLAUDE_CODE_MAX_RETRIES": "3" if to.needs_key else None,
    }
    if is_new:  # no telemetry, no search for updates
        env["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] = "1"
    return {"env": env, "apiKeyHelper": f"printenv {KEY_VARIABLE}" if to.needs_key else None}


def _opencode(to: Connection, is_new: bool) -> dict[str, Any]:
    options = {"baseURL": f"{to.url}/v1", "apiKey": f"{{env:{KEY_VARIABLE}}}" if to.needs_key else _NO_KEY}
    limit = {"limit": {"context": to.context, "output": to.answer_tokens}} if to.context else {}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": _TITLE,
        "options": options,
        "models": {to.model: limit},
    }
    name = f"{_PROVIDER}/{to.model}"
    found: dict[str, Any] = {"$schema": "https://opencode.ai/config.json"} if is_new else {}
    found |= {"model": name, "small_model": name}  # the second: for titles of conversations
    if is_new:
        found |= {"autoupdate": False, "share": "disabled"}
    return found | {"provider": {_PROVIDER: provider}}


def _openwebui(to: Connection) -> dict[str, Any]:
    return {
        "OPENAI_API_BASE_URL": f"{to.url}/v1",
        "OPENAI_API_KEY": _REFERENCE if to.needs_key else _NO_KEY,
        "DEFAULT_MODELS": to.model,
        "ENABLE_OLLAMA_API": "False",
        "AIOHTTP_CLIENT_TIMEOUT": str(to.timeout_s),  # 300 otherwise, of which waking takes a part
    }


def _env(to: Connection) -> dict[str, Any]:
    key = _REFERENCE if to.needs_key else _NO_KEY
    return {
        "OPENAI_BASE_URL": f"{to.url}/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": to.url,
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_MODEL": to.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": to.model,
        "LLM_BASE_URL": f"{to.url}/v1",
        "LLM_API_KEY": key,
    }


def _shell(value: str) -> str:
    return f'"{value}"' if value == _REFERENCE else shlex.quote(value)


def _present(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be there."""
    return {
        name: _present(value) if isinstance(value, Mapping) else value
        for name, value in found.items()
        if value is not None
    }
