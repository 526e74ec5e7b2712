"""`vllm-service boots --modal`: the real client reads the replicas' records from the volume."""

from __future__ import annotations

import dataclasses
import json
import subprocess

import modal
import pytest

from service.boots.records import BootRecord, Span, new_id
from service.errors import ServiceError
from service.modal_app import client
from service.volumes import VLLM_CACHE, volume_name
from tests.contract.commands import run
from tests.fakes.modal import ModalPlane

VOLUME = volume_name(VLLM_CACHE)
RECORD = BootRecord(
    id="",
    at="2026-11-20T09:00:00+00:00",
    model="qwen3-8b",
    revision=None,
    gpu="H100",
    strategy="gpu",
    restored=True,
    fast_boot=True,
    versions={"vllm": "0.32.0"},
    phases=(Span("restore", 0.0, 4.0),),
    bytes_read=None,
    outcome="ready",
    reason=None,
    seconds=4.5,
)


def boots(plane: ModalPlane, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with an account of the control plane."""
    return run(plane, "boots", "--modal", *arguments, COLUMNS="200", **environment)


def record(minute: int) -> BootRecord:
    """Return a record of this minute."""
    return dataclasses.replace(RECORD, id=new_id(), at=f"2026-11-20T09:{minute:02}:00+00:00")


def files(*records: BootRecord) -> dict[str, bytes]:
    """Return the files that replicas write to the volume."""
    return {f"boots/{one.id}.json": one.to_line().encode() for one in records}


def test_boots_of_modal_are_read_from_the_volume(plane: ModalPlane) -> None:
    """Oldest first, without damaged, partial and foreign files, and without those outside the directory."""
    wanted = [record(minute) for minute in range(40)]
    others = {"boots/half.json": b'{"id": "x"', "boots/.x.json.part": b"", "boots/deep/x.json": b"{}", "x.json": b"{}"}
    plane.volumes.put(VOLUME, files(*reversed(wanted)) | others | {"boots/empty.json": b""})
    done = boots(plane, "--json")

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [one.as_object() for one in wanted]


def test_boots_of_modal_are_shown_like_those_of_a_machine(plane: ModalPlane) -> None:
    """The same table."""
    plane.volumes.put(VOLUME, files(one := record(5)))

    assert one.id in boots(plane).stdout


def test_boots_of_modal_with_a_volume_prefix_are_read_from_that_volume(plane: ModalPlane) -> None:
    """Those of the volume without the prefix are another deployment's."""
    plane.volumes.put(VOLUME, files(record(5)))
    plane.volumes.put(f"team-{VOLUME}", files(one := record(6)))
    done = boots(plane, "--json", SERVICE_VOLUME_PREFIX="team-")

    assert json.loads(done.stdout) == [one.as_object()]


def test_boots_of_modal_before_the_first_are_none(plane: ModalPlane) -> None:
    """The deploy has made the volume; no replica has booted."""
    plane.volumes.put(VOLUME, {"torch_compile_cache/x": b"1"})
    plain, as_json = boots(plane), boots(plane, "--json")

    assert (plain.returncode, plain.stderr, plain.stdout.count("\n")) == (0, "", 1)
    assert f"No boots are recorded yet in Modal's volume '{VOLUME}'" in plain.stdout
    assert (as_json.returncode, as_json.stdout) == (0, "[]\n")


def test_boots_of_modal_without_the_volume_say_how_it_is_made(plane: ModalPlane) -> None:
    """Nothing was deployed, or in another workspace; the command creates no volume."""
    done = boots(plane, "--json")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: Modal has no volume '{VOLUME}'")
    _, hint = done.stderr.splitlines()
    assert hint.startswith("hint: The first deploy makes it: vllm-service deploy.")
    assert list(plane.volumes) == []


def test_boots_of_a_modal_out_of_reach_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line. The client gives up after a minute; here it does at once."""

    def refused(_: object) -> None:
        raise modal.exception.ConnectionError("Could not connect to the Modal server.\nhttp://127.0.0.1:9")

    monkeypatch.setattr(modal.Volume, "hydrate", refused)
    with pytest.raises(ServiceError, match=f"Volume '{VOLUME}' cannot be read from Modal: Could not") as raised:
        client.boots(None)

    assert "\n" not in str(raised.value)
