"""What the engine fetches of media that a request names by URL: vLLM's own code with this service's connector."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.engine.args import engine_command
from service.registry.models import Registry

SIZE = [3, 2]
DATA = "data:image/png;base64,"


@pytest.fixture(scope="module")
def fetched(engine_python: str) -> dict[str, Any]:
    """Every outcome, by hosts that are listed and URL, and what the web server saw."""
    command = engine_command(Registry.load().specs["tiny"], Path("/weights"), device="cpu", parent_env=os.environ)
    program = Path(__file__).with_name("media_fetches.py")
    done = subprocess.run(
        [engine_python, str(program)], env=dict(command.env), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def outcome(fetched: dict[str, Any], beginning: str) -> Any:
    """Return the one outcome whose name begins so."""
    found = [result["outcome"] for name, result in fetched["results"].items() if name.startswith(beginning)]
    assert len(found) == 1, beginning
    return found[0]


def test_media_of_a_listed_host_with_public_addresses_are_fetched(fetched: dict[str, Any]) -> None:
    """And data in a URL are read, where no host is listed too."""
    assert outcome(fetched, "listed: http://public.example/public") == SIZE
    assert outcome(fetched, f"listed: {DATA}") == outcome(fetched, f"none listed: {DATA}") == SIZE


@pytest.mark.parametrize("host", ["private", "mixed"])
def test_media_of_a_host_with_a_private_address_are_refused(fetched: dict[str, Any], host: str) -> None:
    """Although its name is listed; at once, without repeating it."""
    name = f"listed: http://{host}.example/{host}.example.png"
    assert "has no public address" in outcome(fetched, name)
    assert fetched["results"][name]["seconds"] < 1


def test_media_of_a_name_that_changes_its_address_come_from_the_one_that_was_checked(fetched: dict[str, Any]) -> None:
    """DNS rebinding: a name is looked up once for a connection."""
    assert outcome(fetched, "listed: http://rebound.example/") == SIZE
    assert not [line for line in fetched["seen"] if line.startswith("127.0.0.2")]


def test_media_of_other_hosts_addresses_and_files_are_refused(fetched: dict[str, Any]) -> None:
    """All of them where no host is listed, which is the default."""
    for name, result in fetched["results"].items():
        fetched_or_data = name.startswith(("listed: http://public.example/public", "listed: http://rebound", "twice"))
        if not fetched_or_data and "data:" not in name:
            assert isinstance(result["outcome"], str), name


def test_media_redirects_are_not_followed(fetched: dict[str, Any]) -> None:
    """Neither to a listed host nor to another."""
    assert not [line for line in fetched["seen"] if "moved" in line]
    assert isinstance(outcome(fetched, "listed: http://public.example/to/public.example"), str)


def test_media_server_saw_only_what_was_allowed(fetched: dict[str, Any]) -> None:
    """No connection to a literal address, an unlisted or a private host; none by the blocking way either."""
    paths = {line.partition(" ")[2] for line in fetched["seen"]}
    allowed = {"/public.example.png", "/rebound.example.png", "/again.png"}
    assert paths - {"/to/public.example", "/to/private.example"} <= allowed
    for name, result in fetched["results"].items():
        assert result["blocking"] == SIZE if DATA in name else isinstance(result["blocking"], str), name


@pytest.mark.parametrize(("beginning", "reason"), [("large", "exceed the maximum of 67108864 pixels"), ("text", "Not"),
                                                 ("cut", "Error"), ("garbled", "Error")])  # fmt: skip
def test_media_of_data_that_no_decoder_reads_are_the_clients_error(
    fetched: dict[str, Any], beginning: str, reason: str
) -> None:
    """VLLM answers 400 to each ValueError, and 500 to all else; the bound on pixels is looked at before decoding."""
    for what in ("listed", "none listed"):
        found = outcome(fetched, f"{what}: data:{beginning}")
        assert found.startswith(("ValueError: ", "VLLMValidationError: ")), found
        assert reason in found
