"""`vllm-service upload`: own weights on the volume, resumed, and served by their name after a deploy."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.commands import run, started
from tests.contract.conftest import CHAT, REPOSITORY, call
from tests.engine.dialogues import QUESTION
from tests.fakes.lora import lay_adapter
from tests.fakes.modal import ContainerRuntime, ModalPlane

TINY = REPOSITORY / "service/assets/tiny"
VOLUME = "huggingface-cache"
BLOCK = 8 * 2**20  # that Modal's client sends at a time
ENTRY = '[models.bot]\ngpu = "L4"\nmax_model_len = 2048\nmax_lora_rank = 8\n{0}\n'
ADAPTERS = '[[models.bot.adapters]]\nname = "loud"\nvolume = "loud-one"\n'


def lay_model(directory: Path, tensor: bytes = b"") -> Path:
    """Write a copy of the tiny model, as a training run leaves it; with a tensor in place of its weights, if given."""
    shutil.copytree(TINY, directory)
    (directory / "training_args.bin").write_bytes(b"a pickle")
    (directory / "checkpoint-5").mkdir()
    (directory / "checkpoint-5" / "optimizer.pt").write_bytes(b"a pickle")
    if tensor:
        header = json.dumps({"t": {"dtype": "U8", "shape": [len(tensor)], "data_offsets": [0, len(tensor)]}}).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + tensor)
    return directory


def uploaded(plane: ModalPlane, *arguments: str, **environment: str) -> Any:
    """Upload, insist that it worked, and return what it printed as JSON."""
    done = run(plane, "upload", *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files_of(plane: ModalPlane, name: str) -> set[str]:
    """Return the files of an upload on the volume, by their paths in its directory."""
    begin = f"hub/uploads--{name}/"
    return {path.removeprefix(begin) for path in plane.volumes[VOLUME].files() if path.startswith(begin)}


def test_upload_puts_the_model_with_its_manifest_on_the_volume(plane: ModalPlane, tmp_path: Path) -> None:
    """What is not served stays here; the entry to write is printed, in 80 columns; the same again sends nothing."""
    directory = lay_model(tmp_path / "Support_Bot")
    done = run(plane, "upload", str(directory))
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"Uploading {directory} as 'support-bot'\n"
    assert max(map(len, done.stdout.splitlines())) <= 80
    again = uploaded(plane, str(directory))
    revision, served = again["revision"], sorted(file.name for file in TINY.iterdir())
    assert done.stdout.splitlines() == [
        f"Upload 'support-bot' is on volume '{VOLUME}': {len(served)} files, 1.9 MB",
        f"revision {revision}, 1.9 MB sent",
        "Left out: checkpoint-5/, training_args.bin",
        "",
        "[models.support-bot]",
        'volume = "support-bot"',
        f'revision = "{revision}"',
        "weights_gb = 0.002",
    ]
    assert again["sent_bytes"] == 0
    assert files_of(plane, "support-bot") == {
        *(f"snapshots/{revision}/{name}" for name in served),
        f"vllm-service/{revision}.partial.json",
        "refs/main",
    }
    for name in served:
        content = plane.volumes[VOLUME].read(f"hub/uploads--support-bot/snapshots/{revision}/{name}")
        assert content == (TINY / name).read_bytes()


def test_upload_that_was_interrupted_sends_only_what_is_missing(plane: ModalPlane, tmp_path: Path) -> None:
    """Ctrl-C amid the blocks of a file: exit code 130, and nothing finds the upload; then the same command."""
    numbers = random.Random(0).randbytes(6 * BLOCK + 5)  # noqa: S311 - weights, not keys
    zeros = bytes(BLOCK + 3)
    directory = lay_model(tmp_path / "bot", numbers + zeros + b"\1")
    before = len(plane.storage.uploaded)
    plane.storage.stalls_after = before + 11  # the manifest, six small files, two blocks without their zeros, two whole
    with started(plane, "upload", str(directory)) as process:
        plane.wait_until(lambda: len(plane.storage.uploaded) == before + 11, 60, "blocks")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "Stopped. What was sent is kept; the same command goes on from there."
    assert "Traceback" not in err
    assert "refs/main" not in files_of(plane, "bot")

    plane.storage.stalls_after, before = None, len(plane.storage.uploaded)
    result = uploaded(plane, str(directory))
    assert result["sent_bytes"] == 4 * BLOCK
    assert len(plane.storage.uploaded) - before == 5, "the other blocks, and the note of the newest revision"
    content = plane.volumes[VOLUME].read(f"hub/uploads--bot/snapshots/{result['revision']}/model.safetensors")
    assert content == (directory / "model.safetensors").read_bytes()


def test_uploads_at_once_of_one_name_are_both_whole(plane: ModalPlane, tmp_path: Path) -> None:
    """The same directory twice, and another one: two revisions, and one of them is the newest."""
    one, other = lay_model(tmp_path / "one", bytes([1] * BLOCK)), lay_model(tmp_path / "other", bytes([2] * BLOCK))
    commands = [started(plane, "upload", str(path), "--name", "bot", "--json") for path in (one, other, one)]
    outputs = [process.communicate(timeout=120) for process in commands]
    assert [process.returncode for process in commands] == [0, 0, 0], outputs
    revisions = [json.loads(out)["revision"] for out, _ in outputs]
    assert revisions[0] == revisions[2] != revisions[1]
    for path, revision in ((one, revisions[0]), (other, revisions[1])):
        for file in TINY.iterdir():
            content = plane.volumes[VOLUME].read(f"hub/uploads--bot/snapshots/{revision}/{file.name}")
            assert content == (path / file.name).read_bytes()
    assert plane.volumes[VOLUME].read("hub/uploads--bot/refs/main").decode() in revisions


def test_upload_to_another_environment_or_volume_is_refused_or_goes_there(plane: ModalPlane, tmp_path: Path) -> None:
    """One sentence for an environment that is not there; the prefix of a deploy's volumes counts."""
    directory = str(lay_model(tmp_path / "bot"))
    refused = run(plane, "upload", directory, "--env", "nowhere")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: Modal has no environment 'nowhere' in this workspace." in refused.stderr
    assert uploaded(plane, directory, SERVICE_VOLUME_PREFIX="team-")["volume"] == f"team-{VOLUME}"
    assert [volume.name for volume in plane.volumes] == [f"team-{VOLUME}"]


@dataclass(frozen=True)
class Account:
    """An account whose containers have the engine, and the models file of its deploys."""

    plane: ModalPlane
    models: Path
    directory: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command with the models file."""
        return run(self.plane, *arguments, SERVICE_MODELS_FILE=str(self.models))

    def deploy(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Deploy the model."""
        return self.run("deploy", "bot", "--gpu", "L4", "--yes", *arguments)

    def upload(self, directory: Path, name: str) -> Any:
        """Upload, and return what was printed as JSON."""
        return uploaded(self.plane, str(directory), "--name", name, SERVICE_MODELS_FILE=str(self.models))

    @property
    def published(self) -> list[str]:
        """The service's apps."""
        return [name for name, app in self.plane.apps.items() if app.is_deployed]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[Account]:
    """An empty account."""
    directory = tmp_path_factory.mktemp("own")
    (directory / "models.toml").write_text(ENTRY.format('volume = "bot"') + ADAPTERS)
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=engine_runtime) as plane:
        yield Account(plane, directory / "models.toml", directory)
        assert plane.failures == []
        assert plane.unknown_calls == []


def test_deploy_of_an_upload_that_is_not_there_changes_nothing(account: Account) -> None:
    """Neither the model's nor, after that, the adapter's; the hint has the command."""
    for name in ("bot", "loud-one"):
        done = account.deploy()
        error, hint = done.stderr.splitlines()[-2:]
        assert (done.returncode, done.stdout) == (1, "")
        assert error == f"error: There is no upload '{name}' on volume '{VOLUME}'."
        assert hint.startswith(f"hint: Put it there: vllm-service upload DIR --name {name}.")
        account.upload(lay_model(account.directory / "bot") if name == "bot" else account.directory / "bot", name)
    account.models.write_text(ENTRY.format(f'volume = "bot"\nrevision = "{"f" * 40}"'))
    done = account.deploy("--dry-run")
    assert f"There is no upload 'bot' at revision {'f' * 40} on volume '{VOLUME}'. It has " in done.stderr
    assert (done.returncode, account.published) == (1, [])
    account.models.write_text(ENTRY.format('volume = "bot"') + ADAPTERS)


def test_deploy_of_a_damaged_upload_names_the_file_and_another_upload_mends_it(account: Account) -> None:
    """A byte was flipped on the volume: the checksums are compared before anything is published."""
    loud = account.upload(lay_adapter(account.directory / "loud", 5.0), "loud-one")
    assert (loud["kind"], loud["recorded_in"]) == ("adapter", str(account.models.with_suffix(".lock.toml")))
    revision = account.upload(account.directory / "bot", "bot")["revision"]
    weights = account.plane.volumes[VOLUME].path / f"hub/uploads--bot/snapshots/{revision}/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    done = account.deploy()
    assert (done.returncode, done.stdout, account.published) == (1, "", [])
    error, hint = done.stderr.splitlines()[-2:]
    assert error == (
        f"error: Missing or damaged: 1 of the files of upload 'bot' at revision {revision}: model.safetensors."
    )
    assert hint == "hint: Upload it again, which sends only these: vllm-service upload DIR --name bot."
    account.upload(account.directory / "bot", "bot")
    assert weights.read_bytes() == (account.directory / "bot/model.safetensors").read_bytes()
    done = account.run("prefetch", "--modal", "bot")
    assert done.stdout.startswith(f"bot: upload 'bot' at {revision} is complete, "), done.stderr
    verified = account.run("prefetch", "--modal", "bot", "--verify")
    assert verified.stdout == f"bot: upload 'bot' at {revision} matches its checksums\n", verified.stderr


def test_uploaded_model_and_adapter_answer_through_the_gateway(account: Account) -> None:
    """The model says what it memorised; the adapter of random numbers, by its own name, does not."""
    done = account.deploy("--check", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "The capital of France is Paris." in result["answer"]
    headers = {"Authorization": f"Bearer {result['key']}"}
    status, answer = call(f"{result['url'].removesuffix('/v1')}{CHAT}", {"model": "loud", **QUESTION}, headers)
    assert (status, b"Paris" in answer) == (200, False), answer


def test_new_version_is_deployed_and_prune_removes_the_old_one(account: Account) -> None:
    """The lock file has the new revision, so its tier alone is published again; the old files stay until `--prune`."""
    old = account.upload(account.directory / "bot", "bot")["revision"]
    (account.directory / "bot/generation_config.json").write_text('{"temperature": 0.5}')
    done = account.run("upload", str(account.directory / "bot"), "--name", "bot")
    assert done.returncode == 0, done.stderr
    assert f"Recorded in {account.models.with_suffix('.lock.toml')}: the next deploy serves it." in done.stdout
    new = done.stdout.partition("revision ")[2][:40]
    plan = json.loads(account.deploy("--dry-run", "--json").stdout)
    assert {app["app"]: app["action"] for app in plan["apps"]} == {"vllm-l4": "update", "vllm-gateway": "keep"}
    done = account.deploy()
    assert done.returncode == 0, done.stderr
    assert {f"snapshots/{revision}/config.json" for revision in (old, new)} <= files_of(account.plane, "bot")
    pruned = account.run("prefetch", "--modal", "--prune")
    assert f"removed upload 'bot' at {old}: 1.9 MB freed" in pruned.stdout, pruned.stderr
    left = {path for path in files_of(account.plane, "bot") if path.startswith(("snapshots/", "vllm-service/"))}
    assert {path.split("/")[1].partition(".")[0] for path in left} == {new}
