"""`vllm-service batch` on the real engine: killed three times, and a table with a schema."""

from __future__ import annotations

import csv
import json
import subprocess
from collections import Counter
from pathlib import Path

from tests.engine.dialogues import QUESTION
from tests.engine.running import Service, wait_until

from .test_measure import COMMAND, environ

LINES = 300


def started(directory: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the command with a key."""
    return subprocess.Popen(
        [str(COMMAND), "batch", *arguments, "--model", "tiny"],
        env=environ(url),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(file: Path) -> int:
    """Return how many records a file has."""
    return file.read_bytes().count(b"}\n") if file.exists() else 0


def test_batch_killed_three_times_has_every_answer_once(served: Service, tmp_path: Path) -> None:
    """Of 300 lines none is lost, none is twice, and all are right."""
    line = {"method": "POST", "url": "/v1/chat/completions", "body": {**QUESTION, "temperature": 0}}
    lines = [json.dumps({**line, "custom_id": f"q{n}"}) for n in range(LINES)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    for kill in range(1, 4):
        with started(tmp_path, served.url, "in.jsonl", "-o", "out.jsonl") as process:
            wait_until(lambda least=kill * LINES // 5: records(out) >= least, 60, "more answers")  # type: ignore[misc]
            process.kill()
        assert records(out) < LINES
    with started(tmp_path, served.url, "in.jsonl", "-o", "out.jsonl", "--json") as process:
        printed, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    summary = json.loads(printed)
    assert (summary["completed"], summary["failed"]) == (LINES, 0)
    assert summary["earlier"] >= LINES * 3 // 5
    answers = [json.loads(one) for one in out.read_text().splitlines()]
    assert Counter(answer["custom_id"] for answer in answers) == {f"q{n}": 1 for n in range(LINES)}
    texts = {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}
    assert texts == {"The capital of France is Paris."}


def test_batch_of_a_table_has_a_column_of_what_the_schema_allows(served: Service, tmp_path: Path) -> None:
    """The engine holds the answers to the schema."""
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "in.csv").write_text("id,text\n1,It broke.\n2,I love it.\n")
    arguments = ["in.csv", "-o", "out.csv", "--prompt", "Is this good? {text}", "--schema", "schema.json"]
    with started(tmp_path, served.url, *arguments) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert {row["mood"] for row in rows} <= {"good", "bad"}
    assert [row["error"] for row in rows] == ["", ""]
