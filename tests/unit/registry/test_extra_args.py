"""What an entry's further arguments may not say, and how they say which hosts may be asked for media."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.registry import extra_args
from service.registry.models import ModelSpec, Speculative

PIN = "a" * 40


def entry(*arguments: str, **fields: Any) -> ModelSpec:
    """Return an entry with these arguments."""
    return ModelSpec(**{"key": "m", "hub_id": "o/m", "revision": PIN, "extra_args": arguments, **fields})


@pytest.mark.parametrize(
    "arguments",
    [
        *[(flag, "x") for flag in extra_args.REFUSED],
        ("--Middleware".lower() + "=os.system",),
        ("--seed", "1", "--tool_parser_plugin", "/evil.py"),
        ("--allowed_local-media_path=/",),
        ("--speculative-config.model=o/unpinned",),
        ("--speculative_config.method", "custom_class"),
        ("-s", "{}"),
        ("-sc={}",),
        ("--worker-cls", "mine.Worker", "--seed", "1"),
        ("--load-format", "pt"),
        ("--load_format=NPCACHE",),
        ("--load-format", "tensorizer"),
        ("--distributed-executor-backend", "mine.Executor"),
    ],
    ids=" ".join,
)
def test_extra_args_that_load_code_or_open_the_engine_are_refused(arguments: tuple[str, ...]) -> None:
    """In every spelling that the engine's parser takes; the sentence names the flag and why."""
    with pytest.raises(ValidationError, match=r"extra_args: -\S+ .*(refused|it may be)"):
        entry(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", "1"),
        ("--runner", "pooling", "--load-format=Mistral", "-tp", "2"),
        ("--model-loader-extra-config", "{}", "--max-num-seqs", "-1", "-O3", "-cc.mode=0"),
        ("--no-trust-remote-code",),
    ],
    ids=" ".join,
)
def test_extra_args_of_how_it_computes_pass(arguments: tuple[str, ...]) -> None:
    """Unchanged."""
    assert entry(*arguments).extra_args == arguments


@pytest.mark.parametrize("argument", ["--trust-remote-code", "--trust_remote_code"])
def test_code_of_a_repository_needs_commits_of_all_that_may_bring_some(argument: str) -> None:
    """The model's and its draft's: who owns a repository could change the code otherwise. A directory has no commit."""
    draft = {"method": "draft_model", "num_speculative_tokens": 2, "hub_id": "o/d"}
    for fields in (
        {"revision": None},
        {"hub_id": None, "revision": None, "path": "/models/mine"},
        {"speculative": Speculative.model_validate(draft)},
    ):
        with pytest.raises(ValidationError, match="the entry does not pin its commit"):
            entry(argument, **fields)

    pinned = entry(argument, speculative=Speculative.model_validate(draft | {"revision": PIN}))
    assert extra_args.trusts_code(pinned.extra_args)
    assert not extra_args.trusts_code(("--no-trust-remote-code",))


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        ((), ()),
        (("--seed", "1"), ()),
        (("--allowed-media-domains", "a.example", "b.example", "--seed", "1"), ("a.example", "b.example")),
        (("--allowed_media_domains=a.example",), ("a.example",)),
        (("--allowed-media-domains", "a.example", "--allowed-media-domains", "b.example"), ("b.example",)),
    ],
)
def test_media_hosts_are_those_of_the_last_flag(arguments: tuple[str, ...], hosts: tuple[str, ...]) -> None:
    """As the engine's parser reads it; none by default."""
    assert extra_args.media_hosts(entry(*arguments).extra_args) == hosts


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.5",
        "169.254.169.254",
        "[::1]",
        "localhost",
        "*",
        "*.example.com",
        "https://a.example",
        "a.example:80",
        "A.example",
        "",
    ],
)
def test_media_hosts_are_names(host: str) -> None:
    """An address would not be looked up, and what is looked up is refused where it is private."""
    with pytest.raises(ValidationError, match="is not the name of a host"):
        entry("--allowed-media-domains", host)
