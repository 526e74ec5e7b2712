"""LoRA adapters with the real engine: served under their names beside the model, and they change what it says."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from array import array
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from service.engine.args import engine_command
from service.registry.models import Registry

from .dialogues import dialogue
from .running import Service

TINY = Path(__file__).parents[2] / "service/assets/tiny"
HIDDEN, RANK, LAYERS = 128, 4, 4
CAPITAL = dialogue("capital")


def lay_adapter(directory: Path, scale: float) -> Path:
    """Write a LoRA adapter of the tiny model's query projections: A is random, B too, times `scale`.

    The format is PEFT's: a configuration and a safetensors file, which is a header in JSON and the numbers behind it.
    """
    config = json.loads((TINY / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (HIDDEN, LAYERS)
    queries = config["num_attention_heads"] * config["head_dim"]
    chance = random.Random(0)  # noqa: S311 - weights, not keys
    header: dict[str, object] = {}
    body = b""
    for layer in range(LAYERS):
        for part, shape, factor in (("A", (RANK, HIDDEN), 1.0), ("B", (queries, RANK), scale)):
            numbers = array("f", (chance.gauss(0, 1) * factor for _ in range(shape[0] * shape[1]))).tobytes()
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(numbers)]}
            body += numbers
    directory.mkdir(parents=True)
    encoded = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models file with the tiny model, an adapter that changes nothing and one that changes everything."""
    lay_adapter(tmp_path / "adapters" / "silent", 0.0)
    lay_adapter(tmp_path / "adapters" / "loud", 5.0)
    file = tmp_path / "models.toml"
    file.write_text(
        f'[models.base]\npath = "{TINY}"\nmax_model_len = 2048\nweights_gb = 0.004\nmax_lora_rank = 8\n'
        '[[models.base.adapters]]\nname = "silent"\npath = "adapters/silent"\n'
        '[[models.base.adapters]]\nname = "loud"\npath = "adapters/loud"\n'
    )
    return file


def test_adapters_are_served_under_their_names(start: Callable[..., Service], models: Path) -> None:
    """One whose B is zero answers as the model does, a random one does not, and each is listed with its parent."""
    service = start("base", SERVICE_MODELS_FILE=str(models)).wait_ready()
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        def said(model: str) -> tuple[str, str | None]:
            answer = client.chat.completions.create(
                model=model, messages=CAPITAL.request["messages"], temperature=0, max_tokens=60
            )
            return answer.model, answer.choices[0].message.content

        base, silent, loud = said("base"), said("silent"), said("loud")
        listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
        listed = {name: parent for name, parent in listed.items() if name not in Registry.load().specs}

    assert base[1] is not None
    assert "Paris" in base[1]
    assert silent == ("silent", base[1])
    assert loud[0] == "loud"
    assert loud[1] != base[1]
    assert listed == {"base": None, "llm": None, "silent": "base", "loud": "base"}


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
        assert (options["max_lora_rank"], options["max_loras"]) == (8, 2)
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
