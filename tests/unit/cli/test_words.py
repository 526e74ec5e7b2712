"""The form of every word of the command, whichever there are: help, examples, JSON, usage errors, Ctrl-C."""

from __future__ import annotations

import json
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
import pytest
import typer

from service.cli.main import app
from tests.processor_time import bare_s, ended
from tests.unit.cli.outputs import check_error

COMMAND = Path(sys.executable).with_name("vllm-service")
TINY = Path(__file__).parents[3] / "service/assets/tiny"
CPU_LIMIT = 13  # times the processor time of a Python that does nothing, 0.02 s; 8 to 9 were measured
MODAL_LIMIT = 60  # likewise up to the first request to Modal; 18 to 30, by word
ATTEMPTS = 3  # other processes slow this one down, and the fastest attempt is the one that they disturb least
END_S = 15  # from Ctrl-C to the end of the command
COMPLETED = {"MODEL", "MODEL...", "M", "GPU", "G[:n]", "GPU|MODEL"}  # how help calls what takes a model or a GPU
NO_DATA = {"up": "it serves until Ctrl-C"}  # words without --json, and why


def words(group: click.Command, before: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Yield every word that does something, with those before it."""
    commands = getattr(group, "commands", None)
    if commands is None:
        yield " ".join(before), group
        return
    for name, command in commands.items():
        yield from words(command, (*before, name))


ROOT = typer.main.get_command(app)
WORDS = dict(words(ROOT))
GROUPS = ["", *{word.rpartition(" ")[0] for word in WORDS if " " in word}]
OPTIONS = {word: {name for option in command.params for name in option.opts} for word, command in WORDS.items()}
MODAL = [word for word in WORDS if "--env" in OPTIONS[word]]
LOCAL = [word for word in WORDS if (word not in MODAL or "--modal" in OPTIONS[word]) and word not in NO_DATA]


def example(word: str) -> list[str]:
    """Return the arguments of a word's example."""
    text = " ".join((WORDS[word].epilog or "").split())
    found = re.search(rf"Example: .*?vllm-service ({word}(?: [^)]*)?)(?:\)|$)", text)
    assert found, f"{word} has no example: {text!r}"
    return shlex.split(found[1])


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A bare environment on 80 columns: neither Modal, a hub, a package index nor a gateway is in reach."""
    nowhere = dict.fromkeys(("MODAL_SERVER_URL", "HF_ENDPOINT", "VLLM_GATEWAY_URL"), "http://127.0.0.1:9")
    shutil.copytree(TINY, tmp_path / "my-model")
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello!"}]}\n')
    return {
        "HOME": str(tmp_path),
        "PATH": "/nowhere",
        "COLUMNS": "80",
        "UV_OFFLINE": "1",
        "UV_NO_CONFIG": "1",
    } | nowhere


def ran(arguments: list[str], env: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command in its home; return also the processor time that it took, in seconds."""
    outputs = [Path(env["HOME"]) / name for name in (".out", ".err")]
    with outputs[0].open("w") as out, outputs[1].open("w") as err:
        line = [str(COMMAND), *arguments]
        process = subprocess.Popen(line, env=env, cwd=env["HOME"], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        used_s = ended(process)
    texts = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess(line, process.returncode, *texts), used_s


def fastest(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command, and insist on an attempt within the limit of processor time."""
    times = []
    for _ in range(ATTEMPTS):
        bare = bare_s(env)
        done, used = ran(arguments, env)
        if used <= CPU_LIMIT * bare:
            return done
        times.append(round(used / bare, 1))
    raise AssertionError(f"{' '.join(arguments)} took {times} times the time of a bare Python; {CPU_LIMIT} are allowed")


@pytest.mark.parametrize("word", WORDS)
def test_help_of_a_word_has_an_example_and_fits_80_columns_soon(word: str, env: dict[str, str]) -> None:
    """Whole lines, on standard output; what the example gives, the word takes."""
    done = fastest([*word.split(), "--help"], env)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert " ".join(example(word)) in " ".join(done.stdout.split())
    given = {part.partition("=")[0] for part in example(word) if part.startswith("-")}
    assert given <= OPTIONS[word]


@pytest.mark.parametrize("group", GROUPS)
def test_help_lists_every_word_with_a_whole_sentence(group: str, env: dict[str, str]) -> None:
    """None is cut at 80 columns."""
    done = fastest([*group.split(), "--help"], env)
    assert done.returncode == 0
    listed = done.stdout.partition("Commands:\n")[2].splitlines()
    assert len(listed) == len({word.removeprefix(f"{group} ").split()[0] for word in WORDS if word.startswith(group)})
    assert [line for line in listed if line.rstrip().endswith("...") or len(line) > 80] == []


@pytest.mark.parametrize("word", WORDS)
def test_word_that_prints_data_prints_it_as_json_on_request(word: str) -> None:
    """Every one has the option, or a reason."""
    assert ("--json" in OPTIONS[word]) != (word in NO_DATA)


def test_words_that_speak_to_modal_take_its_environment() -> None:
    """All that are about a deployed service, or can be."""
    about_modal = {"deploy", "upload", "list", "url", "stop", "scale", "test", "warm", "logs", "doctor"}
    assert about_modal | {word for word in WORDS if "--modal" in OPTIONS[word]} <= set(MODAL)


def test_models_and_gpus_are_completed_by_every_word_that_takes_one() -> None:
    """No parameter of that kind is without a completion."""
    takers = {
        (word, str(param.name)): getattr(param, "_custom_shell_complete", None)
        for word, command in WORDS.items()
        for param in command.params
        if param.metavar in COMPLETED or param.name in {"model", "models", "gpu", "gpus"}
    }
    assert {word for word, _ in takers} >= {"up", "prefetch", "deploy", "url", "stop", "scale", "test", "warm", "logs"}
    assert [taker for taker, completion in takers.items() if completion is None] == []


@pytest.mark.parametrize("word", WORDS)
def test_word_with_an_unknown_option_ends_with_2_soon(word: str, env: dict[str, str]) -> None:
    """The option is named on standard error, in 80 columns."""
    done = fastest([*word.split(), "--no-such-option"], env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--no-such-option" in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


@pytest.mark.parametrize("word", LOCAL)
def test_example_prints_json_or_one_error(word: str, env: dict[str, str]) -> None:
    """Of a word that needs no account: nothing else is on standard output."""
    arguments = [part for part in example(word) if part not in {"--modal", "--json", "--csv"}]
    done, _ = ran([*arguments, "--json"], env)
    if done.returncode == 0:
        json.loads(done.stdout)
    else:
        assert (done.returncode in {1, 2}, done.stdout) == (True, "")
        check_error(done.stderr)


def interrupted(word: str, env: dict[str, str]) -> float:
    """Press Ctrl-C while a word waits for its first answer; return the processor time (in seconds) that it took so far.

    Its exit code is 130, and nothing but sentences was printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reach = {"MODAL_SERVER_URL": url, "MODAL_TOKEN_ID": "ak-1", "MODAL_TOKEN_SECRET": "as-1", "HF_ENDPOINT": url}
        there = ["--modal"] if "--modal" in OPTIONS[word] and "--modal" not in example(word) else []
        process = subprocess.Popen(
            [str(COMMAND), *example(word), *there],
            env={**env, **reach, "VLLM_GATEWAY_URL": url, "VLLM_API_KEY": "sk-1"},
            cwd=env["HOME"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert select.select([silent], [], [], 60)[0], process.communicate(timeout=END_S)
            used = psutil.Process(process.pid).cpu_times()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=END_S)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    return used.user + used.system


@pytest.mark.parametrize("word", MODAL)
def test_word_that_waits_for_modal_is_ended_by_ctrl_c(word: str, env: dict[str, str]) -> None:
    """Exit code 130 and no traceback, while nothing answers; and it has begun to ask soon."""
    times: list[float] = []
    while not times or (times[-1] > MODAL_LIMIT and len(times) < ATTEMPTS):
        bare = bare_s(env)
        times.append(interrupted(word, env) / bare)
    assert times[-1] <= MODAL_LIMIT, times
