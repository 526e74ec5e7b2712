"""What `connect` writes and prints: each client's form, what was there before, backups, modes, and no key."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.cli import gateway_stub
from tests.unit.cli.gateway_stub import Stub
from tests.unit.cli.outputs import check_error

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "clients.md").read_text()
KEY = "sk-t0psecret"
FILES = {"codex": ".codex/config.toml", "claude": ".claude/settings.json", "opencode": ".config/opencode/opencode.json"}
LANGUAGES = {"codex": "toml", "claude": "json", "opencode": "json"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[Stub]:
    """A gateway that knows one key."""
    with gateway_stub.serving(KEY) as stub:
        yield stub


def run(
    home: Path, *arguments: str, key: str = KEY, stdin: int = subprocess.DEVNULL, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a home directory, in an environment of its own."""
    given = {"HOME": str(home), "PATH": os.environ["PATH"], **({"VLLM_API_KEY": key} if key else {}), **environ}
    return subprocess.run(
        [sys.executable, "-m", "service.cli.main", "connect", *arguments],
        cwd=ROOT, env=given, stdin=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def connected(home: Path, *arguments: str, **environ: str) -> str:
    """Run it, insist that it goes well, and return what it prints."""
    done = run(home, *arguments, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(home: Path) -> dict[str, str]:
    """Return the text of every file of a home directory."""
    return {str(file.relative_to(home)): file.read_text() for file in home.rglob("*") if file.is_file()}


@pytest.mark.parametrize("client", FILES)
def test_connect_in_an_empty_home_writes_what_the_page_shows(client: str, gateway: Stub, tmp_path: Path) -> None:
    """One file, for its owner alone, and nothing on standard output."""
    assert connected(tmp_path, client, "--url", gateway.url) == ""
    ((name, text),) = files(tmp_path).items()
    assert (name, (tmp_path / name).stat().st_mode & 0o777) == (FILES[client], 0o600)
    blocks = re.findall(rf"^```{LANGUAGES[client]}\n(.*?)^```$", PAGE, re.M | re.S)
    assert text.replace(gateway.url, "http://127.0.0.1:8000") in blocks


@pytest.mark.parametrize("client", [*FILES, "openwebui", "litellm", "env"])
def test_connect_never_writes_or_prints_the_key(client: str, gateway: Stub, tmp_path: Path) -> None:
    """Each client has a reference to the variable, in its own form."""
    done = run(tmp_path, client, "--url", gateway.url)
    printed = run(tmp_path, client, "--url", gateway.url, "--print")
    told = run(tmp_path, client, "--url", gateway.url, "--print", "--json")
    assert json.loads(told.stdout)["client"] == client
    texts = [*files(tmp_path).values(), printed.stdout, told.stdout, done.stdout, done.stderr, printed.stderr]
    assert KEY not in "".join(texts)
    assert "VLLM_API_KEY" in printed.stdout


@pytest.mark.parametrize("client", FILES)
def test_connect_print_writes_nothing(client: str, gateway: Stub, tmp_path: Path) -> None:
    """It prints what would be written."""
    printed = connected(tmp_path, client, "--url", gateway.url, "--print")
    assert files(tmp_path) == {}
    connected(tmp_path, client, "--url", gateway.url)
    assert files(tmp_path) == {FILES[client]: printed}


@pytest.mark.parametrize("client", FILES)
def test_connect_again_changes_nothing(client: str, gateway: Stub, tmp_path: Path) -> None:
    """No question, no backup."""
    connected(tmp_path, client, "--url", gateway.url)
    before = files(tmp_path)
    connected(tmp_path, client, "--url", gateway.url)
    assert files(tmp_path) == before


BEFORE = {
    "codex": '# mine\nmodel = "gpt-5"\napproval_policy = "never"\n\n[model_providers.other]\nname = "x"\n',
    "claude": '{"env": {"ANTHROPIC_API_KEY": "sk-ant", "MINE": "1"}, "permissions": {"allow": ["Read"]}}',
    "opencode": '{"theme": "dark", "provider": {"other": {"name": "x"}}}',
}


@pytest.mark.parametrize("client", FILES)
def test_connect_merges_into_a_file_and_keeps_a_backup(client: str, gateway: Stub, tmp_path: Path) -> None:
    """What the client has besides stays, its plugins and telemetry included, and so does the file's mode."""
    file = tmp_path / FILES[client]
    file.parent.mkdir(parents=True)
    file.write_text(BEFORE[client])
    file.chmod(0o640)
    told = json.loads(connected(tmp_path, client, "--url", gateway.url, "--yes", "--json"))
    assert Path(told["backup"]).read_text() == BEFORE[client]
    assert len(files(tmp_path)) == 2
    assert file.stat().st_mode & 0o777 == 0o640
    after: dict[str, Any] = (tomllib if client == "codex" else json).loads(file.read_text())
    if client == "codex":
        assert (after["model"], after["model_provider"], after["approval_policy"]) == ("llm", "vllm", "never")
        assert set(after["model_providers"]) == {"vllm", "other"}
        assert "# mine" in file.read_text()
        assert "analytics" not in after
    elif client == "claude":
        assert after["permissions"] == {"allow": ["Read"]}
        assert (after["env"]["MINE"], after["env"]["ANTHROPIC_BASE_URL"]) == ("1", gateway.url)
        assert not {"ANTHROPIC_API_KEY", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"} & set(after["env"])
    else:
        assert (after["theme"], after["model"], set(after["provider"])) == ("dark", "vllm/llm", {"other", "vllm"})
        assert "autoupdate" not in after


def test_connect_without_a_terminal_overwrites_nothing(gateway: Stub, tmp_path: Path) -> None:
    """It names the option; the file stays as it was."""
    file = tmp_path / FILES["codex"]
    file.parent.mkdir(parents=True)
    file.write_text(BEFORE["codex"])
    done = run(tmp_path, "codex", "--url", gateway.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes" in done.stderr
    check_error(done.stderr)
    assert files(tmp_path) == {FILES["codex"]: BEFORE["codex"]}


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_connect_asks_before_it_changes_a_file(answer: bytes, code: int, gateway: Stub, tmp_path: Path) -> None:
    """The question names what changes."""
    file = tmp_path / FILES["codex"]
    file.parent.mkdir(parents=True)
    file.write_text(BEFORE["codex"])
    master, slave = pty.openpty()
    os.write(master, answer)
    done = run(tmp_path, "codex", "--url", gateway.url, stdin=slave)
    os.close(master)
    os.close(slave)
    assert done.returncode == code, done.stderr
    assert "model, model_provider" in done.stderr
    assert (file.read_text() == BEFORE["codex"]) == (code == 1)


@pytest.mark.parametrize(
    ("client", "text"),
    [
        ("codex", "model = = 1"),
        ("claude", "{// a comment\n}"),
        ("claude", '{"theme": "\\ud800"}'),
        ("claude", "[" * 100_000),
        ("opencode", "[]"),
        ("litellm", "key: [sk-t0psecret"),
    ],
    ids=range(6),
)
def test_connect_leaves_a_file_that_it_does_not_understand(
    client: str, text: str, gateway: Stub, tmp_path: Path
) -> None:
    """Also one with comments, which JSON has not; no line of it is repeated, since a key may be on it."""
    file = tmp_path / FILES.get(client, "config.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    done = run(tmp_path, client, "--url", gateway.url, "--yes", "--output", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be changed" in done.stderr
    assert KEY not in done.stderr
    check_error(done.stderr)
    assert [*files(tmp_path).values()] == [text]


def test_connect_follows_a_symbolic_link(gateway: Stub, tmp_path: Path) -> None:
    """A directory of dotfiles keeps its link; the backup is beside the file itself."""
    file = tmp_path / "dotfiles" / "config.toml"
    file.parent.mkdir()
    file.write_text('model = "gpt-5"\n')
    link = tmp_path / FILES["codex"]
    link.parent.mkdir()
    link.symlink_to(file)
    connected(tmp_path, "codex", "--url", gateway.url, "--yes")
    assert link.is_symlink()
    assert 'model = "llm"' in file.read_text()
    assert len([*file.parent.glob("config.toml.backup-*")]) == 1


def test_connect_to_a_loop_of_symbolic_links_is_refused(gateway: Stub, tmp_path: Path) -> None:
    """There is no file behind it."""
    link = tmp_path / FILES["codex"]
    link.parent.mkdir()
    link.symlink_to(link)
    done = run(tmp_path, "codex", "--url", gateway.url, "--yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert "symbolic links" in done.stderr
    check_error(done.stderr)


def test_connect_looks_for_files_where_the_clients_look(gateway: Stub, tmp_path: Path) -> None:
    """Each has a variable that names another directory; opencode's file may be the one with comments."""
    places = {"CODEX_HOME": tmp_path / "a", "CLAUDE_CONFIG_DIR": tmp_path / "b", "XDG_CONFIG_HOME": tmp_path / "c"}
    (tmp_path / "c/opencode").mkdir(parents=True)
    (tmp_path / "c/opencode/opencode.jsonc").write_text("{}")
    for client in FILES:
        given = {name: str(place) for name, place in places.items()}
        connected(tmp_path, client, "--url", gateway.url, "--yes", **given)
    written = {name for name in files(tmp_path) if "backup" not in name}
    assert written == {"a/config.toml", "b/settings.json", "c/opencode/opencode.jsonc"}


@pytest.mark.parametrize("client", [*FILES, "openwebui", "env"])
def test_connect_with_a_wrong_key_writes_nothing(client: str, gateway: Stub, tmp_path: Path) -> None:
    """The gateway is asked first."""
    output = [] if client in FILES else ["--output", str(tmp_path / ".env")]
    done = run(tmp_path, client, "--url", gateway.url, *output, key="sk-wrong")
    assert (done.returncode, files(tmp_path)) == (1, {})
    assert "answered 401" in done.stderr
    check_error(done.stderr)


def test_connect_without_a_gateway_names_the_next_step(tmp_path: Path) -> None:
    """Nothing is written."""
    done = run(tmp_path, "codex", "--url", "http://127.0.0.1:9")
    assert (done.returncode, files(tmp_path)) == (1, {})
    assert "vllm-service up" in done.stderr
    check_error(done.stderr)


def test_connect_to_a_service_without_keys_needs_no_variable(tmp_path: Path) -> None:
    """The clients that insist on a key get a word in its place."""
    with gateway_stub.serving() as stub:
        for client in FILES:
            connected(tmp_path, client, "--url", stub.url, key="")
        printed = connected(tmp_path, "env", "--url", stub.url, key="")
    assert "VLLM_API_KEY" not in "".join(files(tmp_path).values()) + printed
    assert "OPENAI_API_KEY=none\n" in printed


def test_connect_tells_clients_the_context_of_the_model(tmp_path: Path) -> None:
    """An answer may have a quarter of it, and no more than agents ask for by themselves."""
    with gateway_stub.serving(model={**gateway_stub.MODEL, "max_model_len": 262144}) as stub:
        connected(tmp_path, "claude", "--url", stub.url, key="")
        connected(tmp_path, "codex", "--url", stub.url, "--model", "big", key="")
    env = json.loads((tmp_path / FILES["claude"]).read_text())["env"]
    names = ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS")
    assert [env[name] for name in names] == ["262144", "32000"]
    codex = tomllib.loads((tmp_path / FILES["codex"]).read_text())
    assert (codex["model"], codex["model_context_window"]) == ("big", 262144)


def test_connect_env_is_for_eval(gateway: Stub, tmp_path: Path) -> None:
    """OpenAI's, Anthropic's and the seeds' names; the key comes from the shell's own variable."""
    script = f'eval "$({sys.executable} -m service.cli.main connect env --url {gateway.url})"; env'
    given = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "VLLM_API_KEY": KEY}
    out = subprocess.run(["sh", "-euc", script], cwd=ROOT, env=given, capture_output=True, text=True, check=True).stdout
    found = dict(line.split("=", 1) for line in out.splitlines())
    bases = {found[name] for name in ("OPENAI_BASE_URL", "LLM_BASE_URL")}
    assert (bases, found["ANTHROPIC_BASE_URL"]) == ({f"{gateway.url}/v1"}, gateway.url)
    assert {found[name] for name in ("OPENAI_API_KEY", "LLM_API_KEY", "ANTHROPIC_AUTH_TOKEN")} == {KEY}


def test_connect_env_without_a_key_says_so(tmp_path: Path) -> None:
    """Where the gateway is not on this machine; nothing is asked of it."""
    done = run(tmp_path, "env", "--url", "https://gate", key="")
    assert done.returncode == 0
    assert 'OPENAI_API_KEY="$VLLM_API_KEY"' in done.stdout
    assert "VLLM_API_KEY is not set" in done.stderr


def test_connect_env_file_holds_the_key_for_its_owner_alone(gateway: Stub, tmp_path: Path) -> None:
    """A `.env` has no references; other lines and each `export` stay; a mode that lets others read it is narrowed."""
    file = tmp_path / ".env"
    file.write_text("# mine\nexport LLM_API_KEY=old\nOTHER='a b'\nLLM_API_KEY=older\n")
    file.chmod(0o644)
    connected(tmp_path, "env", "--url", gateway.url, "--output", str(file), "--yes")
    lines = file.read_text().splitlines()
    assert lines[:3] == ["# mine", f"export LLM_API_KEY={KEY}", "OTHER='a b'"]
    assert f"LLM_BASE_URL={gateway.url}/v1" in lines
    assert [line for line in lines if "LLM_API_KEY=" in line] == [f"export LLM_API_KEY={KEY}"]
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}
    file.chmod(0o644)
    connected(tmp_path, "env", "--url", gateway.url, "--output", str(file), "--yes")
    assert file.stat().st_mode & 0o777 == 0o600


def test_connect_env_file_without_a_key_is_refused(tmp_path: Path) -> None:
    """It would be useless."""
    done = run(tmp_path, "env", "--url", "https://gate", "--output", str(tmp_path / ".env"), key="")
    assert (done.returncode, files(tmp_path)) == (2, {})
    check_error(done.stderr)


def test_connect_litellm_is_what_the_word_litellm_writes(gateway: Stub, tmp_path: Path) -> None:
    """One configuration, and no key; models of other services stay in a file, ours are replaced."""
    file = tmp_path / "config.yaml"
    other = {"model_name": "gpt-5", "litellm_params": {"model": "openai/gpt-5", "api_key": "os.environ/OPENAI_API_KEY"}}
    stale = {
        "model_name": "gone",
        "litellm_params": {"model": "hosted_vllm/gone", "api_key": "os.environ/VLLM_API_KEY"},
        "model_info": {"disable_background_health_check": True},
    }
    file.write_text(yaml.safe_dump({"model_list": [other, stale], "litellm_settings": {"cache": True}}))
    connected(tmp_path, "litellm", "--url", gateway.url, "--output", str(file), "--yes")
    written = yaml.safe_load(file.read_text())
    printed = yaml.safe_load(connected(tmp_path, "litellm", "--url", gateway.url))
    assert written["model_list"] == [*printed["model_list"], other]
    assert written["litellm_settings"] == {"cache": True, **printed["litellm_settings"]}
    command = [sys.executable, "-m", "service.cli.main", "litellm", "--url", gateway.url]
    same = subprocess.run(command, cwd=ROOT, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert yaml.safe_load(same.stdout) == printed


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["codex", "--modal", "--url", "http://a"], 2, "--url and --modal"),
        (["codex", "--print", "--output", "x"], 2, "--print and --output"),
        (["codex", "--print", "--model", "\udcff"], 2, "The name of the model is not UTF-8."),
        (["codex", "--url", "localhost:8000"], 2, "'localhost:8000' is not the URL"),
        (["codex", "--url", "http://me:t0psecret@h"], 2, "may be a secret"),
        (["env", "--output", "/nowhere/.env"], 2, "'/nowhere/.env' cannot be written"),
    ],
)
def test_connect_that_is_refused_prints_an_error_and_a_hint(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    """And writes nothing."""
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout, files(tmp_path)) == (code, "", {})
    assert words in done.stderr
    assert "t0psecret" not in done.stderr
    check_error(done.stderr)


def test_connect_takes_the_gateway_of_the_environment(gateway: Stub, tmp_path: Path) -> None:
    """The option comes first, and without both it is the port of `up`."""
    assert gateway.url in connected(tmp_path, "env", VLLM_GATEWAY_URL=f"{gateway.url}/v1/")
    assert "http://b/v1" in connected(tmp_path, "env", "--url", "http://b", VLLM_GATEWAY_URL=gateway.url)
    assert "http://127.0.0.1:9000/v1" in connected(tmp_path, "env", SERVICE_PORT="9000")
