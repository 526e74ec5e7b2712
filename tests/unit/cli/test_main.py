"""Bad input at the real command line: one line that says what, which value, what else; nothing started; soon."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from service.cli import main
from tests.processor_time import bare_s
from tests.unit.cli.outputs import check_error

COMMAND = Path(sys.executable).with_name("vllm-service")
CPU_LIMIT = 60  # times the processor time of a Python that does nothing; 9 to 27 were measured
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the home directory of the command."""
    directory = tmp_path / "home"
    directory.mkdir()
    return directory


@pytest.fixture
def run(home: Path, port: int) -> Run:
    """Return a function that runs the command in a bare environment, where no engine could be installed.

    There is no driver, neither a hub nor a package index is in reach, and uv's cache is empty.
    """
    env = {
        "HOME": str(home), "PATH": "/nowhere", "SERVICE_PORT": str(port), "HF_ENDPOINT": "http://127.0.0.1:9",
        "UV_OFFLINE": "1", "UV_NO_CONFIG": "1", "PIP_CONFIG_FILE": os.devnull, "UV_PYTHON_DOWNLOADS": "never",
    }  # fmt: skip

    def command(
        *arguments: str, program: str = str(COMMAND), stdout: int | IO[str] = subprocess.PIPE, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        merged = {name: text for name, text in (env | environ).items() if text is not None}
        return subprocess.run(
            [program, *arguments], env=merged, cwd=home, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    return command


def everything_in(directory: Path) -> list[Path]:
    """Return all files and directories below this one."""
    return sorted(directory.rglob("*"))


def refused(run: Run, home: Path, code: int, *words: str, arguments: tuple[str, ...] = ("up",), **environ: str) -> None:
    """Run, and insist on an error and a hint of one line each, the exit code, little time, and nothing left behind."""
    before = everything_in(home)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*arguments, **environ)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)

    check_error(done.stderr)
    for word in words:
        assert word in done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    assert everything_in(home) == before
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < CPU_LIMIT * bare_s()


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ()])
def test_help_lists_the_commands(run: Run, arguments: tuple[str, ...]) -> None:
    """With no arguments too."""
    done = run(*arguments)
    text = done.stdout + done.stderr

    assert "up" in text.split()
    assert "models" in text.split()
    assert "Traceback" not in text


@pytest.mark.parametrize("command", ["up", "models"])
def test_help_of_a_command_lists_its_options(run: Run, command: str) -> None:
    """Each explains itself."""
    done = run(command, "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert {"up": "--host", "models": "--json"}[command] in done.stdout


@pytest.mark.parametrize("arguments", [("serve",), ("up", "--no-such-option"), ("models", "superfluous")])
def test_usage_that_is_wrong_ends_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    """Commands and options that do not exist, on stderr."""
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert arguments[-1] in done.stderr


def test_models_prints_json_and_nothing_else(run: Run, home: Path) -> None:
    """A program can read it, and a list leaves nothing behind."""
    done = run("models", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    assert {"qwen3-8b", "tiny"} <= {row["key"] for row in json.loads(done.stdout)}
    assert everything_in(home) == []


def test_models_lists_the_users_own(run: Run, home: Path) -> None:
    """Beside the built-in ones."""
    (home / "mine.toml").write_text('[models.mine]\nhub_id = "org/mine"\ngpu = "L4"\n')
    done = run("models", SERVICE_MODELS_FILE="~/mine.toml")

    assert done.returncode == 0
    assert "org/mine" in done.stdout


@pytest.mark.parametrize("name", ["qwen3-8", "gema-3-12b"])
def test_up_with_an_unknown_model_offers_the_nearest(run: Run, home: Path, name: str) -> None:
    """On the command line and by the variable."""
    nearest = {"qwen3-8": "qwen3-8b", "gema-3-12b": "gemma-3-12b"}[name]
    words = (f"Unknown model '{name}'", f"Did you mean '{nearest}'?", "vllm-service models")
    refused(run, home, 2, *words, arguments=("up", name))
    refused(run, home, 2, *words, SERVICE_MODEL=name)


@pytest.mark.parametrize("name", ["./no-such-directory", "org/", "org/na me"])
def test_up_with_what_cannot_be_a_hub_id_says_so(run: Run, home: Path, name: str) -> None:
    """Neither a key, nor a hub id, nor a directory with a model."""
    refused(run, home, 2, f"'{name}'", arguments=("up", name))


@pytest.mark.parametrize("command", ["up", "models"])
def test_unknown_setting_offers_the_nearest(run: Run, home: Path, command: str) -> None:
    """A typo must not be passed over."""
    words = ("SERVICE_SCALEDOWN_WIDOW is not a setting", "Did you mean 'SERVICE_SCALEDOWN_WINDOW'?")
    refused(run, home, 2, *words, arguments=(command,), SERVICE_SCALEDOWN_WIDOW="60")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SERVICE_PORT", "http", "a whole number from 1 to 65535"),
        ("SERVICE_SNAPSHOT", "tpu", "one of off, cpu, gpu"),
        ("SERVICE_STARTUP_TIMEOUT_S", "20m", "hint: Write SERVICE_STARTUP_TIMEOUT_S=1200."),
        ("SERVICE_GPU", "H1000", "Modal offers"),
        ("SERVICE_MODEL", "\udcff", "is not text in UTF-8"),
    ],
)
def test_wrong_setting_names_value_and_range(run: Run, home: Path, name: str, value: str, expected: str) -> None:
    """Name, value, what is valid."""
    shown = value.encode(errors="backslashreplace").decode()
    refused(run, home, 2, name, f"'{shown}'", expected, **{name: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not toml", ("is not TOML", "line 1")),
        (
            "[models.mine]\nhub_id = 'a/b'\nmax_len = 5\n",
            ("model 'mine'", "unknown field 'max_len'", "'max_model_len'"),
        ),
        ("[models.mine]\nhub_id = 'a/b'\nn_gpu = 'two'\n", ("model 'mine'", "field 'n_gpu' is 'two'")),
        ("[models.mine]\nhub_id = 'a/b'\naliases = ['tiny']\n", ("'tiny' of model 'mine'", "model 'tiny'")),
        ("[models.mine]\nhub_id = 'a/b'\ngpu = 'H1000'\n", ("model 'mine'", "Unknown GPU 'H1000'")),
        (f"x = {'[' * 5000}", ("is not TOML that can be read", "nested too deep")),
        (f"x = {'1' * 5000}", ("is not TOML", "digits")),
        (None, ("cannot be read", "No such file")),
    ],
)
def test_wrong_models_file_names_entry_and_field(
    run: Run, home: Path, text: str | None, words: tuple[str, ...]
) -> None:
    """No TOML, an unknown field, a wrong type, a duplicate alias, an unknown GPU, no file."""
    file = home / "mine.toml"
    if text is not None:
        file.write_text(text)
    refused(run, home, 2, *words, SERVICE_MODELS_FILE=str(file))


def test_up_over_more_gpus_than_visible_says_how_many_there_are(run: Run, home: Path) -> None:
    """Before anything is built."""
    refused(run, home, 1, "'tiny'", "n_gpu=2", "0 are visible", arguments=("up", "tiny"), SERVICE_N_GPU="2")


def test_up_with_weights_over_the_memory_says_both(run: Run, home: Path) -> None:
    """Before anything is built."""
    (home / "mine.toml").write_text("[models.huge]\nhub_id = 'org/huge'\nweights_gb = 1_000_000\n")
    words = ("'huge' are 1000000.0 GB", "of memory")
    refused(run, home, 1, *words, arguments=("up", "huge"), SERVICE_MODELS_FILE="~/mine.toml")


def test_up_on_a_taken_port_names_another(run: Run, home: Path, port: int) -> None:
    """Before the engine is started; exit code 1: the input was right, the machine is not."""
    with socket.create_server(("127.0.0.1", port)):
        refused(
            run, home, 1, f"Port {port} on 127.0.0.1", "in use", f"SERVICE_PORT={port + 1}", arguments=("up", "tiny")
        )


def test_up_on_a_taken_port_keeps_the_log_of_the_other_process(run: Run, home: Path, port: int) -> None:
    """The service that runs there writes its log at this very place."""
    log = home / ".local" / "state" / "vllm-service" / f"engine-{port}.log"
    log.parent.mkdir(parents=True)
    log.write_text("of the service that runs\n")
    with socket.create_server(("127.0.0.1", port)):
        run("up", "tiny")

    assert log.read_text() == "of the service that runs\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_up_on_every_address_without_a_key_is_refused(run: Run, home: Path, host: str) -> None:
    """An address that other machines reach needs a key."""
    refused(run, home, 2, f"'{host}'", "API_KEY=", arguments=("up", "tiny", "--host", host))


def test_up_with_broken_keys_shows_none(run: Run, home: Path) -> None:
    """Which pair is wrong, never what is in it."""
    refused(run, home, 2, "pair 2 is not name=key", arguments=("up", "tiny"), API_KEYS="alice=a,t0psecret")
    assert "t0psecret" not in run("up", "tiny", API_KEYS="alice=a,t0psecret").stderr


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "XDG_CACHE_HOME"])
def test_up_with_a_directory_that_cannot_be_made_says_which(run: Run, home: Path, variable: str) -> None:
    """A read-only home directory is no reason for a traceback."""
    done = run("up", "tiny", **{variable: "/dev/null"})

    assert done.returncode == 1
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert "/dev/null" in error
    assert hint.startswith(f"hint: Set {variable} ")
    assert "Traceback" not in done.stderr


def test_module_run_by_python_is_the_same_command(home: Path, port: int) -> None:
    """`python -m service.cli.main`, where no script was installed."""
    done = subprocess.run(
        [sys.executable, "-m", "service.cli.main", "up", "qwen3-8"],
        env={"HOME": str(home), "PATH": os.defpath, "SERVICE_PORT": str(port)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Unknown model 'qwen3-8'")


@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("litellm",), ("--help",)])
def test_output_that_cannot_be_written_is_one_sentence(run: Run, home: Path, arguments: tuple[str, ...]) -> None:
    """A full disk is told; /dev/full behaves like one."""
    with Path("/dev/full").open("w") as full:
        done = run(*arguments, stdout=full)

    check_error(done.stderr)
    assert "The output cannot be written: No space left on device." in done.stderr
    assert done.returncode == 1


def test_output_whose_reader_left_ends_quietly(run: Run) -> None:
    """`vllm-service models --json | head -1` shows no error."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("models", "--json", stdout=writer)
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_stream_that_is_closed_is_no_traceback(run: Run, closed: str) -> None:
    """Some supervisors start a process without one of them."""
    done = run("-c", f"exec {COMMAND} models {closed}", program="/bin/sh")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(("word", "code", "says"), [("chat", 2, "Standard input is empty"), ("doctor -", 0, "")])
def test_standard_input_that_is_closed_is_an_empty_one(run: Run, word: str, code: int, says: str) -> None:
    """A word that reads it finds nothing there."""
    done = run("-c", f"exec {COMMAND} {word} <&-", program="/bin/sh")

    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_output_in_an_encoding_without_a_letter_is_no_traceback(run: Run) -> None:
    """The letter is written as its number."""
    done = run("plan", "tiny", "--offline", PYTHONIOENCODING="ascii")

    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u" in done.stdout


def test_ctrl_c_while_the_words_are_built_ends_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typer handles it later only."""

    def pressed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.main.get_command", pressed)

    assert main._run() == 130
    assert capsys.readouterr() == ("", "")


def test_home_that_is_nowhere_is_one_sentence(home: Path) -> None:
    """A container's user without an entry in the user database, and no HOME: the variable is named."""
    script = "import os, pwd, sys; os.environ.pop('HOME', None); pwd.getpwuid = lambda _: {}[0]; " + (
        "sys.argv = ['vllm-service', 'models']; from service.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=home, capture_output=True, text=True, check=False)

    check_error(done.stderr)
    assert "HOME" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("place", ["", "relative"])
@pytest.mark.parametrize("command", ["up", "models", "boots", "prefetch", "litellm"])
def test_home_that_is_no_directory_is_refused_by_every_command(run: Run, home: Path, command: str, place: str) -> None:
    """Caches would land wherever the command happens to be started."""
    refused(run, home, 1, f"HOME='{place}'", "absolute path", arguments=(command,), HOME=place)


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (("up", "tiny"), "XDG_STATE_HOME"),
        (("up", "tiny"), "XDG_CACHE_HOME"),
        (("up",), "HF_HOME"),
        (("boots",), "XDG_STATE_HOME"),
        (("prefetch", "qwen3-0.6b"), "HF_HOME"),
        (("models",), "SERVICE_MODELS_FILE"),
    ],
)
def test_directory_that_the_system_refuses_is_named(
    run: Run, home: Path, arguments: tuple[str, ...], variable: str
) -> None:
    """Whatever the system refuses: a name that is too long stands for missing rights, which root does not lack."""
    place = f"/{'x' * 300}"
    done = run(*arguments, **{variable: place})

    assert done.returncode in {1, 2}
    assert "Traceback" not in done.stderr
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert place in error
    assert hint.startswith("hint: ")


def test_models_file_of_an_unknown_user_is_named(run: Run, home: Path) -> None:
    """`~name` has no directory where there is no such user."""
    refused(
        run,
        home,
        2,
        "'~nobody-4711/models.toml'",
        arguments=("models",),
        SERVICE_MODELS_FILE="~nobody-4711/models.toml",
    )


def test_terminal_without_a_size_shows_results(run: Run) -> None:
    """Some programs give their pseudo-terminals 0 columns."""
    assert "No boots are recorded yet" in run("boots", COLUMNS="0").stdout


@pytest.mark.parametrize("language", ["xx_YY.UTF-8", "C", "POSIX", ""])
def test_language_that_does_not_exist_is_no_traceback(run: Run, language: str) -> None:
    """A LANG that was forwarded by ssh and is not installed here."""
    done = run("models", LANG=language, LC_ALL=language)

    assert (done.returncode, done.stderr) == (0, "")


def test_relative_xdg_directory_counts_as_unset(run: Run, home: Path) -> None:
    """The specification says so; else each directory of a start would get caches of its own."""
    assert str(home / ".local" / "state") in run("boots", XDG_STATE_HOME="state").stdout


def test_start_in_a_directory_that_is_gone_is_no_traceback(run: Run, home: Path) -> None:
    """Another program removed it meanwhile."""
    gone = home / "gone"
    gone.mkdir()
    done = run("-c", f"cd {gone} && rmdir {gone} && exec {COMMAND} models", program="/bin/sh", PATH=os.defpath)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "environ", "given"),
    [
        (["MODEL=a b"], {}, "a b"),
        (['MODEL=it\'s "x" $HOME `id`'], {}, 'it\'s "x" $HOME `id`'),
        (["MODEL="], {}, None),
        ([], {"MODEL": "of-another-tool"}, None),
        ([], {}, None),
    ],
)
def test_make_serve_gives_model_as_one_argument(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], given: str | None
) -> None:
    """MODEL counts only where make's command line has it; a shell neither splits nor expands it."""
    root = Path(__file__).parents[3]
    shutil.copy(root / "Makefile", tmp_path)
    program = tmp_path / ".venv" / "bin" / "vllm-service"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    program.chmod(0o755)
    (tmp_path / ".venv" / "light").touch()
    env = {"PATH": os.environ["PATH"]} | environ
    command = ["make", "-s", "--old-file=.venv/light", "serve", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines() == ["<up>"] + ([f"<{given}>"] if given else []), done.stderr


LEFT_RUNNING = """
import asyncio, sys
from concurrent.futures import ThreadPoolExecutor
from modal._utils.async_utils import synchronizer
from service.cli.main import main

async def work():
    with ThreadPoolExecutor() as executor:
        while True:
            await asyncio.get_running_loop().run_in_executor(executor, int)

@synchronizer.create_blocking
async def begin():
    calls.append(asyncio.ensure_future(work()))

calls = []
begin()
sys.argv = ["vllm-service", "up", "no-such-model"]
main()
"""


MODALS = pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MODAL_CONFIG_PATH", "wrong.toml", "line 2 is no TOML"),
        ("MODAL_CONFIG_PATH", "list.toml", "must contain table sections"),
        ("MODAL_LOGLEVEL", "foo", "Unknown level: 'Level FOO'"),
    ],
)


@pytest.fixture
def damaged(home: Path) -> Path:
    """Return a directory with damaged configurations of Modal's client."""
    (home / "wrong.toml").write_text("[default]\ntoken_id = ak-t0psecret\n")
    (home / "list.toml").write_text("default = 't0psecret'\n")
    return home


@MODALS
@pytest.mark.usefixtures("damaged")
def test_damaged_configuration_of_modals_client_is_one_error(name: str, value: str, why: str, run: Run) -> None:
    """The client raises as it is imported, and its error may have the token in it."""
    for word in (("list",), ("boots", "--modal")):
        done = run(*word, **{name: value})

        assert done.returncode == 1
        check_error(done.stderr)
        assert "Modal's configuration, '" in done.stderr
        assert why in done.stderr
        assert "t0psecret" not in done.stderr + done.stdout


@MODALS
@pytest.mark.usefixtures("damaged")
def test_doctor_tells_a_damaged_configuration_of_modals_client(name: str, value: str, why: str, run: Run) -> None:
    """After what it says of this machine."""
    done = run("doctor", "--json", **{name: value})

    assert (done.returncode, done.stderr) == (1, "")
    account = json.loads(done.stdout)[-1]
    assert (account["check"], account["state"]) == ("account", "failed")
    assert why in account["text"]


@pytest.mark.parametrize("file", ["wrong.toml", "~nosuch/x"])
@pytest.mark.usefixtures("damaged")
def test_plan_goes_without_modals_prices_where_its_client_cannot_be_imported(file: str, run: Run) -> None:
    """Its own prices are there."""
    done = run("plan", "tiny", MODAL_CONFIG_PATH=file, MODAL_LOGLEVEL="foo")

    assert (done.returncode, done.stderr) == (0, "")


def test_call_of_modals_client_that_still_runs_says_nothing_after_the_hint(run: Run) -> None:
    """A deploy that misses a secret was still at its upload: tracebacks of it followed the hint at times."""
    done = run("-c", LEFT_RUNNING, program=sys.executable)
    assert done.returncode == 2
    check_error(done.stderr)
