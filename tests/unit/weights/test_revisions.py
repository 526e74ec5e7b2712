"""Revisions of entries that pin none come from the lock file, the cache's record, or the hub, in this order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import RegistryError, WeightsError
from service.registry.models import ModelSpec, Registry
from service.weights import revisions

A, B, C = "a" * 40, "b" * 40, "c" * 40
SPEC = ModelSpec.model_validate(
    {
        "key": "mine",
        "hub_id": "org/mine",
        "speculative": {"method": "eagle3", "num_speculative_tokens": 3, "hub_id": "org/draft"},
        "adapters": ({"name": "one", "hub_id": "org/one", "revision": C}, {"name": "two", "hub_id": "org/two"}),
    }
)
COMMITS = {"org/mine": A, "org/draft": B, "org/two": A}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the record of an empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "vllm-service.revisions.toml"


def unreachable(hub_id: str) -> str:
    """Resolve as a hub that does not answer."""
    raise WeightsError(f"{hub_id} cannot be asked for")


def forbidden(hub_id: str) -> str:
    """Fail the test: the hub must not be asked."""
    pytest.fail(f"the hub was asked for {hub_id}")


def test_unpinned_repositories_are_those_without_a_commit() -> None:
    """Model, draft and adapters alike."""
    assert revisions.unpinned(SPEC) == ["org/mine", "org/draft", "org/two"]
    assert revisions.unpinned(revisions.with_revisions(SPEC, COMMITS)) == []


def test_pinned_entry_keeps_the_commits_that_it_names() -> None:
    """A lock file says nothing where the entry does."""
    spec = revisions.with_revisions(SPEC, COMMITS | {"org/one": A})

    assert spec.revision == A
    assert spec.speculative
    assert spec.speculative.revision == B
    assert [adapter.revision for adapter in spec.adapters] == [C, A]


@pytest.mark.parametrize(
    ("models_file", "expected"), [("/a/my-models.toml", "/a/my-models.lock.toml"), ("/a/models", "/a/models.lock.toml")]
)
def test_lock_file_lies_beside_the_models_file(models_file: str, expected: str) -> None:
    """Of the same name."""
    assert revisions.lock_file(models_file) == Path(expected)


def test_lock_file_of_the_built_in_models_lies_beside_them() -> None:
    """A team that deploys from a clone commits it, and it is shipped with the package."""
    assert revisions.lock_file(None).name == "models.lock.toml"
    assert revisions.lock_file(None).with_name("models.toml").is_file()


def test_registry_has_the_revisions_of_the_lock_file(tmp_path: Path) -> None:
    """They count where an entry pins none; the hub is not asked."""
    models = tmp_path / "models.toml"
    models.write_text('[models.mine]\nhub_id = "org/mine"\n[models.other]\nhub_id = "org/other"\n')
    revisions.record(revisions.lock_file(models), {"org/mine": A})
    registry = revisions.registry(models)

    assert (registry.specs["mine"].revision, registry.specs["other"].revision) == (A, None)
    assert registry.resolve("ORG/MINE").spec.revision == A
    assert registry.specs["qwen3-8b"] == Registry.load().specs["qwen3-8b"]


def test_resolve_revisions_asks_the_hub_once_and_records_the_answer(cache: Path) -> None:
    """The second call does not ask the hub."""
    asked: list[str] = []
    told: dict[str, str] = {}

    def resolve(hub_id: str) -> str:
        asked.append(hub_id)
        return COMMITS[hub_id]

    resolved = revisions.resolve_revisions(SPEC, resolve, told.__setitem__)
    again = revisions.resolve_revisions(SPEC, forbidden)

    assert resolved == again == revisions.with_revisions(SPEC, COMMITS)
    assert (sorted(asked), told, revisions.read(cache)) == (sorted(COMMITS), COMMITS, COMMITS)


def test_resolve_revisions_of_a_pinned_entry_asks_and_writes_nothing(cache: Path) -> None:
    """Nearly all entries are pinned."""
    spec = revisions.with_revisions(SPEC, COMMITS)

    assert revisions.resolve_revisions(spec, forbidden) is spec
    assert not cache.exists()


def test_resolve_revisions_without_the_hub_fails(cache: Path) -> None:
    """And records nothing."""
    with pytest.raises(WeightsError, match="org/"):
        revisions.resolve_revisions(SPEC, unreachable)
    assert not cache.exists()


def test_resolve_revisions_without_the_hub_uses_the_commit_of_the_last_visit(tmp_path: Path, cache: Path) -> None:
    """A model that was fetched before there was a record can be served offline, and is recorded."""
    refs = tmp_path / "hf/hub/models--org--mine/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(B)
    spec = ModelSpec(key="mine", hub_id="org/mine")

    assert revisions.resolve_revisions(spec, unreachable).revision == B
    assert revisions.read(cache) == {"org/mine": B}


class Lock:
    """A lock that another replica holds first, which does something before it releases it."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile, self.names = meanwhile, list[str]()

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Let the other replica do its work first."""
        self.names.append(name)
        self.meanwhile()
        yield


def test_resolve_revisions_uses_what_another_replica_recorded_meanwhile(cache: Path) -> None:
    """Two replicas never serve different commits: only the first asks the hub."""
    spec = ModelSpec(key="mine", hub_id="org/mine")
    lock = Lock(lambda: revisions.record(cache, {"org/mine": A}))

    assert revisions.resolve_revisions(spec, forbidden, lock=lock).revision == A
    assert lock.names == ["revisions"]


def test_resolve_revisions_of_recorded_commits_takes_no_lock(cache: Path) -> None:
    """A boot makes no call to Modal for what its volume has."""
    revisions.record(cache, {"org/mine": A})
    lock = Lock(lambda: pytest.fail("the lock was taken"))

    assert revisions.resolve_revisions(ModelSpec(key="mine", hub_id="org/mine"), forbidden, lock=lock).revision == A


@pytest.mark.parametrize("shared", [True, False])
def test_resolve_revisions_with_update_takes_the_newest(cache: Path, shared: bool) -> None:
    """A record that replicas share stays as it is: a deployed service goes on with the commits that it serves."""
    spec = ModelSpec(key="mine", hub_id="org/mine")
    revisions.record(cache, {"org/mine": A})
    lock = Lock(lambda: None) if shared else None

    assert revisions.resolve_revisions(spec, lambda _: B, update=True, lock=lock).revision == B
    assert revisions.read(cache) == {"org/mine": A if shared else B}


def test_resolve_revisions_with_a_cache_that_cannot_be_written_works(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other process can have recorded anything in it."""
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("not a directory")

    assert revisions.resolve_revisions(ModelSpec(key="mine", hub_id="org/mine"), lambda _: B).revision == B


def test_record_adds_and_replaces_only_when_told_to(tmp_path: Path) -> None:
    """The first word counts; the file is whole at any time, and says what it is."""
    file = tmp_path / "new" / "models.lock.toml"

    assert revisions.record(file, {"org/b": B}) == {"org/b": B}
    assert revisions.record(file, {"org/a": A, "org/b": C}) == {"org/a": A, "org/b": B}
    assert revisions.record(file, {"org/b": C}, update=True) == {"org/a": A, "org/b": C}
    assert file.read_text().startswith("# The commits")
    assert [path.name for path in file.parent.iterdir()] == ["models.lock.toml"]
    assert revisions.read(file) == {"org/a": A, "org/b": C}


def test_record_of_nothing_new_does_not_touch_the_file(tmp_path: Path) -> None:
    """A deploy of the same is a deploy of the same bytes."""
    file = tmp_path / "models.lock.toml"
    revisions.record(file, {"org/a": A})
    file.chmod(0o444)
    before = file.stat()
    revisions.record(file, {"org/a": A})

    assert file.stat() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[revisions", "cannot be read"),
        ("a = 1\n", "has no [revisions] table"),
        ('[revisions]\n"org/a" = "main"\n', "'org/a' is 'main', not a commit"),
        ('[revisions]\n"org/a" = 1\n', "'org/a' is 1, not a commit"),
    ],
)
def test_lock_file_that_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    """With what is the matter; nothing is guessed."""
    file = tmp_path / "models.lock.toml"
    file.write_text(text)
    with pytest.raises(RegistryError) as caught:
        revisions.read(file)

    assert f"Lock file '{file}'" in str(caught.value)
    assert said in str(caught.value)


def test_lock_file_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    """It is made when there is something to record."""
    assert revisions.read(tmp_path / "models.lock.toml") == {}


def test_lock_writer_records_the_commit_in_the_lock_file_and_logs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names the file."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "models.lock.toml"
    revisions.lock_writer(file)("org/a", A)

    assert revisions.read(file) == {"org/a": A}
    assert caplog.messages == [f"org/a is at {A}, recorded in {file}"]


def test_lock_writer_without_a_lock_file_names_the_record_of_the_cache(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that is in no registry has no lock file."""
    caplog.set_level(logging.INFO)
    revisions.lock_writer(None)("org/a", A)

    assert caplog.messages == [f"org/a is at {A}, recorded in {cache}"]
