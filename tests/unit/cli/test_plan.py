"""`plan` at the real command line: what it says of a fit, without one, and against the market; in 80 columns, soon."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from service.boots.records import BootRecord, keep, new_id
from tests.processor_time import bare_s
from tests.unit.cli.outputs import check_error
from tests.unit.cli.test_words import env, ran  # noqa: F401 - a fixture

CPU_LIMIT = 30  # times the processor time of a Python that does nothing; 15 were measured: 0.3 s
ATTEMPTS = 3
Env = dict[str, str]


def plan(env: Env, *arguments: str) -> str:  # noqa: F811 - the fixture
    """Return what the command prints; nothing else is printed, and no line has more than 80 columns."""
    done, _ = ran(["plan", *arguments], env)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    return done.stdout


def planned(env: Env, *arguments: str) -> dict[str, Any]:  # noqa: F811
    """Return the JSON object."""
    done, _ = ran(["plan", *arguments, "--json"], env)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def test_plan_takes_little_processor_time_and_no_network(env: Env) -> None:  # noqa: F811
    """Shapes, prices and boots are on this machine."""
    arguments = ["plan", "qwen3-8b", "--market-price", "0.05/0.2"]
    shares = [ran(arguments, env)[1] / bare_s() for _ in range(ATTEMPTS)]
    assert min(shares) <= CPU_LIMIT, shares


def test_plan_of_a_model_that_fits_has_all_parts(env: Env) -> None:  # noqa: F811
    """Memory, cache, price, scaledown windows with bars, loads."""
    said = plan(env, "qwen3-8b")
    assert said.startswith("qwen3-8b on H100, 40,960 tokens of context: fits.\n")
    assert "calculated; no GPU was measured" in said
    assert "147,456 bytes a token; 6.0 GB at full length" in said
    assert re.search(r"^cheapest that fits +L4, \$0\.80 an hour", said, re.MULTILINE)
    windows = re.findall(r"^(\d+ (?:s|min))( \*)? +([\d.]+)  (█*).? +(\d+)%", said, re.MULTILINE)
    assert [window for window, *_ in windows] == [
        "30 s",
        "1 min",
        "2 min",
        "5 min",
        "10 min",
        "15 min",
        "30 min",
        "60 min",
    ]
    assert [window for window, mark, *_ in windows if mark] == ["15 min"]  # the default
    assert [float(row[2]) for row in windows] == sorted(float(row[2]) for row in windows)
    assert windows[-1][3] == "█" * 20  # the dearest
    assert "market" not in said


def test_plan_without_a_fit_says_what_to_change(env: Env) -> None:  # noqa: F811
    """Nearest first, and no cost of what cannot run."""
    said = plan(env, "gemma-3-27b", "--gpu", "L40S")
    assert (
        "does not fit.\nWhat makes it fit, nearest first:\n  more GPUs: --gpu L40S --n-gpu 2 ($3.90 an hour)\n" in said
    )
    assert "an FP8 variant of the model, of about 32 GB" in said
    assert "Scale to zero" not in said


def test_plan_says_when_self_hosting_loses(env: Env) -> None:  # noqa: F811
    """Below a load, at every one, or at none."""
    said = plan(env, "qwen3-8b", "--market-price", "1/5")
    loads = re.findall(r"^ *([\d,]+) +[\d,.]+ +[\d,.]+ +1\.92\d*  (loses|pays)$", said, re.MULTILINE)
    assert [rate for rate, verdict in loads if verdict == "loses"] == ["1", "10", "100", "1,000"]
    threshold = re.search(r"Self-hosting loses below ([\d,]+) requests an hour, and pays above\.", said)
    assert threshold
    assert 1000 < int(threshold[1].replace(",", "")) < 10_000
    assert "Self-hosting loses at every load" in plan(env, "qwen3-8b", "--market-price", "0.05/0.2")
    assert "Self-hosting pays at every load" in plan(env, "qwen3-8b", "--market-price", "1e7")


def test_plan_says_that_a_second_replica_loses_again(env: Env) -> None:  # noqa: F811
    """No load of the table says anything else than the sentence below it."""
    arguments = ("qwen3-8b", "--gpu", "L4", "--requests-per-hour", "20000", "--market-price", "0.06")
    said = " ".join(plan(env, *arguments).split())
    assert " 20,000 53.59 0.09 0.060 loses " in said
    found = re.search(
        r"Self-hosting loses below ([\d,]+) requests an hour, and pays up to the ([\d,]+) requests an hour of one "
        r"replica; with a second one it pays from ([\d,]+)\.",
        said,
    )
    assert found
    first, carried, second = (int(figure.replace(",", "")) for figure in found.groups())
    assert first < carried < 20_000 < second < 2 * carried


def test_plan_of_a_load_above_one_replica_has_one_cost(env: Env) -> None:  # noqa: F811
    """That of all replicas, which no window ends; nothing is said of one replica's waiting."""
    said = " ".join(plan(env, "qwen3-8b", "--gpu", "L4", "--requests-per-hour", "50000").split())
    assert "50,000 requests an hour of 10 s take 3 replicas, which no scaledown window ends: $80.39 a day." in said
    assert " 50,000 80.39 " in said
    assert not re.search("mean wait|Always up", said)
    found = planned(env, "qwen3-8b", "--gpu", "L4", "--requests-per-hour", "50000")
    assert (found["traffic"]["replicas"], found["windows"]) == (3, [])


def test_plan_in_json_has_what_the_text_has(env: Env) -> None:  # noqa: F811
    """One object on standard output."""
    found = planned(env, "qwen3-8b-l4", "--max-model-len", "8192", "--requests-per-hour", "30", "--market-price", "2")
    assert (found["gpu"], found["verdict"], found["max_model_len"], found["measured"]) == ("L4", "fits", 8192, False)
    assert found["kv_cache"]["bytes_per_request_per_gpu"] == 8192 * 147_456
    assert found["market_dollars_per_million_tokens"] == 2
    assert 30 in [load["requests_per_hour"] for load in found["loads"]]
    assert {"scaledown_window", "dollars_per_day", "cold_share", "mean_wait_seconds", "boots_per_day"} == set(
        found["windows"][0]
    )
    refused = planned(env, "qwen3-235b", "--gpu", "a100")
    assert (refused["verdict"], refused["changes"][0]["n_gpu"]) == ("does not fit", 4)


def test_plan_waits_as_recorded_boots_did(env: Env) -> None:  # noqa: F811
    """Boots of this model on this GPU, not those without one; an option replaces them."""
    assert planned(env, "qwen3-8b")["traffic"]["boot_source"] == "assumed, none is recorded"
    for gpu, seconds in (("cpu", 5.0), ("NVIDIA H100 80GB HBM3", 40.0), ("NVIDIA L4", 90.0)):
        record = BootRecord(
            id=new_id(), at="2026-11-29T08:00:00+00:00", model="qwen3-8b", gpu=gpu, strategy="cpu", restored=True,
            fast_boot=True, versions={}, phases=(), outcome="ready", seconds=seconds,
        )  # fmt: skip
        keep(record, Path(env["HOME"]) / ".local/state/vllm-service/boots")
        time.sleep(0.002)
    found = planned(env, "qwen3-8b")["traffic"]
    assert (found["boot_seconds"], found["boot_source"]) == (40.0, "recorded boots")
    found = planned(env, "qwen3-8b", "--boot-seconds", "7")["traffic"]
    assert (found["boot_seconds"], found["boot_source"]) == (7.0, "--boot-seconds")


def test_plan_of_a_directory_takes_the_cheapest_gpu(env: Env) -> None:  # noqa: F811
    """No entry names one."""
    assert planned(env, "./my-model")["gpu"] == "T4"
    assert planned(env, "./my-model", "--gpu", "H200:2")["n_gpu"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("qwen3-8",), 2, "Did you mean 'qwen3-8b'?"),
        (("org/unknown", "--offline"), 1, "The shape of org/unknown is not known on this machine."),
        (("org/unknown",), 1, "not in reach"),
        (("qwen3-8b", "--gpu", "H1000"), 2, "Unknown GPU 'H1000'"),
        (("qwen3-8b", "--gpu", "H200:2", "--n-gpu", "4"), 2, "--gpu H200:2 and --n-gpu 4 are two counts."),
        (("qwen3-8b", "--gpu", "A10", "--n-gpu", "8"), 2, "Modal attaches 1 to 4 A10"),
        (("qwen3-8b", "--max-model-len", "100000"), 2, "is above the 40960 tokens that 'qwen3-8b' was made for"),
        (("qwen3-8b", "--requests-per-hour", "inf"), 2, "--requests-per-hour inf is not below 10,000,000."),
        (("qwen3-8b", "--request-seconds", "inf"), 2, "--request-seconds inf is not below 10,000,000."),
        (("qwen3-8b", "--market-price", "cheap"), 2, "--market-price 'cheap' is not IN/OUT."),
        (("qwen3-8b", "--market-price", "1/2/3"), 2, "Write two figures, such as 0.05/0.2."),
        (("qwen3-8b", "--tokens", "0/10"), 2, "--tokens '0/10' is not IN/OUT."),
        (("qwen3-8b", "--tokens", "0.5"), 2, "Write two whole numbers, such as 1000/300."),
        (("qwen3-8b", "--tokens", "1/20000000"), 2, "--tokens 2e+07 is not below 10,000,000."),
    ],
)
def test_wrong_question_is_one_error(env: Env, arguments: tuple[str, ...], code: int, says: str) -> None:  # noqa: F811
    """What, which value, what was expected; nothing on standard output."""
    done, _ = ran(["plan", *arguments], env)
    assert (done.returncode, done.stdout) == (code, "")
    check_error(done.stderr)
    assert says in done.stderr
