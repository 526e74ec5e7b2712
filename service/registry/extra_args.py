"""What an entry's `extra_args` may not say, and what the service itself reads of them. Pure.

The list is of vLLM's flags that load code or pickles, read files for clients, replace what an entry pins, or pass the
guard by. Tests compare it with the pinned engine's parser, whose abbreviations of flags are off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from service.errors import RegistryError

TRUST = "--trust-remote-code"
_HOSTS = "--allowed-media-domains"
# An address would pass the resolver by, which refuses private ones.
_HOST = re.compile(r"(?=.{1,253}$)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z0-9]")
_VALUES = {
    # Of safetensors, and of none at all. The others unpickle, or get weights from elsewhere.
    "--load-format": (
        *("auto", "dummy", "fastsafetensors", "instanttensor", "mistral", "runai_streamer", "safetensors"),
        "sharded_state",
    ),
    "--distributed-executor-backend": ("external_launcher", "mp", "ray", "uni"),  # else the name of a class
}
_PINNED = "takes the place of what the entry pins"
_CODE = "loads code"
REFUSED = {
    **dict.fromkeys(("--model", "--tokenizer", "--hf-config-path", "--download-dir", "--hf-token"), _PINNED),
    **dict.fromkeys(("--revision", "--code-revision", "--tokenizer-revision", "--served-model-name"), _PINNED),
    # Each may also name a class or a draft model; the entry's field `speculative` pins the draft.
    **dict.fromkeys(("--speculative-config", "-sc", "--spec-model", "--spec-method"), _PINNED),
    **dict.fromkeys(("--tool-parser-plugin", "--reasoning-parser-plugin", "--io-processor-plugin"), _CODE),
    **dict.fromkeys(("--logits-processors", "--middleware", "--scheduler-cls", "--worker-cls"), _CODE),
    **dict.fromkeys(("--worker-extension-cls", "--model-class-overrides", "--log-config-file"), _CODE),
    **dict.fromkeys(("--kv-transfer-config", "--ec-transfer-config", "--logging-config"), _CODE),
    "--tool-server": "lets a model call tools",
    **dict.fromkeys(("--enable-prompt-embeds", "--enable-mm-embeds"), "unpickles what clients send"),
    "--allowed-local-media-path": "lets clients read files",
    "--trust-request-chat-template": "runs templates that clients send",
    "--trust-request-mm-kwargs": "lets clients choose how media are processed",
    "--profiler-config": "opens routes of a profiler",
    "--weight-transfer-config": "takes weights over the network",
    "--kv-events-config": "opens a port without a key",
    **dict.fromkeys(("--host", "--port", "--uds", "--grpc", "--grpc-port", "--headless"), "passes the guard by"),
    **dict.fromkeys(
        ("--api-key", "--api-server-count", "-asc", "--data-parallel-supervisor-port"), "passes the guard by"
    ),
    "--config": "reads further flags from a file",
}


def check(extra_args: tuple[str, ...]) -> None:
    """Refuse flags and values.

    Raises:
        RegistryError: The first one that is not taken.
    """
    for flag, values in _flags(extra_args):
        # argparse also takes the beginning of a flag that has one dash
        short = len(flag) > 1 and not flag.startswith("--")
        meant = next((known for known in REFUSED if known == flag or (short and known.startswith(flag))), None)
        if meant:
            raise RegistryError(f"extra_args: {flag} {REFUSED[meant]}, so it is refused.", hint="Remove it.")
        taken = _VALUES.get(flag)
        if taken and (wrong := [value for value in values if value.lower() not in taken]):
            raise RegistryError(f"extra_args: {flag} {wrong[0]} is refused; it may be {', '.join(taken)}.")
        if flag == _HOSTS and (wrong := [value for value in values if not _HOST.fullmatch(value)]):
            raise RegistryError(
                f"extra_args: {_HOSTS} '{wrong[0]}' is not the name of a host.",
                hint="Write names in lower case such as images.example.com; addresses, ports and '*' are refused.",
            )


def trusts_code(extra_args: tuple[str, ...]) -> bool:
    """Tell whether the engine is to run code of the model's repository."""
    return any(flag == TRUST for flag, _ in _flags(extra_args))


@lru_cache
def media_hosts(extra_args: tuple[str, ...]) -> tuple[str, ...]:
    """Return the hosts from which the engine fetches media that a request names by URL; none by default."""
    return _values_of(extra_args, _HOSTS)


def number_of(extra_args: tuple[str, ...], flag: str) -> float | None:
    """Return the number that a flag has; None: the flag is not there, or is no plain number."""
    try:
        return float(" ".join(_values_of(extra_args, flag)))
    except ValueError:
        return None


def _values_of(extra_args: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the values of a flag where it stands last, which counts; none where it is not there."""
    return next((values for flag, values in reversed([*_flags(extra_args)]) if flag == name), ())


def _flags(extra_args: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each flag as vLLM's parser understands it, with its values: `--a_b=c`, `--a-b c`, `--a-b.field c`."""
    flag = ""
    values: list[str] = []
    for argument in extra_args:
        if argument.startswith("-") and not re.match(r"-[\d.]", argument):
            if flag:
                yield flag, tuple(values)
            name, has_value, value = argument.partition("=")
            flag, values = name.partition(".")[0].replace("_", "-"), [value] if has_value else []
        else:
            values.append(argument)
    if flag:
        yield flag, tuple(values)
