"""The environment of the clients: built once; again when its lock changes or an attempt was cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import client_env


class Builder:
    """Builds by making a directory, and counts."""

    def __init__(self) -> None:
        self.built: list[Path] = []

    def __call__(self, root: Path) -> None:
        """Build one."""
        self.built.append(root)
        root.mkdir()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock, and a cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "clients.lock"
    file.write_text("openai==1\n")
    return file


def test_client_env_is_built_once_a_lock(lock: Path) -> None:
    """The bytes of the lock decide."""
    builder = Builder()
    first = client_env._ensure("clients", [lock], builder)
    assert client_env._ensure("clients", [lock], builder) == first
    lock.write_text("openai==2\n")
    assert client_env._ensure("clients", [lock], builder) != first
    assert len(builder.built) == 2


def test_client_env_cut_short_is_built_again(lock: Path) -> None:
    """The files of a killed builder do not count as a complete environment."""

    def dies(root: Path) -> None:
        (root / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_env._ensure("clients", [lock], dies)
    root = client_env._ensure("clients", [lock], Builder())
    assert not (root / "half").exists()


def test_client_env_without_node_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Node the tests fail with an error that names the package."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AssertionError, match=r"'node' is not in PATH\..*install Node 20"):
        client_env.node()


def test_client_env_that_fails_to_install_shows_uvs_output(lock: Path) -> None:
    """The error's message is the output of uv."""
    missing = lock.with_name("missing.lock")
    with pytest.raises(AssertionError, match=r"(?s)uv pip failed with \d+:.*missing\.lock"):
        client_env._ensure("clients", [lock], lambda root: client_env._build_python(root, missing))
