"""Programs that measure a model, as docs/clients.md has them, through gateway and real engine, with SmolLM2-135M."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine.running import ONE_THREAD, Service

from . import client_env
from .clients import KEY, bearer, logged
from .programs import GUIDELLM, LM_EVAL, VLLM_BENCH, Outcome, Program

MODEL = "smollm2"
REQUESTS = 4
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: capitals.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: ["Paris", "Rome", "Berlin"]
doc_to_target: "{{capital}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CAPITALS = [{"country": country, "capital": place} for place, country in enumerate(("France", "Italy", "Germany"))]


@pytest.fixture(scope="module")
def url(agents_service: Service) -> str:
    """The gateway's URL; SmolLM2 is awake behind it, and the programs are installed."""
    client_env.loads()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 20,
        "temperature": 0,
        "stream": True,  # held until the model is ready, however busy the machine is
    }
    answer = requests.post(f"{agents_service.url}/v1/chat/completions", json=body, headers=bearer(KEY), timeout=200)
    assert answer.status_code == 200, answer.text
    assert " Paris" in answer.text
    return agents_service.url


def run(program: Program, home: Path, url: str, tasks: Path | str = "") -> Outcome:
    """Do what the page says, without a hub."""
    given = {"MODEL": MODEL, "TOKENIZER": str(client_env.smollm2()), "REQUESTS": str(REQUESTS), "TASKS": str(tasks)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    outcome = program.run(home, url, **given, **offline, **ONE_THREAD)
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome


def result(outcome: Outcome) -> Any:
    """Return what the program has written."""
    return json.loads((outcome.work / "result.json").read_text())


def check_log(service: Service, program: Program, path: str, count: int) -> None:
    """Insist that each of its requests was answered, on one route."""
    lines = logged(service, program.name, count)
    assert len(lines) == count, lines
    assert {(line["path"], line["status"], line["model"]) for line in lines} == {(path, 200, MODEL)}, lines


def test_vllm_bench_serve_completes_all_its_requests(url: str, agents_service: Service, tmp_path: Path) -> None:
    """It streams chats, some at once, with the key of OPENAI_API_KEY."""
    found = result(run(VLLM_BENCH, tmp_path, url))
    assert (found["completed"], found["failed"]) == (REQUESTS, 0)
    assert found["total_output_tokens"] == REQUESTS * 32
    check_log(agents_service, VLLM_BENCH, "/v1/chat/completions", REQUESTS)


def test_guidellm_completes_all_its_requests(url: str, agents_service: Service, tmp_path: Path) -> None:
    """It streams chats, some at once."""
    (measured,) = result(run(GUIDELLM, tmp_path, url))["benchmarks"]
    totals = measured["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (REQUESTS, 0, 0)
    check_log(agents_service, GUIDELLM, "/v1/chat/completions", REQUESTS)


def test_lm_eval_scores_choices_by_their_log_likelihood(url: str, agents_service: Service, tmp_path: Path) -> None:
    """`local-completions` sends tokens with `echo` and `logprobs`; the model knows these capitals."""
    rows = tmp_path / "capitals.jsonl"
    rows.write_text("\n".join(map(json.dumps, CAPITALS)))
    task = tmp_path / "capitals.yaml"
    task.write_text(TASK.replace(rows.name, str(rows)))
    (found,) = (run(LM_EVAL, tmp_path, url, task).work / "results").glob("*/results_*.json")
    assert json.loads(found.read_text())["results"]["capitals"]["acc,none"] == 1.0
    check_log(agents_service, LM_EVAL, "/v1/completions", len(CAPITALS) * 3)
