"""Models that do not chat, through gateway and real engines: one that hears, and one that ranks and classifies.

Both have random weights: a Whisper of two layers, and the tiny model with the head and the template of a reranker.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from service.engine import environment
from service.registry.models import Registry
from tests.engine.recordings import recording
from tests.engine.running import REPOSITORY, Service, serving
from tests.security.barrage import barrage
from tests.security.targets import KEY, TINY, Target, harm_in
from tests.security.test_fields import inputs

from . import clients
from .clients import UNKNOWN, Outcomes

RERANKER = Registry.load().specs["qwen3-reranker-0.6b"]
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
STREAM = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 6004 RTP/AVP 0\n"  # as SDP
SHARE = 0.1  # of the extremes of a field
_POOLING = (
    *("model", "user", "truncate_prompt_tokens", "padding", "truncation_side", "request_id", "priority"),
    *("mm_processor_kwargs", "cache_salt", "use_activation", "chat_template_kwargs"),
)
_SCORING = (*_POOLING, "max_tokens_per_query", "max_tokens_per_doc", "instruction")
_HEARING = (
    *("model", "language", "hotwords", "prompt", "response_format", "timestamp_granularities[]", "stream"),
    *("stream_include_usage", "stream_continuous_usage_stats", "vllm_xargs", "to_language", "use_beam_search", "n"),
    *("length_penalty", "include_stop_str_in_output", "temperature", "watermarking", "top_p", "top_k", "min_p", "seed"),
    *("frequency_penalty", "repetition_penalty", "presence_penalty", "max_completion_tokens", "file"),
)
FIELDS = {  # of vLLM 0.32's request models
    "ranks": {
        "/v1/rerank": (*_SCORING, "query", "documents", "top_n"),
        "/v1/score": (*_SCORING, "queries", "documents", "items", "data_1", "data_2", "text_1", "text_2"),
        "/classify": (*_POOLING, "input", "messages", "add_special_tokens", "chat_template", "media_io_kwargs"),
    },
    "hears": {TRANSCRIPTIONS: _HEARING, TRANSLATIONS: _HEARING},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Both models behind a key; the one that hears is the default."""
    directory = tmp_path_factory.mktemp("tasks")
    python, whisper = environment.ensure().python, directory / "whisper"
    subprocess.run([python, REPOSITORY / "tests" / "engine" / "hearing.py", whisper], check=True, capture_output=True)
    overrides = json.loads(RERANKER.extra_args[1]) | {"classifier_from_token": ["a", "b"]}  # which the tiny model has
    models = directory / "models.toml"
    models.write_text(
        f"""
        [models.hears]
        path = "{whisper}"
        task = "transcription"
        modalities = ["text", "audio"]
        weights_gb = 0.001

        [models.ranks]
        path = "{TINY}"
        task = "classify"
        max_model_len = 2048
        weights_gb = 0.004
        chat_template = "{RERANKER.chat_template_file}"
        extra_args = ["--hf-overrides", '{json.dumps(overrides)}']

        [aliases]
        "whisper-1" = "hears"
        """
    )
    with serving(directory, "hears", SERVICE_MODELS_FILE=str(models), API_KEYS=f"alice={KEY}") as service:
        yield service


def ask(served: Service, path: str, **body: Any) -> requests.Response:
    """POST JSON to the model that ranks."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return requests.post(served.url + path, json={"model": "ranks", **body}, headers=headers, timeout=150)


def transcribe(served: Service, data: bytes, path: str = TRANSCRIPTIONS, **fields: Any) -> requests.Response:
    """POST a recording to the model that hears."""
    return requests.post(
        served.url + path,
        files={"file": ("a.wav", data)},
        data={"model": "hears", "language": "en", "max_completion_tokens": 2, **fields},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=150,
    )


def newest(served: Service) -> dict[str, Any]:
    """Return what the gateway tells of the last request."""
    headers = {"Authorization": f"Bearer {KEY}"}
    page = requests.get(f"{served.url}/v1/requests?limit=1", headers=headers, timeout=30).json()
    return dict(zip(page["columns"], page["data"][0], strict=True))


@pytest.fixture(scope="module", params=["python", "javascript"])
def outcomes(request: pytest.FixtureRequest, served: Service, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The results of the cases of one of OpenAI's two clients."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    (directory / "speech.wav").write_bytes(recording(1.5, rate=22_050, channels=2))
    if request.param == "python":
        client = clients.python("openai_audio.py", directory)
    else:
        client = clients.javascript(directory, "openai_audio.mjs")
    return clients.outcomes(client, served.url, KEY, "whisper-1")


def test_audio_openai_clients_transcribe_and_translate(outcomes: Outcomes) -> None:
    """By an alias, of a rate and channels that the model does not take; the usage is vLLM's, in whole seconds."""
    usage = {"type": "duration", "seconds": 2}
    assert outcomes.value("transcription") == {"is_text": True, "usage": usage}
    assert outcomes.value("verbose") == {"duration": 1.5, "language": "en"}
    assert outcomes.value("stream")
    assert outcomes.value("translation")


def test_audio_openai_clients_raise_their_own_errors(outcomes: Outcomes) -> None:
    """What is no recording is 400, and an unknown model 404 with the nearest name."""
    assert outcomes.raised("no_recording")[:2] == ("BadRequestError", 400)
    raised, status, message = outcomes.raised("unknown_model")
    assert (raised, status) == ("NotFoundError", 404)
    assert UNKNOWN in message


@pytest.mark.parametrize(
    ("data", "fields", "param"),
    [
        (recording(0.2), {"response_format": "srt"}, None),
        (recording(0.2), {"language": "xx"}, None),
        (recording(0.2), {"temperature": "nan"}, "temperature"),
        (recording(0.2), {"seed": "9" * 20}, "seed"),
        (recording(0.2), {"max_completion_tokens": "-1"}, "max_tokens"),
        (recording(0.2), {"vllm_xargs": "{"}, "vllm_xargs"),
        (recording(0.2), {"prompt": "word " * 2000}, "prompt"),
        (recording(601, rate=1000, silent=True), {}, "file"),
        (b"", {}, None),
    ],
)
def test_audio_value_that_is_wrong_is_400(served: Service, data: bytes, fields: dict[str, str], param: str) -> None:
    """The engine's own checks, with the field where it names one."""
    answer = transcribe(served, data, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert "VLLM_" not in error["message"]


@pytest.mark.parametrize("text", [b"ffconcat version 1.0\nfile README.md\n", STREAM, b"#EXTM3U\n#EXTINF:1,\na.wav\n"])
def test_audio_text_that_names_files_or_streams_is_400_at_once(served: Service, text: bytes) -> None:
    """FFmpeg would read files of this machine, or wait at ports that it opens: 20 s, and longer with packets."""
    began = time.monotonic()
    answer = transcribe(served, text)
    assert answer.status_code == 400, answer.text
    assert time.monotonic() - began < 5


def test_audio_of_minutes_is_cut_into_pieces_and_counted(served: Service) -> None:
    """65 s are three pieces; the ledger has what they took."""
    answer = transcribe(served, recording(65, silent=True))
    assert answer.json()["usage"] == {"type": "duration", "seconds": 65}
    row = newest(served)
    assert (row["path"], row["model"], row["key"]) == (TRANSCRIPTIONS, "hears", "alice")
    assert (row["tokens_in"], row["tokens_out"]) == (12, 6)


def test_rerank_sorts_the_documents(served: Service) -> None:
    """The best ones first, with what they were; Cohere's and Jina's clients read the same fields."""
    documents = ["Paris", "Berlin", "a", "The capital of France is Paris."]
    answer = ask(served, "/v1/rerank", query="What is the capital of France?", documents=documents, top_n=3).json()
    results = answer["results"]
    assert len(results) == 3
    assert [results[0]["relevance_score"] >= result["relevance_score"] for result in results] == [True] * 3
    assert all(documents[result["index"]] == result["document"]["text"] for result in results)
    assert newest(served)["tokens_in"] == answer["usage"]["prompt_tokens"]


def test_score_and_classify_answer_for_each_text(served: Service) -> None:
    """A query with each document gives what ranks them, and pairs give one score each."""
    ranked = ask(served, "/v1/rerank", query="a", documents=["b", "c"]).json()["results"]
    scored = ask(served, "/v1/score", queries="a", documents=["b", "c"]).json()["data"]
    assert {one["index"]: one["relevance_score"] for one in ranked} == {one["index"]: one["score"] for one in scored}
    assert len(ask(served, "/v1/score", text_1=["a", "b"], text_2=["c", "d"]).json()["data"]) == 2
    assert [len(one["probs"]) for one in ask(served, "/classify", input=["a", "b"]).json()["data"]] == [1, 1]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": []}, None),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": "a", "documents": ["b " * 3000]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "chat_template_kwargs": {"chat_template": "x"}}, None),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, None),
        ("/classify", {"input": ["b " * 3000]}, "input"),
    ],
)
def test_scores_value_that_is_wrong_is_400(served: Service, path: str, body: dict[str, Any], param: str) -> None:
    """The engine's own checks, with the field where it names one."""
    answer = ask(served, path, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("model", ["ranks", "hears"])
def test_extremes_of_every_field_of_these_routes_are_served_or_refused(served: Service, model: str) -> None:
    """No 5xx that is not documented, no traceback, and the engines live."""
    logs = [*served.log_file.parent.glob("engine-*.log")]
    before = {log: log.stat().st_size for log in logs}
    target = Target("gateway", served.port, {}, lambda: "", set, list)
    schemas = {path: {"properties": {name: {} for name in names}} for path, names in FIELDS[model].items()}
    posts = {path: {"post": {"requestBody": {"content": {"": {"schema": one}}}}} for path, one in schemas.items()}

    outcome = barrage(target, inputs({"paths": posts, "components": {"schemas": {}}}, model, SHARE))

    assert outcome.finds == []
    assert set(outcome.statuses) >= {200, 400}
    assert not [harm for log in logs for harm in harm_in(log.read_text(errors="replace")[before[log] :])]
