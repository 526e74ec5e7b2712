"""The engine's log: what is kept, and which line of a dead engine's log names the cause."""

from __future__ import annotations

import signal
import threading

import pytest

from service.engine.log import KEPT_LINES, EngineLog

_SERVER = "(APIServer pid=101) "
_CORE = "(EngineCore pid=117) "
_CORE_ERROR = "(EngineCore pid=117) ERROR 11-20 22:01:02 [core.py:1130] "


def traceback(prefix: str, error: str) -> list[str]:
    """Return a traceback as vLLM's processes write it, each line with the prefix."""
    frames = ["Traceback (most recent call last):", '  File "/e/vllm/v1/engine/core.py", line 1118, in run_engine_core']
    return [prefix + line for line in (*frames, "    engine_core = EngineCoreProc(*args, **kwargs)", error)]


# How the API server ends when its engine core did not come up: the cause is far above.
AFTERMATH = [
    _CORE + "Process EngineCore:",
    *traceback(_CORE, "RuntimeError: cannot continue"),
    *traceback(_SERVER, "RuntimeError: Engine core initialization failed. See root cause above. Failed procs: {}"),
]
KV_CACHE = (
    "ValueError: To serve at least one request with the models's max seq len (131072), (18.0 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (2.0 GiB)."
)
SHARD = "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not covered"
DEATHS = {
    "bad flag": (
        ["usage: vllm serve [model_tag] [options]", "vllm serve: error: unrecognized arguments: --no-such-flag 5"],
        "unrecognized arguments: --no-such-flag 5",
        "extra_args",
    ),
    "bad value": (
        ["usage: vllm serve [options]", "vllm serve: error: argument --kv-cache-dtype: invalid choice: 'fp9'"],
        "argument --kv-cache-dtype: invalid choice: 'fp9'",
        "extra_args",
    ),
    "bad parser": (
        traceback(_SERVER, "KeyError: 'invalid tool call parser: hermies (chose from { hermes,pythonic })'"),
        "invalid tool call parser: hermies",
        "",
    ),
    "bad path": (
        traceback(_SERVER, "OSError: Can't load the configuration of '/no/such/model'."),
        "Can't load the configuration of '/no/such/model'",
        "",
    ),
    "port in use": (
        traceback(_SERVER, "OSError: [Errno 98] Address already in use"),
        "Address already in use",
        "SERVICE_PORT",
    ),
    "cache too large": ([*traceback(_CORE_ERROR, KV_CACHE), *AFTERMATH], "KV cache is needed", "max_model_len"),
    "corrupt weights": ([*traceback(_CORE_ERROR, SHARD), *AFTERMATH], "incomplete metadata", "damaged"),
    "out of memory": (
        [
            *traceback(_CORE_ERROR, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 MiB."),
            *AFTERMATH,
        ],
        "CUDA out of memory",
        "SERVICE_N_GPU",
    ),
    "disk full": (
        [*traceback(_CORE_ERROR, "OSError: [Errno 28] No space left on device"), *AFTERMATH],
        "No space left on device",
        "disk space",
    ),
    "canary changed": (
        traceback(_SERVER, "RuntimeError: The canary after waking is [1], before sleeping it was [2]."),
        "The canary after waking",
        "",
    ),
}
NOISE = [
    "WARNING 11-20 22:00:55 [argparse_utils.py:195] With `vllm serve`, you should provide the model as a positional",
    "INFO 11-20 22:00:56 [utils.py:233] non-default args: {'model': '/weights', 'port': 8000}",
    _CORE + "INFO 11-20 22:00:58 [core.py:93] Initializing a V1 LLM engine (v0.32.0) with config: ...",
    _CORE + "Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 29.11it/s]",
    "",
]


def cause(lines: list[str]) -> str | None:
    """Return the cause that the description of an exit names; None where it names the last line instead."""
    log = EngineLog()
    for line in lines:
        log.add(line)
    message = log.describe_exit(1, 1.0, None).message
    return message.partition("Cause: '")[2].removesuffix("'.") if "Cause: '" in message else None


@pytest.mark.parametrize(("lines", "root", "hint"), DEATHS.values(), ids=DEATHS)
def test_cause_of_a_death_is_its_first_exception(lines: list[str], root: str, hint: str) -> None:
    """Among warnings before and failures after, the one exception that started it."""
    found = cause([*NOISE, *lines, *NOISE[-1:]])

    assert found is not None
    assert root in found
    assert "pid=" not in found
    assert found == found.strip()


@pytest.mark.parametrize(("lines", "root", "hint"), DEATHS.values(), ids=DEATHS)
def test_exit_is_described_with_code_time_root_and_hint(lines: list[str], root: str, hint: str) -> None:
    """For people: how it ended, when, why, and what to do."""
    log = EngineLog()
    for line in [*NOISE, *lines]:
        log.add(line)
    error = log.describe_exit(1, 21.96, None)

    assert "exited with code 1 after 22.0 s, before it was ready" in error.message
    assert root in error.message
    assert hint in error.hint
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        NOISE,
        ["INFO 11-20 22:00:56 [x.py:1] a line that mentions ValueError: in the middle"],
        traceback(_SERVER, "KeyboardInterrupt"),
    ],
)
def test_cause_of_a_log_without_an_exception_is_none(lines: list[str]) -> None:
    """Warnings, mentions and an interrupt are no causes."""
    assert cause(lines) is None


def test_cause_of_chained_tracebacks_is_the_first() -> None:
    """Of chained tracebacks the first is the cause; the second is what came of it."""
    lines = traceback(_CORE_ERROR, "FileNotFoundError: no shard 3")
    chained = [_CORE_ERROR + "The above exception was the direct cause of the following exception:"]

    assert cause([*lines, *chained, *traceback(_CORE_ERROR, "RuntimeError: load failed")]) == (
        "FileNotFoundError: no shard 3"
    )


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_exit_by_a_signal_names_it(number: signal.Signals) -> None:
    """The CPU build can die of an illegal instruction and write nothing."""
    assert f"killed by {number.name} after 3.0 s" in str(EngineLog().describe_exit(-number, 3.0, None))


def test_exit_by_an_unnamed_signal_has_its_number() -> None:
    """Real-time signals have no names."""
    assert "killed by signal 40 after 3.0 s" in str(EngineLog().describe_exit(-40, 3.0, None))


def test_exit_by_sigkill_suspects_memory() -> None:
    """Usually the kernel sent it."""
    sentence = str(EngineLog().describe_exit(-signal.SIGKILL, 3.0, None))

    assert "killed by SIGKILL" in sentence
    assert "memory" in sentence


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("ready_after_s", [None, 5.0])
def test_exit_by_a_signal_is_named_before_what_the_log_has(number: signal.Signals, ready_after_s: float | None) -> None:
    """A client can have any line logged, so that of an earlier request is no cause, and is marked."""
    log = EngineLog()
    for line in traceback(_SERVER, "ValueError: of a request"):
        log.add(line)
    error = log.describe_exit(-number, 10.0, ready_after_s)

    assert error.message.startswith(f"The engine was killed by {number.name} ")
    assert error.message.endswith(" Its log has, maybe of a request: 'ValueError: of a request'.")
    assert "Cause" not in error.message


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        (-9, []),
        (-9, traceback(_SERVER, "ValueError: of a request")),
        (
            0,
            [
                _SERVER
                + "WARNING 11-20 22:01:02 [core_client.py:817] [shutdown] MPClient: engine core exited unexpectedly"
            ],
        ),
        (
            1,
            traceback(
                _SERVER, "RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore': -9}"
            ),
        ),
    ],
    ids=["leader", "leader after an error", "core", "core of a boot"],
)
@pytest.mark.parametrize("ready_after_s", [None, 5.0])
def test_exit_for_lack_of_memory_says_so_and_what_to_do(
    code: int, lines: list[str], ready_after_s: float | None
) -> None:
    """The kernel counts whom it kills; the engine core is the largest process and so the first."""
    log = EngineLog()
    for line in lines:
        log.add(line)
    error = log.describe_exit(code, 10.0, ready_after_s, out_of_memory=True)

    assert ": the kernel killed a process because memory ran out." in error.message
    assert "more memory" in error.hint


@pytest.mark.parametrize(("code", "lines"), [(1, DEATHS["bad parser"][0]), (-11, []), (3, [])])
def test_exit_for_another_reason_is_not_blamed_on_memory(code: int, lines: list[str]) -> None:
    """A neighbour in the same container was killed meanwhile."""
    log = EngineLog()
    for line in lines:
        log.add(line)

    assert "memory" not in str(log.describe_exit(code, 10.0, None, out_of_memory=True))


def test_exit_after_ready_names_no_error_that_is_older_than_some_seconds() -> None:
    """A request failed an hour ago; what the engine died of is written in its last seconds."""
    now = [0.0]
    log = EngineLog(clock=lambda: now[0])
    for line in traceback(_SERVER, "ValueError: of a request"):
        log.add(line)
    now[0] = 3000.0
    log.add("INFO: another request")
    assert "ValueError" not in str(log.describe_exit(1, 3060.0, 5.0))

    for line in traceback(_CORE_ERROR, "RuntimeError: CUDA error"):
        log.add(line)
    now[0] = 3001.0
    assert "CUDA error" in str(log.describe_exit(1, 3061.0, 5.0))


def test_exit_after_ready_counts_from_ready() -> None:
    """When it worked for an hour that is worth knowing."""
    assert "3600.0 s after it was ready" in str(EngineLog().describe_exit(0, 3615.0, 15.0))


def test_exit_without_a_cause_has_the_last_line() -> None:
    """Blank lines do not count."""
    log = EngineLog()
    for line in ("first", "second", "", "   "):
        log.add(line)

    assert "Last line: 'second'" in str(log.describe_exit(3, 1.0, None))


def test_exit_with_an_empty_log_still_says_how_it_ended() -> None:
    """A process that could not even be loaded writes nothing."""
    assert "exited with code 127" in str(EngineLog().describe_exit(127, 0.1, None))


def test_log_keeps_the_end_of_a_long_output() -> None:
    """A service runs for weeks; its parent must not grow."""
    log = EngineLog()
    for number in range(KEPT_LINES + 10):
        log.add(str(number))

    assert len(log.lines) == KEPT_LINES
    assert log.last_line == str(KEPT_LINES + 9)


def test_log_passes_each_line_on() -> None:
    """The screen and the log file see every line, empty ones too."""
    seen: list[str] = []
    log = EngineLog(seen.append)
    for line in ("a", "", "b"):
        log.add(line)

    assert seen == ["a", "", "b"] == log.lines


def test_log_can_be_read_while_it_is_written() -> None:
    """One thread adds lines while another asks for the last one."""
    log = EngineLog()
    done = threading.Event()

    def write() -> None:
        for number in range(20000):
            log.add(str(number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert log.lines is not log.lines
        _ = log.last_line
    writer.join()


def test_log_closed_wakes_its_waiters() -> None:
    """The reaper waits for the end of the output, bounded."""
    log = EngineLog()
    log.wait_closed(0)
    log.close()
    log.wait_closed(60)


def test_death_after_ready_is_not_blamed_on_the_boot() -> None:
    """A traceback that a finished boot survived is no cause of what kills the engine a moment later."""
    now = [0.0]
    log = EngineLog(clock=lambda: now[0])
    for line in ("Traceback (most recent call last):", "ImportError: an optional kernel is missing"):
        log.add(line)
    assert "ImportError" in str(log.describe_exit(1, 5.0, None))
    now[0] = 3.0
    log.add("INFO: a request")
    assert "ImportError" not in str(log.describe_exit(-9, 7.0, 5.0))
    assert "SIGKILL" in str(log.describe_exit(-9, 7.0, 5.0))
