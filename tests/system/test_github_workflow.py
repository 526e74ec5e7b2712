"""The example of a deploy by GitHub Actions: its shell steps, as a runner runs them, against the control plane."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.contract.commands import run
from tests.docs.clone import lay_clone
from tests.engine.running import REPOSITORY
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

WORKFLOW = yaml.safe_load((REPOSITORY / "examples/github/deploy.yml").read_text())
JOB = WORKFLOW["jobs"]["deploy"]
SHELL = [
    "bash",
    "--noprofile",
    "--norc",
    "-eo",
    "pipefail",
    "-c",
]  # GitHub's for `shell: bash`; the default lacks pipefail
MINE = '[models.mine]\nhub_id = "me/mine"\nrevision = "{0}"\ngpu = "L4"\n'


class Runner:
    """A checkout, and what a runner gives the steps of the job.

    Args:
        directory: Empty.
        plane: Modal.
    """

    def __init__(self, directory: Path, plane: ModalPlane) -> None:
        self.checkout, self.plane, self.summary = directory / "checkout", plane, directory / "summary.md"
        lay_clone(self.checkout)
        self._path = os.pathsep.join([str(self.checkout / ".venv/bin"), os.environ["PATH"]])
        self._home = directory

    def run(self, *names: str, **secrets: str) -> subprocess.CompletedProcess[str]:
        """Run these steps, until one fails; return the last."""
        given = {"MODAL_TOKEN_ID": self.plane.env["MODAL_TOKEN_ID"], "VLLM_API_KEY": "", **secrets}
        given["MODAL_TOKEN_SECRET"] = self.plane.env["MODAL_TOKEN_SECRET"]
        names_of_ours = ("SERVICE_", "MODAL_", "VLLM_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(names_of_ours)}
        secret = re.compile(r"\$\{\{ secrets\.(\w+) \}\}")
        job = {name: secret.sub(lambda found: given[found[1]], text) for name, text in JOB["env"].items()}
        plane = {name: self.plane.env[name] for name in ("MODAL_SERVER_URL", "MODAL_ENVIRONMENT")}
        runner = {"HOME": str(self._home), "PATH": self._path, "GITHUB_STEP_SUMMARY": str(self.summary)}
        runner["SERVICE_MODEL"] = "tiny"  # whose weights no hub must have
        for step in (step for step in JOB["steps"] if step.get("name") in names):
            done = subprocess.run(
                [*SHELL, step["run"]], cwd=self.checkout, env={**inherited, **plane, **runner, **job},
                capture_output=True, text=True, timeout=180, check=False,
            )  # fmt: skip
            if done.returncode:
                break
        return done


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with an empty account."""
    runtime = ContainerRuntime(client_path=client_directory(tmp_path_factory.mktemp("client")))
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=runtime) as plane:
        yield Runner(tmp_path_factory.mktemp("runner"), plane)
        assert plane.failures == []
        assert plane.unknown_calls == []


def test_workflow_pins_its_actions_and_has_no_secret_of_its_own() -> None:
    """By commits, with read access alone; its token and key are secrets of the repository."""
    used = [step["uses"] for step in JOB["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert WORKFLOW["defaults"] == {"run": {"shell": "bash"}}
    assert WORKFLOW["permissions"] == {"contents": "read"}
    secrets = {name: value for name, value in JOB["env"].items() if name != "SERVICE_MODELS_FILE"}
    assert secrets == {
        name: f"${{{{ secrets.{name} }}}}" for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "VLLM_API_KEY")
    }


def test_workflow_of_an_empty_account_makes_nothing_and_no_key_is_in_its_log(runner: Runner) -> None:
    """The first deploy is a person's, who sees the key."""
    (runner.checkout / "models.toml").write_text(MINE.format("a" * 40))
    done = runner.run("Install", "Plan", "Deploy")
    assert done.returncode == 1
    assert "::error::These secrets are missing at Modal" in done.stdout
    assert "sk-" not in done.stdout + done.stderr
    assert (runner.plane.secrets.names(), list(runner.plane.apps)) == ([], [])


def test_workflow_deploys_what_has_changed_and_asks_the_gateway(runner: Runner) -> None:
    """After a deploy by hand: a no-op, and the tier of a changed entry; the summary has URL and apps."""
    environment = {"SERVICE_MODEL": "tiny", "SERVICE_MODELS_FILE": str(runner.checkout / "models.toml")}
    key = json.loads(run(runner.plane, "deploy", "--yes", "--json", **environment).stdout)["key"]
    assert runner.run("Install", "Plan", "Deploy", VLLM_API_KEY=key).returncode == 0
    (runner.checkout / "models.toml").write_text(MINE.format("b" * 40))
    done = runner.run("Install", "Plan", "Deploy", VLLM_API_KEY=key)
    assert done.returncode == 0, done.stderr
    first, second = runner.summary.read_text().splitlines()
    assert first.endswith("/v1 nothing has changed")
    assert second.endswith("/v1 vllm-l4")
    assert key not in done.stdout + done.stderr + runner.summary.read_text()
