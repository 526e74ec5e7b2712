"""Runs the code blocks of docs/clients.md unchanged; only the environment has the gateway's URL and key."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.engine.running import Service

from . import client_env, page
from .clients import KEY, LiteLLM, beside_packages, environment
from .page import Block
from .programs import AGENTS, LOADS

# What each block must print, in the order of the page; the words are those of the built-in model.
EXPECTED = [
    ("bash", ["Paris", "[DONE]"]),
    ("bash", [" Paris."]),
    ("bash", ['"id": "tiny"']),
    ("python", ["The capital of France is Paris. 25", "The capital of France is Paris."]),
    ("python", ["John", "tive"]),
    ("python", ["get_weather", "Paris", "Did you mean 'gemma-3-12b'?"]),
    ("javascript", ["The capital of France is Paris.\n", "tive"]),
    ("python", ["The capital of France is Paris.\n", "15\n"]),
    ("python", ["The capital of France is Paris.\n", "John"]),
    ("python", ["It is 18 degrees and clear in Paris.\n"]),
    ("python", ["name='John' age=30\n"]),
    ("javascript", ["The capital of France is Paris.", "It is 18 degrees and clear in Paris.\n"]),
    ("python", ["The capital of France is Paris.\n"]),
]


BLOCKS = [block for block in page.blocks() if block.section not in {program.section for program in [*AGENTS, *LOADS]}]


def command(block: Block, directory: Path) -> list[str]:
    """Return what runs a block."""
    if block.language == "javascript":
        return [client_env.node(), str(beside_packages(directory, block.text))]
    if block.language == "python":
        return [str(client_env.bin_directory() / "python"), "-c", block.text]
    return ["bash", "-euo", "pipefail", "-c", block.text]


def test_docs_blocks_are_the_expected_ones() -> None:
    """`test_agents.py` and `test_loads.py` run those of programs, tests/docs those marked `console`."""
    assert [block.language for block in BLOCKS] == [language for language, _ in EXPECTED]


@pytest.mark.parametrize("number", range(len(EXPECTED)), ids=lambda number: f"{number + 1}-{EXPECTED[number][0]}")
def test_docs_block_prints_what_it_should(number: int, served: Service, litellm: LiteLLM, tmp_path: Path) -> None:
    """A block exits with 0, and its output has the expected answers."""
    given = {"VLLM_GATEWAY_URL": served.url, "VLLM_API_KEY": KEY}
    given |= {"LITELLM_URL": litellm.url, "LITELLM_MASTER_KEY": litellm.MASTER_KEY}
    done = subprocess.run(
        command(BLOCKS[number], tmp_path), env=environment(**given), cwd=tmp_path, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in EXPECTED[number][1]:
        assert words in done.stdout, done.stdout
