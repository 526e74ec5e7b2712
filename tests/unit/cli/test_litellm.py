"""The LiteLLM configuration: names, URL, timeouts, no key; and the example that people copy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.cli import litellm
from service.cli.main import app
from service.errors import UnknownGpuError, UsageError
from service.registry.models import Registry
from service.settings import Settings
from tests.unit.cli.outputs import check_error

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "litellm"
REGISTRY = Registry.load()
URL = "http://127.0.0.1:8000"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command as people do."""
    command = [sys.executable, "-m", "service.cli.main", "litellm", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)


def config(*gpus: str, local: bool = False, url: str = URL, **settings: Any) -> dict[str, Any]:
    """Return the configuration of the built-in registry."""
    return litellm.config(REGISTRY, url, Settings(**settings), gpus, local=local)


def names(document: dict[str, Any]) -> list[str]:
    """Return the names that LiteLLM's clients may send."""
    return [entry["model_name"] for entry in document["model_list"]]


def test_config_has_every_model_by_key_and_with_its_gpu() -> None:
    """And the default's alias; no name stands twice."""
    found = names(config())
    assert found[0] == "llm"
    assert set(found) == {
        "llm",
        *REGISTRY.specs,
        *(f"{key}-{spec.tier.gpu.slug}" for key, spec in REGISTRY.specs.items()),
    }
    assert len(found) == len(set(found))


def test_config_names_are_what_the_gateway_knows() -> None:
    """Every one is found in the registry, and is what is asked for there."""
    document = config("H200", "B200+", "h100!")
    for entry in document["model_list"]:
        name = entry["model_name"]
        assert entry["litellm_params"]["model"] == f"hosted_vllm/{name}"
        assert name.startswith(REGISTRY.resolve(name, "tiny").spec.key) or name == "llm"


def test_config_lists_aliases_of_a_models_file() -> None:
    """LiteLLM's clients ask for them by name; one with a `*` is no name."""
    registry = Registry(dict(REGISTRY.specs), {"gpt-4o": "qwen3-8b", "claude-*": "tiny"})
    found = names(litellm.config(registry, URL, Settings()))
    assert "gpt-4o" in found
    assert not [name for name in found if "claude" in name]


def test_config_further_gpus_are_listed_where_the_weights_fit() -> None:
    """In any spelling, once; what is left out is named, a model's own GPU never."""
    found = names(config("h200", "H200", "L4"))
    assert {"tiny-l4", "tiny-h200", "qwen3-8b-l4", "qwen3-8b-h200", "gemma-3-27b-h200"} <= set(found)
    assert "gemma-3-27b-l4" not in found
    assert len(found) == len(set(found))
    left_out = litellm.too_large(REGISTRY, ["h200", "l4", "L4"])
    assert left_out.count("gemma-3-27b-l4") == 1
    assert "qwen3-235b-h200" not in left_out  # its own: two of them
    assert "qwen3.6-35b-a3b-a100-40gb" in litellm.too_large(REGISTRY, ["a100-40gb"])  # vLLM uses 36.8, it has 37.5


def test_config_of_an_unknown_gpu_is_refused() -> None:
    """With the nearest."""
    with pytest.raises(UnknownGpuError, match="'H20'"):
        config("H20")


def test_config_local_adds_the_suffix_for_tool_calls() -> None:
    """One more name a model."""
    assert set(names(config(local=True))) - set(names(config())) == {f"{key}-local" for key in REGISTRY.specs}


def test_config_has_one_address_and_one_key_for_all() -> None:
    """The address ends in /v1, the key is a variable's name."""
    for entry in config()["model_list"]:
        assert entry["litellm_params"]["api_base"] == f"{URL}/v1"
        assert entry["litellm_params"]["api_key"] == "os.environ/VLLM_API_KEY"
        assert entry["model_info"]["disable_background_health_check"] is True


def test_config_waits_for_a_cold_pool_and_never_retries() -> None:
    """Each timeout has the time of a hold and of an answer, from the settings."""
    document = config(hold_s=30, request_timeout_s=100)
    router = document["router_settings"]
    assert document["litellm_settings"] == {"drop_params": False, "num_retries": 0, "request_timeout": 130}
    assert (router["timeout"], router["stream_timeout"], router["num_retries"]) == (130, 130, 0)
    assert document["general_settings"]["master_key"] == "os.environ/LITELLM_MASTER_KEY"


def test_config_lists_adapters_as_the_gateway_does(tmp_path: Path) -> None:
    """An adapter is a model to its clients."""
    (tmp_path / "models.toml").write_text(
        '[models.mine]\nhub_id = "me/mine"\n[[models.mine.adapters]]\nname = "poet"\nhub_id = "me/poet"\n'
    )
    document = litellm.config(Registry.load(tmp_path / "models.toml"), URL, Settings(), local=True)
    assert {"mine", "mine-h100", "mine-local", "poet", "poet-h100", "poet-local"} <= set(names(document))


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://me--vllm-gateway-serve.modal.run/v1", "https://me--vllm-gateway-serve.modal.run/v1"),
        ("https://me--vllm-gateway-serve.modal.run/v1/", "https://me--vllm-gateway-serve.modal.run/v1"),
        ("os.environ/VLLM_API_BASE", "os.environ/VLLM_API_BASE"),
    ],
)
def test_api_base_ends_in_v1_once(url: str, base: str) -> None:
    """However it is written."""
    assert litellm.api_base(url) == base


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "", "https://", "ftp://host", "https://host:port", "https://a b"])
def test_api_base_of_what_is_no_address_is_refused(url: str) -> None:
    """With what was given."""
    with pytest.raises(UsageError, match=re.escape(f"'{url}' is not the URL of a gateway")):
        litellm.api_base(url)


@pytest.mark.parametrize(
    "url", ["https://me:t0psecret@host", "https://host/v1?key=t0psecret", "https://host/#t0psecret"]
)
def test_api_base_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    """The file would be where it is kept."""
    with pytest.raises(UsageError) as refused:
        litellm.api_base(url)
    assert "t0psecret" not in str(refused.value)


def test_yaml_says_what_json_says() -> None:
    """Every reader of YAML gets the very document."""
    document = config("H200", local=True)
    assert yaml.safe_load(litellm.as_yaml(document)) == json.loads(litellm.as_json(document)) == document


def test_command_prints_yaml_or_json() -> None:
    """For the port where `up` listens, or for the URL of the environment, or for that of the command line."""
    printed = run(SERVICE_PORT="9000")
    assert printed.returncode == 0, printed.stderr
    assert yaml.safe_load(printed.stdout) == config(url="http://127.0.0.1:9000")
    assert json.loads(run("--json", VLLM_GATEWAY_URL="https://gate").stdout) == config(url="https://gate")
    assert json.loads(run("--json", "--url", "http://b", VLLM_GATEWAY_URL="http://a").stdout) == config(url="http://b")


def test_command_writes_no_key_of_the_environment(tmp_path: Path) -> None:
    """Whatever is set there; a written file is named on stderr."""
    file = tmp_path / "config.yaml"
    keys = dict.fromkeys(("API_KEY", "VLLM_API_KEY", "LITELLM_MASTER_KEY", "OPENAI_API_KEY"), "sk-t0psecret")
    done = run("--output", str(file), "--gpu", "L4", **keys)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"Wrote {file}" in done.stderr
    assert "gemma-3-27b-l4" in done.stderr
    assert "t0psecret" not in file.read_text() + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--url", "localhost:8000"], 2, "'localhost:8000' is not the URL"),
        (["--gpu", "H2000"], 2, "Unknown GPU 'H2000'.\nhint: Did you mean 'H200'?"),
        (["--output", "/nowhere/config.yaml"], 2, "'/nowhere/config.yaml' cannot be written"),
    ],
)
def test_command_that_is_refused_prints_an_error_and_a_hint(arguments: list[str], code: int, words: str) -> None:
    """Nothing is printed to where a shell would redirect it."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    check_error(done.stderr)


def test_file_keeps_entries_of_other_servers_whatever_their_key(tmp_path: Path) -> None:
    """One for another vLLM server may name the same variable; what an earlier run wrote for another gateway is ours."""
    theirs = {
        "model_name": "mine",
        "litellm_params": {
            "model": "hosted_vllm/mine", "api_base": "http://10.0.0.9:8000/v1", "api_key": litellm.GATEWAY_KEY
        },
        "model_info": {"mode": "chat"},
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    earlier = config(url="http://127.0.0.1:9000")["model_list"]
    same_gateway = {"model_name": "gone", "litellm_params": {"api_base": f"{URL}/v1", "api_key": litellm.GATEWAY_KEY}}
    file.write_text(yaml.safe_dump({"model_list": [theirs, same_gateway, *earlier]}))
    written = yaml.safe_load(litellm.change(config(), file).after)
    assert written["model_list"] == [*config()["model_list"], theirs]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# mine\nmodel_list: []\n", 1),
        ("model_list: [] # mine\n", 1),
        ("a: |  # mine\n  text\nmodel_list: []\n", 1),
        ("a: 'it''s # none'\nb: x#none\nc: |\n  # none\nd: [\"# none\"]\n# mine\n", 6),
        (litellm._HEADER + "model_list: []\n# mine\n", 4),
    ],
)
def test_file_with_comments_is_left_alone(text: str, line: int, tmp_path: Path) -> None:
    """They would be lost; the error says where the first one is."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    done = run("--output", str(file), "--yes")
    assert (done.returncode, done.stdout, file.read_text()) == (1, "", text)
    assert f"Line {line} of '{file}' has a comment, which would be lost." in done.stderr
    check_error(done.stderr)


def test_file_of_an_earlier_run_is_changed_whatever_has_a_number_sign(tmp_path: Path) -> None:
    """Its header is this command's own, and a `#` within a value is no comment."""
    file = tmp_path / "config.yaml"
    other = {"model_name": "a # b", "litellm_params": {"model": "x#y", "api_base": "http://h/#/v1"}}
    file.write_text(litellm.as_yaml({"model_list": [other], "note": "two\n# lines\n"}))
    assert run("--output", str(file), "--yes").returncode == 0
    written = yaml.safe_load(file.read_text())
    assert (written["model_list"][-1], written["note"]) == (other, "two\n# lines\n")


def test_file_with_comments_that_has_it_already_is_no_error(tmp_path: Path) -> None:
    """Nothing of it would be lost."""
    file = tmp_path / "config.yaml"
    file.write_text(text := litellm.as_yaml(config()) + "# mine\n")
    assert not litellm.change(config(), file).is_needed
    assert file.read_text() == text


def test_example_is_what_the_command_writes() -> None:
    """The line that its header shows."""
    compose = (EXAMPLE / "compose.yaml").read_text()
    (line,) = re.findall(r"vllm-service litellm (.*)", compose)
    arguments = line.partition("--output")[0].split()
    assert run(*arguments).stdout == (EXAMPLE / "config.yaml").read_text()


def test_example_runs_the_version_that_the_tests_run() -> None:
    """LiteLLM tags its images `v<version>`, as its package's own `release_tag` has it."""
    lock = (ROOT / "tests/clients/clients.lock").read_text()
    version = re.search(r"^litellm==(\S+)", lock, re.M)
    assert version
    assert service_of_example()["image"] == f"ghcr.io/berriai/litellm:v{version[1]}"


def test_example_gives_the_variables_that_its_file_reads() -> None:
    """Each comes from .env, where a missing one stops compose; the template has no value of a key."""
    read = set(re.findall(r"os\.environ/(\w+)", (EXAMPLE / "config.yaml").read_text()))
    environment = service_of_example()["environment"]
    assert read <= set(environment)
    needed = {*re.findall(r"\$\{(\w+):\?", json.dumps(environment))}
    assert "MODAL_WORKSPACE" in needed  # else an empty one would be a URL that begins with https://--
    template = dict(
        line.split("=", 1) for line in (EXAMPLE / ".env.example").read_text().splitlines() if line[:1].isalpha()
    )
    assert set(template) == needed
    assert set(template.values()) == {""}


def test_example_makes_the_gateways_url_of_the_workspace() -> None:
    """As `modal deploy` names it, unless .env has another URL."""
    base = service_of_example()["environment"]["VLLM_API_BASE"]
    workspace = "${MODAL_WORKSPACE:?your Modal workspace, in .env}"
    assert base == f"${{VLLM_GATEWAY_URL:-https://{workspace}--vllm-gateway-serve.modal.run}}/v1"


def test_example_listens_on_port_4000_of_this_machine() -> None:
    """Where people look for LiteLLM; other machines are let in on purpose only."""
    service = service_of_example()
    assert service["ports"] == ["127.0.0.1:4000:4000"]
    assert service["command"][service["command"].index("--port") + 1] == "4000"


def service_of_example() -> dict[str, Any]:
    """Return the service of the compose file."""
    (service,) = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"].values()
    return dict(service)


def test_command_is_listed() -> None:
    """Beside the others."""
    assert "litellm" in {command.callback.__name__ for command in app.registered_commands if command.callback}


def test_locks_of_the_clients_name_no_registry() -> None:
    """Where packages come from is the machine's matter; what they are is pinned by hash."""
    clients = ROOT / "tests" / "clients"
    names = ("clients.lock", "loads.lock", "openwebui.lock", "models/smollm2.lock")
    lock = "".join((clients / name).read_text() for name in names)
    npm = json.loads((clients / "npm" / "package-lock.json").read_text())
    assert "http" not in re.sub(r"^[\w.-]*http[\w.-]*==", "", lock, flags=re.M)
    assert "--index" not in lock
    requirements = [line for line in lock.replace("\\\n", " ").splitlines() if line.strip()]
    assert all("--hash=sha256:" in line for line in requirements)
    packages = [package for place, package in npm["packages"].items() if place]
    assert packages
    for package in packages:
        assert "resolved" not in package
        assert package["integrity"].startswith("sha512-")
