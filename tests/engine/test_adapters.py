"""LoRA adapters with the real engine: served under their names beside the model, and they change what it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from service.engine.args import engine_command
from service.registry.models import Registry
from tests.fakes.hub import Hub, Repository, serving
from tests.fakes.lora import lay_adapter

from .dialogues import dialogue
from .running import Service, wait_until

TINY = Path(__file__).parents[2] / "service/assets/tiny"
CAPITAL = dialogue("capital")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT, USER, OTHER = "root-key", "user-key", "other-key"
ENTRY = (
    f'[models.base]\npath = "{TINY}"\nmax_model_len = 2048\nweights_gb = 0.004\nmax_lora_rank = 8\nmax_cpu_loras = 5\n'
)


def entry(*names: str) -> str:
    """Return a models file with the tiny model and adapters in directories of these names."""
    return ENTRY + "".join(f'[[models.base.adapters]]\nname = "{n}"\npath = "adapters/{n}"\n' for n in names)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models file with the tiny model, an adapter that changes nothing and one that changes everything."""
    lay_adapter(tmp_path / "adapters" / "silent", 0.0)
    lay_adapter(tmp_path / "adapters" / "loud", 5.0)
    file = tmp_path / "models.toml"
    file.write_text(entry("silent", "loud"))
    return file


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with an adapter, one of a larger model, and a repository that is no adapter."""
    repositories = {
        f"org/{name}": Repository(
            COMMIT,
            {file.name: file.read_bytes() for file in lay_adapter(tmp_path / "hub" / name, 5.0, **how).iterdir()},
        )
        for name, how in {"late": {"seed": 1}, "large": {"hidden": 256}}.items()
    }
    repositories["org/model"] = Repository(COMMIT, {"config.json": b"{}", "model.safetensors": b"numbers"})
    with serving(Hub(repositories=repositories)) as running:
        yield running


class Operated:
    """A service as its users and its operator see it."""

    def __init__(self, service: Service, models: Path) -> None:
        self.service, self.models = service, models
        self.pid = service.leader().pid

    def client(self, key: str = USER) -> openai.OpenAI:
        """Return OpenAI's client with a key."""
        return openai.OpenAI(base_url=f"{self.service.url}/v1", api_key=key, max_retries=0, timeout=120)

    def said(self, model: str) -> tuple[str, str]:
        """Return the name in an answer, and its message with all fields."""
        answer = self.client().chat.completions.create(
            model=model, messages=CAPITAL.request["messages"], temperature=0, max_tokens=60
        )
        return answer.model, answer.choices[0].message.model_dump_json()

    def listed(self, key: str = USER) -> dict[str, str | None]:
        """Return each model that is no built-in one, with its parent."""
        found = {model.id: getattr(model, "parent", None) for model in self.client(key).models.list()}
        return {name: parent for name, parent in found.items() if name not in Registry.load().specs}

    def post(self, path: str, body: object = None, key: str = ROOT) -> tuple[int, str]:
        """Send a request of an operator; return status and, of an error, its message."""
        headers = {"Authorization": f"Bearer {key}"}
        answer = requests.post(self.service.url + path, json=body, headers=headers, timeout=120)
        return answer.status_code, answer.text if answer.ok else answer.json()["error"]["message"]

    def add(self, adapter: str, key: str = ROOT, **fields: Any) -> tuple[int, str]:
        """Ask for an adapter of the hub."""
        asked = {"model": "base", "name": adapter, "hub_id": f"org/{adapter}", "revision": COMMIT}
        return self.post("/admin/adapters", asked | fields, key)

    def reload(self, text: str) -> tuple[int, str]:
        """Write the models file, and have it read again."""
        self.models.write_text(text)
        return self.post("/admin/reload")


@pytest.fixture
def operated(start: Callable[..., Service], models: Path, hub: Hub, tmp_path: Path) -> Operated:
    """The service of that models file, with keys."""
    service = start(
        "base",
        SERVICE_MODELS_FILE=str(models),
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / "cache"),
        API_KEYS=f"root={ROOT},user={USER},other={OTHER}",
        API_LIMITS='{"root": {"admin": true}, "other": {"models": ["tiny"]}}',
    )
    return Operated(service.wait_ready(), models)


def test_adapters_are_served_and_change_while_the_engine_runs(operated: Operated, hub: Hub, tmp_path: Path) -> None:
    """Under their names, from the models file and the hub, in one engine that none of them harms."""
    _check_first(operated)
    _check_reload(operated, tmp_path)
    _check_refused(operated, tmp_path)
    _check_hub(operated, hub)
    _check_at_once(operated, tmp_path)
    assert operated.service.leader().pid == operated.pid, operated.service.story


def _check_first(operated: Operated) -> None:
    """One whose B is zero answers as the model does, a random one does not, and each is listed with its parent."""
    base, silent, loud = operated.said("base"), operated.said("silent"), operated.said("loud")
    assert "Paris" in base[1]
    assert silent == ("silent", base[1])
    assert loud[0] == "loud"
    assert loud[1] != base[1]
    assert operated.listed() == {"base": None, "llm": None, "silent": "base", "loud": "base"}


def _check_reload(operated: Operated, tmp_path: Path) -> None:
    """One that is added is there, one that is removed ends with its running requests, and no request fails."""
    lay_adapter(tmp_path / "adapters" / "third", 5.0, seed=3)
    loud = operated.said("loud")[1]
    began, counted = threading.Event(), []

    def stream() -> str:
        with operated.client().completions.create(
            model="loud", prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        ) as events:
            for event in events:
                counted.append(event.choices[0].text if event.choices else "")
                began.set()
        return event.choices[0].finish_reason or ""

    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream)
        assert began.wait(60)
        status, told = operated.reload(entry("silent", "third"))
        assert status == 200, told
        assert not running.done(), "the stream was too short"
        assert operated.listed() == {"base": None, "llm": None, "silent": "base", "third": "base"}
        assert operated.said("third")[1] != loud
        with pytest.raises(openai.NotFoundError):
            operated.said("loud")
        assert running.result() == "length"
    operated.service.wait_said("Adapter 'loud' of model 'base' is unloaded.")


def _check_refused(operated: Operated, tmp_path: Path) -> None:
    """Each with one sentence; what was served before still is."""
    place = tmp_path / "adapters"
    lay_adapter(place / "ranked", rank=16)
    lay_adapter(place / "wide", hidden=256)
    lay_adapter(place / "narrow", hidden=64)
    lay_adapter(place / "deep", layers=5)
    lay_adapter(place / "other", module="self_attn.query")
    lay_adapter(place / "cut")
    whole = (place / "cut/adapter_model.safetensors").read_bytes()
    (place / "cut/adapter_model.safetensors").write_bytes(whole[:-1])
    shutil.copytree(place / "cut", place / "pickled")
    (place / "pickled/adapter_model.safetensors").rename(place / "pickled/adapter_model.bin")
    shutil.copytree(place / "cut", place / "text")
    (place / "text/adapter_model.safetensors").write_text("no numbers")
    for name, sentence in {
        "ranked": "Adapter 'ranked' has rank 16, and model 'base' serves adapters up to rank 8.",
        "wide": "self_attn.q_proj has 128 where it has 256",
        "narrow": "self_attn.q_proj has 128 where it has 64",
        "deep": "it changes model.layers.4.self_attn.q_proj, which the model does not have",
        "other": "The engine refused adapter 'other'",
        "cut": "was not written whole",
        "pickled": "not in the safetensors format",
        "text": "not in the safetensors format",
        "absent": "No such file or directory",
    }.items():
        status, told = operated.reload(entry("silent", "third", name))
        assert (status, told[:21], sentence in told) == (400, "Nothing was changed: ", True), (name, told)
        assert operated.said("silent")[0] == "silent"
    assert operated.reload(entry("silent", "third"))[0] == 200


def _check_hub(operated: Operated, hub: Hub) -> None:
    """At a pinned commit, for operators; never from a URL, a path, or a repository that is no adapter."""
    base = operated.said("base")[1]
    assert operated.add("late", USER)[0] == operated.add("late", OTHER)[0] == 403
    for wrong in (
        {"hub_id": hub.url + "/org/late"},
        {"hub_id": "http:org/late"},
        {"hub_id": "/org/late"},
        {"hub_id": "../late"},
        {"revision": "main"},
        {"revision": None},
        {"path": "/adapters/late"},
        {"name": "a b"},
        {"name": "silent"},
        {"name": "base"},
    ):
        status, told = operated.add("late", **wrong)
        assert status == 400, (wrong, told)
    assert operated.add("late", model="nobody")[0] == 404
    for name, sentence in {
        "large": "does not fit model 'base'",
        "model": "is no LoRA adapter: it has no adapter_config.json",
        "absent": "org/absent",
    }.items():
        status, told = operated.add(name)
        assert (status, sentence in told) == (400, True), told
    assert not hub.downloads("model.safetensors")

    status, told = operated.add("late")
    assert (status, json.loads(told)) == (
        200,
        {"model": "base", "name": "late", "hub_id": "org/late", "revision": COMMIT},
    )
    assert operated.said("late") not in {("late", base), ("late", operated.said("third")[1])}
    assert operated.listed() == {"base": None, "llm": None, "silent": "base", "third": "base", "late": "base"}
    assert operated.listed(OTHER) == {}
    with pytest.raises(openai.PermissionDeniedError):
        operated.client(OTHER).completions.create(model="late", prompt="x")
    assert operated.add("late")[0] == 200, "the same again changes nothing"
    assert operated.post("/admin/reload")[0] == 200
    assert operated.said("late")[0] == "late", "a reload keeps it"


def _check_at_once(operated: Operated, tmp_path: Path) -> None:
    """Reloads and additions at once come one after the other; what exceeds the room is refused."""
    lay_adapter(tmp_path / "adapters" / "fourth", seed=4)
    operated.models.write_text(entry("silent", "third", "fourth"))
    with ThreadPoolExecutor() as pool:
        reloads = [pool.submit(operated.post, "/admin/reload") for _ in range(3)]
        added = [pool.submit(operated.add, f"late{n}", hub_id="org/late") for n in range(3)]
        assert [one.result()[0] for one in reloads] == [200] * 3
        outcomes = sorted(one.result()[0] for one in added)
    assert outcomes == [200, 400, 400], [one.result() for one in added]
    assert len(operated.listed()) == 2 + 5
    for name, parent in operated.listed().items():
        assert operated.said(name)[0] == (name if parent else "base")
    wait_until(lambda: not operated.service.ended, 1)


def test_adapter_flags_are_taken_by_the_engines_parser(
    engine_says: Callable[[dict[str, list[str]]], dict[str, dict[str, object]]], models: Path
) -> None:
    """On both devices, with names and paths as they were given."""
    spec = Registry.load(models).specs["base"]
    adapters = {adapter.name: Path(f"/adapters/{adapter.name}, v=1") for adapter in spec.adapters}
    commands = {
        device: list(engine_command(spec, TINY, adapters=adapters, device=device).argv) for device in ("cuda", "cpu")
    }
    for device, parsed in engine_says(commands).items():
        options = parsed["options"]
        assert isinstance(options, dict), (device, parsed)
        assert options["enable_lora"] is True
        assert (options["max_lora_rank"], options["max_loras"], options["max_cpu_loras"]) == (8, 4, 5)
        assert [(module["name"], module["path"], module["base_model_name"]) for module in options["lora_modules"]] == [
            ("silent", "/adapters/silent, v=1", "base"),
            ("loud", "/adapters/loud, v=1", "base"),
        ]
        assert options["model"] == str(TINY)


@pytest.fixture
def engine_says(engine_python: str) -> Callable[[dict[str, list[str]]], dict[str, dict[str, object]]]:
    """Return a function from command lines to what the pinned engine's parser makes of them."""

    def parse(commands: dict[str, list[str]]) -> dict[str, dict[str, object]]:
        program = Path(__file__).with_name("known_flags.py")
        asked = json.dumps({"commands": commands})
        done = subprocess.run(
            [engine_python, str(program)], input=asked, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        parsed: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])["parsed"]
        return parsed

    return parse
