"""Programs with a section on docs/clients.md, run by its commands: each in a home directory of its own.

`vllm-service connect` writes the configuration of an agent, and nothing else does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.engine.running import REPOSITORY

from . import client_env, memorised, page
from .clients import key_of

_PROGRAM_S = 200  # 3 to 12 s on an idle machine


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    code: int
    out: str
    err: str
    work: Path

    @property
    def written(self) -> str:
        """What is in the file that an agent was told to write."""
        return (self.work / memorised.FILE).read_text()


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        section: Its section of the page.
        directories: Returns where it is installed; the first call installs it.
    """

    section: str
    directories: Callable[[], list[Path]]

    @property
    def name(self) -> str:
        """The name of its key."""
        return self.section.lower().replace(" ", "-")

    def run(self, home: Path, url: str, *, key: str | None = None, proxy: str = "", **variables: str) -> Outcome:
        """Do what its section says, in a new working directory.

        Args:
            home: Its home directory, new.
            url: Of the gateway.
            key: Another key than its own.
            proxy: Where its requests to other machines go; by default nowhere.
            variables: What the page's user has set besides URL and key.
        """
        blocks = [block for block in page.blocks() if block.section == self.section and block.language == "bash"]
        variables |= {"VLLM_GATEWAY_URL": url, "VLLM_API_KEY": key or key_of(self.name)}
        work = home / "work"
        work.mkdir()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(block.text for block in blocks)],
            env=self._environment(home, proxy or "http://127.0.0.1:9") | variables,
            cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROGRAM_S, check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr, work)

    def _environment(self, home: Path, proxy: str) -> dict[str, str]:
        """Return an environment in which nothing of the test's own tells a program something."""
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        path = os.pathsep.join([*map(str, self.directories()), os.environ["PATH"]])
        return {**proxies, **direct, "HOME": str(home), "PATH": path}


@dataclass(frozen=True)
class Agent(Program):
    """An agent.

    Attributes:
        client: The word of `vllm-service connect`.
        tool: The tool of it that the model calls.
        path: The route that it asks.
    """

    client: str
    tool: str
    path: str

    def connect(self, home: Path, url: str) -> None:
        """Have the command write its configuration, as its section says."""
        connected(home, self.client, VLLM_GATEWAY_URL=url, VLLM_API_KEY=key_of(self.name))


def connected(home: Path, *arguments: str, **variables: str) -> str:
    """Run `vllm-service connect` in a home directory, and return what it prints."""
    command = [sys.executable, "-m", "service.cli.main", "connect", *arguments]
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], **variables}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CLAUDE_CODE = Agent("Claude Code", client_env.npm_programs, "claude", "Write", "/v1/messages")
CODEX = Agent("Codex", client_env.npm_programs, "codex", "exec_command", "/v1/responses")
OPENCODE = Agent("opencode", client_env.npm_programs, "opencode", "write", "/v1/chat/completions")
AGENTS = [CLAUDE_CODE, CODEX, OPENCODE]
VLLM_BENCH, GUIDELLM, LM_EVAL = LOADS = [
    Program(section, client_env.loads) for section in ("vllm bench serve", "guidellm", "lm-eval")
]
