"""A start needs no network and runs no code of a model's repository: the real service and engine, traced."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.dialogues import TINY
from tests.engine.running import FOREIGN, GONE_S, Service
from tests.system import programs

_CALLS = "connect,sendto,sendmsg,sendmmsg"
_ADDRESS = re.compile(r'sa_family=AF_INET6?,.*?inet_(?:addr|pton)\((?:AF_INET6, )?"([^"]+)"')
_MAPS = {
    "config.json": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "org/other--evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
}


@dataclass(frozen=True)
class Run:
    """From a start over a generation to the end.

    Attributes:
        addresses: Whom any process of it tried to reach.
        ran: The files of the repository that were run.
    """

    addresses: list[str]
    ran: list[str]


def lay_repository(directory: Path, traces: Path) -> Path:
    """Write the tiny model as somebody may publish it who wants the code beside it to run."""
    shutil.copytree(TINY, directory)
    traces.mkdir()
    for name, auto_map in _MAPS.items():
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    for name in ("evil", "__init__", "conftest", "sitecustomize", "modeling_qwen3", "tokenization_qwen3"):
        trace = f"open({str(traces / name)!r}, 'w').close()"
        (directory / f"{name}.py").write_text(f"{trace}\nclass Evil:\n    pass\n")
    return directory


@pytest.fixture(scope="module")
def run(engine_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Such a repository served where there is only a loopback, every call that may send something traced."""
    directory = tmp_path_factory.mktemp("alone")
    trace, traces = directory / "trace", directory / "traces"
    strace = [programs.find("strace"), "-D", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-e", f"trace={_CALLS}"]
    alone = [programs.find("unshare"), "--map-root-user", "--net"]
    loopback = ["sh", "-c", f'{programs.find("ip")} link set lo up && exec "$@"', "sh"]
    prefix = [*alone, *loopback, *strace, "-o", str(trace)]
    repository = lay_repository(directory / "repository", traces)
    with Service(directory, str(repository), prefix=prefix, **FOREIGN) as service:
        service.wait_ready()
        service.signal()
        assert service.wait_ended(10 * GONE_S) == 0, service.story
    yield Run(_ADDRESS.findall(trace.read_text()), [file.name for file in traces.iterdir()])


def test_start_connects_to_nothing_but_the_loopback(run: Run) -> None:
    """No statistics, no look-up of a name, no hub."""
    assert run.addresses  # the gateway asks its engine
    assert set(run.addresses) <= {"127.0.0.1", "::1"}


def test_start_runs_no_code_of_the_models_repository(run: Run) -> None:
    """Although its configuration names some; its weights and its tokenizer are those of a known family."""
    assert run.ran == []
