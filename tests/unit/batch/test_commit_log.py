"""Output and error file of a batch: what stands in them after an end at any moment."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from service.batch import commit_log
from service.batch.commit_log import CommitLog
from service.batch.lines import BadLine, Line
from service.errors import UsageError

FIRST, SECOND = Line(1, "a", "/v1/embeddings", b"{}"), Line(2, "b", "/v1/embeddings", b"{}")


def opened(directory: Path, **options: Any) -> CommitLog:
    """Return the log in a directory."""
    return CommitLog(directory / "out", directory / "err", **options)


def records(file: Path) -> list[Any]:
    """Return the records of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_and_errors_stand_in_their_files_in_the_shape_of_openai(tmp_path: Path) -> None:
    """Status 200 is the output's, everything else the error file's."""
    log = opened(tmp_path, prefix="7_")
    log.add_answer(FIRST, 200, "r1", b'{"a":1}')
    log.add_answer(SECOND, 400, "r2", b'{"error":{}}')
    log.add_error(BadLine(3, None, "invalid_json", "Line 3: no."), "invalid_json", "Line 3: no.")
    log.close()

    response = {"status_code": 200, "request_id": "r1", "body": {"a": 1}}
    assert records(tmp_path / "out") == [{"id": "batch_req_7_1", "custom_id": "a", "response": response, "error": None}]
    bad, none = records(tmp_path / "err")
    assert bad["response"]["status_code"] == 400
    assert none == {
        "id": "batch_req_7_3",
        "custom_id": None,
        "response": None,
        "error": {"code": "invalid_json", "message": "Line 3: no.", "line": 3},
    }
    assert ((tmp_path / "out").stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize("body", [b'{\n "a": [1,\r\n 2]}', b'{"a":[1,2]}\n'])
def test_answer_of_several_lines_becomes_one(tmp_path: Path, body: bytes) -> None:
    """Another service may indent its JSON."""
    log = opened(tmp_path)
    log.add_answer(FIRST, 200, "r", body)

    assert records(tmp_path / "out")[0]["response"]["body"] == {"a": [1, 2]}


def test_answer_that_is_no_json_becomes_a_string(tmp_path: Path) -> None:
    """Such as the page of a proxy in between."""
    log = opened(tmp_path)
    log.add_answer(FIRST, 502, "r", b"<html>\n\xff")

    assert records(tmp_path / "err")[0]["response"]["body"] == "<html>\n\ufffd"


@pytest.mark.parametrize("end", range(0, 400, 7))
def test_log_that_ends_within_a_record_goes_on_after_the_last_whole_one(tmp_path: Path, end: int) -> None:
    """Whatever the byte at which it was cut: what is whole counts, and nothing else stays."""
    log = opened(tmp_path)
    for number in range(1, 5):
        log.add_answer(Line(number, f"id {number}", "/v1/embeddings", b"{}"), 200, "r", b'{"b":2}')
    log.close()
    os.truncate(tmp_path / "out", min(end, (tmp_path / "out").stat().st_size))

    again = opened(tmp_path)

    assert again.done == {1, 2, 3, 4} - {*range(again.completed + 1, 5)}
    assert [one["custom_id"] for one in records(tmp_path / "out")] == [
        f"id {number}" for number in range(1, again.completed + 1)
    ]


def test_zeros_of_a_page_that_was_not_written_are_cut_off(tmp_path: Path) -> None:
    """After a loss of power a file may have its length and not its content."""
    log = opened(tmp_path)
    log.add_answer(FIRST, 200, "r", b"{}")
    log.close()
    with (tmp_path / "out").open("ab") as file:
        file.write(b"\0" * 100 + b"}\n")

    assert opened(tmp_path).done == {1}
    assert len(records(tmp_path / "out")) == 1


def test_files_of_another_batch_are_refused(tmp_path: Path) -> None:
    """They stay as they are."""
    log = opened(tmp_path, prefix="a_")
    log.add_answer(FIRST, 200, "r", b"{}")
    log.close()

    with pytest.raises(UsageError, match="batch_req_a_1"):
        opened(tmp_path, prefix="b_")
    assert len(records(tmp_path / "out")) == 1


def test_record_that_does_not_fit_on_the_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one begins a line."""
    log = opened(tmp_path)
    write, wrote = os.write, []

    def full(file: int, data: bytes) -> int:
        if wrote:
            raise OSError(28, "No space left on device")
        wrote.append(write(file, bytes(data)[:10]))
        return 10

    with monkeypatch.context() as patch:
        patch.setattr(commit_log.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            log.add_answer(FIRST, 200, "r", b"{}")
    log.add_answer(SECOND, 200, "r", b"{}")

    assert [one["custom_id"] for one in records(tmp_path / "out")] == ["b"]
    assert log.done == {2}


def test_commit_is_called_only_where_something_was_added(tmp_path: Path) -> None:
    """A volume's commit costs a second."""
    commits: list[int] = []
    log = opened(tmp_path, commit=lambda: commits.append(log.completed))

    async def work() -> None:
        await log.commit()
        await log.commit()
        log.add_answer(FIRST, 200, "r", b"{}")
        await log.commit()

    asyncio.run(work())

    assert commits == [0, 1]
