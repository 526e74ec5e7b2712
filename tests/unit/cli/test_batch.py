"""`vllm-service batch` at the real command line, against a gateway that answers as a test has it."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.batch.lines import BadLine, Line
from service.cli import batch_input, main
from tests.unit.cli.gateway_stub import Stub, serving
from tests.unit.cli.outputs import check_error

COMMAND = Path(sys.executable).with_name("vllm-service")
BODIES_URL = "/v1/chat/completions"
Refused = Callable[..., tuple[int | str | None, str]]


def echo(body: Any) -> tuple[int, dict[str, str], Any]:
    """Answer with the question; `refuse` in it is a 400."""
    text = body["messages"][-1]["content"]
    if "refuse" in text:
        return 400, {}, {"error": {"message": "It has a wrong word.", "code": None}}
    choice = {"message": {"role": "assistant", "content": text.upper()}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return 200, {"X-Request-Id": "req-1", "X-Cost-Usd": "0.00010000"}, {"choices": [choice], "usage": usage}


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A gateway that echoes, and insists on a key."""
    with serving("sk-1", answer=echo) as stub:
        yield stub


@pytest.fixture
def environ(tmp_path: Path, stub: Stub) -> dict[str, str]:
    """Where and by which key the command finds it."""
    return {
        "HOME": str(tmp_path), "PATH": "/nowhere", "COLUMNS": "80", "VLLM_GATEWAY_URL": stub.url,
        "VLLM_API_KEY": "sk-1",
    }  # fmt: skip


def started(environ: dict[str, str], *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command in its home."""
    return subprocess.Popen(
        [str(COMMAND), "batch", *arguments], env=environ, cwd=environ["HOME"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def ran(environ: dict[str, str], *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    with started(environ, *arguments, **options) as process:
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def refused(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command in this process; return its exit code and what it says on standard error."""

    def command(*arguments: str) -> tuple[int | str | None, str]:
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            patch.chdir(environ["HOME"])
            patch.setattr(sys, "argv", ["vllm-service", "batch", *arguments])
            before = signal.getsignal(signal.SIGINT)
            try:
                code = main._run()
            finally:
                signal.signal(signal.SIGINT, before)
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return command


def line(custom_id: str, text: str, **fields: Any) -> str:
    """Return a line as OpenAI has it."""
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": BODIES_URL, "body": body})


def write(directory: Path, name: str, *lines: str | bytes) -> Path:
    """Write a file of lines."""
    path = directory / name
    path.write_bytes(b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in lines))
    return path


def records(path: Path) -> list[Any]:
    """Return the records of a file."""
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_batch_answers_each_line_once_and_sums_up(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """Records are OpenAI's; the summary has tokens and cost; the same command again sends nothing."""
    write(tmp_path, "in.jsonl", *(line(f"q{n}", f"hello {n}", model="a") for n in range(20)))
    done = ran(environ, "in.jsonl", "-o", "out.jsonl", "--model", "tiny", "--field", "temperature=0", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["completed"], summary["failed"], summary["tokens_in"], summary["tokens_out"]) == (20, 0, 140, 60)
    assert summary["dollars"] == pytest.approx(0.002)
    answers = {one["custom_id"]: one for one in records(tmp_path / "out.jsonl")}
    assert set(answers) == {f"q{n}" for n in range(20)}
    answer = answers["q7"]["response"]
    assert (answer["status_code"], answer["request_id"]) == (200, "req-1")
    assert answer["body"]["choices"][0]["message"]["content"] == "HELLO 7"
    assert {(body["model"], body["temperature"]) for body in stub.bodies} == {("tiny", 0)}
    assert (tmp_path / "out.jsonl").stat().st_mode & 0o077 == 0
    again = ran(environ, "in.jsonl", "-o", "out.jsonl", "--model", "tiny", "--field", "temperature=0")
    assert (again.returncode, len(stub.bodies)) == (0, 20)
    assert "20 of 20 lines are answered in out.jsonl, 20 of them by earlier runs" in " ".join(again.stdout.split())


def test_batch_takes_bodies_alone_where_their_keys_tell_the_route(tmp_path: Path, environ: dict[str, str]) -> None:
    """A body without messages or prompt is in the error file with its number, as is a line that is no JSON."""
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    write(tmp_path, "in.jsonl", body, "", '{"input": "text"}', "no json", body)
    done = ran(environ, "in.jsonl", "-o", "out.jsonl")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2] == "error: 2 of 4 lines failed: 'out.errors.jsonl' has each with its number."
    assert {one["custom_id"] for one in records(tmp_path / "out.jsonl")} == {"line-1", "line-5"}
    assert {one["error"]["line"] for one in records(tmp_path / "out.errors.jsonl")} == {3, 4}


def test_batch_keeps_wrong_and_refused_lines_apart_and_goes_on(tmp_path: Path, environ: dict[str, str]) -> None:
    """A 400 is not repeated; a torn, a duplicate and a 100 MB line stop nothing; each has its number."""
    lines = [line("a", "hello"), line("b", "refuse"), '{"custom_id": "c"', line("a", "again")]
    path = write(tmp_path, "in.jsonl", *lines, b"\xff\xfe\xff", b"x" * 100_000_000, line("z", "last"))
    done = ran(environ, path.name, "-o", "out.jsonl")
    assert done.returncode == 1, done.stderr
    assert {one["custom_id"] for one in records(tmp_path / "out.jsonl")} == {"a", "z"}
    failed = records(tmp_path / "out.errors.jsonl")
    wrong = {one["error"]["line"]: one["error"]["code"] for one in failed if one["error"]}
    assert set(wrong) == {3, 4, 5, 6}
    assert (wrong[4], wrong[6]) == ("duplicate_custom_id", "line_too_long")
    (refused,) = [one for one in failed if one["response"]]
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("b", 400)


def test_batch_sends_failed_lines_again_once_their_file_is_gone(
    tmp_path: Path, environ: dict[str, str], stub: Stub
) -> None:
    """And no other line."""
    write(tmp_path, "in.jsonl", line("a", "hello"), line("b", "refuse"))
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 1
    (tmp_path / "out.errors.jsonl").unlink()
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 1
    assert Counter(body["messages"][0]["content"] for body in stub.bodies) == {"hello": 1, "refuse": 2}


def test_batch_waits_for_a_model_that_wakes(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """503 and 429 with Retry-After are waited for, and what the service says is shown."""
    seen = Counter[str]()

    def answer(body: Any) -> tuple[int, dict[str, str], Any]:
        text = body["messages"][0]["content"]
        seen[text] += 1
        if seen[text] <= 2:
            status = 503 if seen[text] == 1 else 429
            return status, {"Retry-After": "1"}, {"error": {"message": "It is waking.", "code": "model_waking"}}
        return echo(body)

    stub.answer = answer
    write(tmp_path, "in.jsonl", line("a", "one"), line("b", "two"))
    done = ran(environ, "in.jsonl", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert seen == {"one": 3, "two": 3}
    assert "It is waking." in done.stderr


def slow(body: Any) -> tuple[int, dict[str, str], Any]:
    """Answer after a moment."""
    time.sleep(0.05)
    return echo(body)


def answered(path: Path) -> int:
    """Return how many whole records a file has."""
    return path.read_bytes().count(b"}\n") if path.exists() else 0


def wait_for_more(path: Path, count: int) -> None:
    """Wait until a file has more records."""
    deadline = time.monotonic() + 30
    while answered(path) <= count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_batch_ended_by_a_signal_keeps_what_is_done(
    number: signal.Signals, tmp_path: Path, environ: dict[str, str], stub: Stub
) -> None:
    """Exit code 130 and one sentence; the same command answers the rest, and no line twice."""
    stub.answer = slow
    write(tmp_path, "in.jsonl", *(line(f"q{n}", f"hello {n}") for n in range(150)))
    with started(environ, "in.jsonl", "-o", "out.jsonl") as process:
        wait_for_more(tmp_path / "out.jsonl", 5)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, ""), err
    kept = answered(tmp_path / "out.jsonl")
    assert err.splitlines()[-1] == f"Stopped. {kept} of 150 lines are kept; the same command goes on from there."
    assert 0 < kept < 150
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert Counter(one["custom_id"] for one in records(tmp_path / "out.jsonl")) == {f"q{n}": 1 for n in range(150)}


def test_batch_killed_three_times_answers_each_line_once(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """And a record that is torn is cut off, and its line answered again."""
    stub.answer = slow
    write(tmp_path, "in.jsonl", *(line(f"q{n}", f"hello {n}") for n in range(300)))
    out = tmp_path / "out.jsonl"
    for _ in range(3):
        with started(environ, "in.jsonl", "-o", "out.jsonl") as process:
            wait_for_more(out, answered(out) + 5)
            process.kill()
        with out.open("ab") as file:
            file.write(b'{"id":"batch_req_')
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert Counter(one["custom_id"] for one in records(out)) == {f"q{n}": 1 for n in range(300)}


def test_batch_with_fields_for_bodies_that_are_no_utf_8_goes_on(tmp_path: Path, environ: dict[str, str]) -> None:
    """The line is in the error file, and the others are answered."""
    torn = b'{"custom_id":"u","method":"POST","url":"/v1/chat/completions","body":{"\xff":1}}'
    write(tmp_path, "in.jsonl", line("a", "hello"), torn, line("b", "hello"))
    done = ran(environ, "in.jsonl", "-o", "out.jsonl", "--model", "tiny")
    assert done.returncode == 1, done.stderr
    assert {one["custom_id"] for one in records(tmp_path / "out.jsonl")} == {"a", "b"}
    (failed,) = records(tmp_path / "out.errors.jsonl")
    assert failed["error"]["line"] == 2


def test_line_for_another_model_than_that_of_the_batch_is_a_bad_line() -> None:
    """One that names it by another name, or names none, gets its key."""
    lines = [
        Line(n, f"q{n}", BODIES_URL, body) for n, body in enumerate([b"{}", b'{"model":"llm"}', b'{"model":"b"}'], 1)
    ]
    found = list(batch_input.for_model(lines, "a", lambda name: name == "llm"))
    assert [one.body for one in found if isinstance(one, Line)] == [b'{"model":"a"}'] * 2
    assert [(one.number, one.code) for one in found if isinstance(one, BadLine)] == [(3, "model_not_found")]


TABLE = ["id,text", "1,good", '2,"bad, ""very""\nbad"', "3", "4,refuse"]


def test_batch_of_a_table_fills_its_columns(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """Rows keep their order and cells; a row of the wrong width and a refused one say so in theirs."""
    write(tmp_path, "in.csv", "\ufeff" + TABLE[0], *TABLE[1:])
    done = ran(environ, "in.csv", "-o", "out.csv", "--prompt", "Is {text} {{good}}?", "--system", "Short.")
    assert done.returncode == 1, done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["id", "text", "answer", "error"],
        ["1", "good", "IS GOOD {GOOD}?", ""],
        ["2", 'bad, "very"\nbad', 'IS BAD, "VERY"\nBAD {GOOD}?', ""],
        ["", "", "", "Line 5: it has 1 cells, and the first line has 2."],
        ["4", "refuse", "", "It has a wrong word."],
    ]
    assert stub.bodies[0]["messages"][0] == {"role": "system", "content": "Short."}
    assert stat.S_IMODE((tmp_path / "out.csv").stat().st_mode) == 0o600
    again = ran(environ, "in.csv", "-o", "out.csv", "--prompt", "Is {text} {{good}}?", "--system", "Short.")
    assert "2 of 4 lines failed" in again.stderr, "a table of the same batch is written anew"


@pytest.mark.parametrize("answers", [None, ""])
def test_batch_leaves_a_table_that_it_has_not_written(answers: str | None, tmp_path: Path, refused: Refused) -> None:
    """Before anything is sent; a run that ended before its first answer has left an empty file of records."""
    write(tmp_path, "in.csv", "id,text", "1,good")
    customers = write(tmp_path, "customers.csv", "name", "Ada")
    if answers is not None:
        (tmp_path / "customers.answers.jsonl").write_text(answers)
    code, err = refused("in.csv", "-o", "customers.csv", "--prompt", "{text}")
    assert code == 2
    assert err.startswith("error: 'customers.csv' has something else than a batch's answers")
    check_error(err)
    assert customers.read_text() == "name\nAda\n"


def test_batch_with_a_schema_makes_a_column_of_each_property(
    tmp_path: Path, environ: dict[str, str], stub: Stub
) -> None:
    """The schema is in every request; an answer that is no object of it is in the column of errors."""
    schema = {"type": "object", "properties": {"mood": {"type": "string"}, "id": {"type": "integer"}}}
    write(tmp_path, "schema.json", json.dumps(schema))
    write(tmp_path, "in.csv", "id,text", "1,a", "2,b")

    def answer(body: Any) -> tuple[int, dict[str, str], Any]:
        text = '{"mood": "fine", "id": 9}' if body["messages"][0]["content"] == "a" else '{"mood": "fi'
        return 200, {}, {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}

    stub.answer = answer
    done = ran(environ, "in.csv", "-o", "out.csv", "--prompt", "{text}", "--schema", "schema.json")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[:2] == [["id", "text", "mood", "answer_id", "error"], ["1", "a", "fine", "9", ""]]
    assert rows[2][2:] == ["", "", 'the answer is no JSON object of the schema (finish_reason: length): {"mood": "fi']
    assert all(body["response_format"]["json_schema"]["schema"] == schema for body in stub.bodies)


def test_batch_fills_a_prompt_from_objects_too(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """JSON lines with fields; one without the field is in the error file."""
    write(tmp_path, "in.jsonl", '{"text": "a", "custom_id": "x"}', '{"other": 1}', '{"text": [1, "é"]}')
    done = ran(environ, "in.jsonl", "-o", "out.jsonl", "--prompt", "Say {text}")
    assert done.returncode == 1
    assert {one["custom_id"] for one in records(tmp_path / "out.jsonl")} == {"x", "line-3"}
    assert 'Say [1, "é"]' in {body["messages"][0]["content"] for body in stub.bodies}
    (failed,) = records(tmp_path / "out.errors.jsonl")
    assert failed["error"]["message"] == "Line 2: it has no field 'text', which --prompt names."


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        (None, [], "'in.jsonl' cannot be read: No such file or directory."),
        (b"", [], "'in.jsonl' is empty."),
        (b"\n \n", [], "'in.jsonl' is empty."),
        ("{}".encode("utf-16"), [], "'in.jsonl' is no text in UTF-8."),
        (b"caf\xe9\n", [], "'in.jsonl' is no text in UTF-8."),
        (b"\x1f\x8b\x08\n", [], "'in.jsonl' is no text in UTF-8."),
        (b"{}\n", ["-o", "in.jsonl"], "'in.jsonl' is the input, and would be written."),
        (b"{}\n", ["-o", "./in.jsonl"], "'in.jsonl' is the input, and would be written."),
        (b"{}\n", ["-o", "no/out.jsonl"], "'no/out.jsonl' cannot be written: No such directory."),
        (b"{}\n", ["-o", "out.csv"], "'out.csv' is a table, and 'in.jsonl' is none."),
        (b"{}\n", ["-o", "notes.txt"], "'notes.txt' has something else than a batch's records."),
        (b"{}\n", ["--schema", "notes.txt"], "--schema 'notes.txt' is not JSON"),
        (b"{}\n", ["--field", "stream=true"], "--field stream=true is no field of a request."),
        (b"{}\n", ["--gpu", "L44"], "Unknown GPU 'L44'."),
        (b"{}\n", ["--system", "x"], "--system goes with --prompt."),
    ],
)
def test_batch_with_wrong_input_is_one_sentence_and_writes_nothing(
    content: bytes | None, arguments: list[str], sentence: str, tmp_path: Path, refused: Refused
) -> None:
    """Exit code 2, and a next step; a file of the user's stays as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    code, err = refused("in.jsonl", "-o", "out.jsonl", *arguments)
    assert code == 2
    check_error(err)
    assert err.startswith(f"error: {sentence}")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("lines", "prompt", "sentence"),
    [
        (["id,text", "1,a"], "{txt}", "--prompt has {txt}, which is no column. Did you mean 'text'?"),
        (["id,id", "1,a"], "{id}", "'in.csv' has the column 'id' twice."),
        (["id,text"], "{id}", "'in.csv' has no row."),
        (["id,text", "1,a"], None, "'in.csv' is a table, and no prompt was given."),
    ],
)
def test_batch_of_a_wrong_table_is_one_sentence(
    lines: list[str], prompt: str | None, sentence: str, tmp_path: Path, refused: Refused
) -> None:
    """Before anything is sent."""
    write(tmp_path, "in.csv", *lines)
    code, err = refused("in.csv", "-o", "out.csv", *(["--prompt", prompt] if prompt is not None else []))
    assert code == 2
    assert err.startswith(f"error: {sentence}")


def test_batch_refuses_answers_to_another_input(tmp_path: Path, environ: dict[str, str]) -> None:
    """Or by other options: the lines' numbers would mean others."""
    write(tmp_path, "in.jsonl", line("a", "hello"))
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    done = ran(environ, "in.jsonl", "-o", "out.jsonl", "--field", "temperature=1")
    assert done.returncode == 2
    assert "has answers to another input, or by other options." in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_batch_that_runs_already_is_refused(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """Two commands with one output would answer each line twice."""
    goes_on = threading.Event()

    def answer(body: Any) -> tuple[int, dict[str, str], Any]:
        goes_on.wait(30)
        return echo(body)

    stub.answer = answer
    write(tmp_path, "in.jsonl", line("a", "hello"))
    with started(environ, "in.jsonl", "-o", "out.jsonl") as process:
        deadline = time.monotonic() + 30
        while not stub.bodies:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = ran(environ, "in.jsonl", "-o", "out.jsonl")
        goes_on.set()
        assert process.wait(30) == 0
    assert (second.returncode, len(stub.bodies)) == (2, 1)
    assert second.stderr.startswith("error: Another 'vllm-service batch' writes 'out.jsonl'.")


def test_batch_with_an_unknown_key_sends_nothing(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """One sentence, and no record."""
    write(tmp_path, "in.jsonl", line("a", "hello"))
    done = ran({**environ, "VLLM_API_KEY": "sk-2"}, "in.jsonl", "-o", "out.jsonl")
    assert (done.returncode, stub.bodies) == (1, [])
    assert "401" in done.stderr
    assert "sk-2" not in done.stderr


def test_batch_whose_key_is_revoked_ends_and_can_go_on(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """A 401 is no answer to a line: the lines are answered once the key is right."""
    stub.answer = lambda _: (401, {}, {"error": {"message": "An API key is needed."}})
    write(tmp_path, "in.jsonl", *(line(f"q{n}", "hello") for n in range(9)))
    done = ran(environ, "in.jsonl", "-o", "out.jsonl")
    assert done.returncode == 1
    check_error(done.stderr)
    assert "no longer takes the key" in done.stderr
    stub.answer = echo
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert answered(tmp_path / "out.jsonl") == 9


def test_batch_on_a_full_disk_is_one_sentence_and_goes_on_with_room(tmp_path: Path, environ: dict[str, str]) -> None:
    """A limit of the files' size stands for the disk: records are whole, and the same command answers the rest."""
    write(tmp_path, "in.jsonl", *(line(f"q{n}", "hello " * 20) for n in range(60)))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    done = ran(environ, "in.jsonl", "-o", "out.jsonl", preexec_fn=limit)
    assert done.returncode == 1
    check_error(done.stderr)
    assert done.stderr.startswith("error: 'out.jsonl' cannot be written: File too large.")
    kept = len(records(tmp_path / "out.jsonl"))
    assert 0 < kept < 60
    assert ran(environ, "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert answered(tmp_path / "out.jsonl") == 60


def test_batch_shows_a_bar_of_one_line_on_a_terminal(tmp_path: Path, environ: dict[str, str], stub: Stub) -> None:
    """At 80 columns: lines, speed, and the cost so far and expected."""
    stub.answer = slow
    write(tmp_path, "in.jsonl", *(line(f"q{n}", "hello") for n in range(120)))
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [str(COMMAND), "batch", "in.jsonl", "-o", "out.jsonl"], env={**environ, "TERM": "xterm"},
        cwd=environ["HOME"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with process, os.fdopen(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                shown += terminal.read(4096) or b""
            except OSError:  # EIO: the command has closed it
                break
        assert process.wait(30) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    frames = [frame for frame in re.split(r"[\r\n]+", text) if "lines" in frame]
    assert any(re.search(r"\d+/120 lines  [\d,]+ tokens/s  \$0\.\d\d of \$0\.01", frame) for frame in frames), frames
    assert max(map(len, frames)) <= 80
