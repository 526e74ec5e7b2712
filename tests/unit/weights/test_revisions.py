"""Which commit an entry means that names none: the lock file, the cache's record, the hub, in this order."""

from __future__ import annotations

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
    """Be a hub that does not answer."""
    raise WeightsError(f"{hub_id} cannot be asked for")


def forbidden(hub_id: str) -> str:
    """Be a hub that must not be asked."""
    pytest.fail(f"the hub was asked for {hub_id}")


def test_unsettled_are_the_repositories_without_a_commit() -> None:
    """Model, draft and adapters alike."""
    assert revisions.unsettled(SPEC) == ["org/mine", "org/draft", "org/two"]
    assert revisions.unsettled(revisions.pinned(SPEC, COMMITS)) == []


def test_pinned_entry_keeps_the_commits_that_it_names() -> None:
    """A lock file says nothing where the entry does."""
    spec = revisions.pinned(SPEC, COMMITS | {"org/one": A})

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


def test_registry_has_what_the_lock_file_settles(tmp_path: Path) -> None:
    """Nobody asks the hub for it again."""
    models = tmp_path / "models.toml"
    models.write_text('[models.mine]\nhub_id = "org/mine"\n[models.other]\nhub_id = "org/other"\n')
    revisions.record(revisions.lock_file(models), {"org/mine": A})
    registry = revisions.registry(models)

    assert (registry.specs["mine"].revision, registry.specs["other"].revision) == (A, None)
    assert registry.resolve("ORG/MINE").spec.revision == A
    assert registry.specs["qwen3-8b"] == Registry.load().specs["qwen3-8b"]


def test_settle_asks_the_hub_once_and_records_it(cache: Path) -> None:
    """The next time nobody is asked."""
    asked: list[str] = []
    told: dict[str, str] = {}

    def resolve(hub_id: str) -> str:
        asked.append(hub_id)
        return COMMITS[hub_id]

    settled = revisions.settle(SPEC, resolve, told.__setitem__)
    again = revisions.settle(SPEC, forbidden)

    assert settled == again == revisions.pinned(SPEC, COMMITS)
    assert (sorted(asked), told, revisions.read(cache)) == (sorted(COMMITS), COMMITS, COMMITS)


def test_settle_of_a_pinned_entry_asks_and_writes_nothing(cache: Path) -> None:
    """As nearly all are."""
    spec = revisions.pinned(SPEC, COMMITS)

    assert revisions.settle(spec, forbidden) is spec
    assert not cache.exists()


def test_settle_without_the_hub_says_why(cache: Path) -> None:
    """Nothing is recorded of what nobody knows."""
    with pytest.raises(WeightsError, match="org/"):
        revisions.settle(SPEC, unreachable)
    assert not cache.exists()


def test_settle_without_the_hub_takes_what_the_cache_was_told_at_the_last_visit(tmp_path: Path, cache: Path) -> None:
    """A model that was fetched before there was a record can be served offline, and is recorded."""
    refs = tmp_path / "hf/hub/models--org--mine/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(B)
    spec = ModelSpec(key="mine", hub_id="org/mine")

    assert revisions.settle(spec, unreachable).revision == B
    assert revisions.read(cache) == {"org/mine": B}


class Lock:
    """A lock that another replica holds first: that one has recorded something before it is ours."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile, self.names = meanwhile, list[str]()

    @contextmanager
    def held(self, hub_id: str, _say: Callable[[str], None]) -> Iterator[None]:
        """Let the other one go first."""
        self.names.append(hub_id)
        self.meanwhile()
        yield


def test_settle_takes_what_another_replica_has_recorded_while_it_waited(cache: Path) -> None:
    """Two replicas never serve different commits: only the first asks the hub."""
    spec = ModelSpec(key="mine", hub_id="org/mine")
    lock = Lock(lambda: revisions.record(cache, {"org/mine": A}))

    assert revisions.settle(spec, forbidden, lock=lock).revision == A
    assert lock.names == ["revisions"]


def test_settle_of_what_is_recorded_waits_for_no_lock(cache: Path) -> None:
    """A boot does not ask Modal for what its volume knows."""
    revisions.record(cache, {"org/mine": A})
    lock = Lock(lambda: pytest.fail("the lock was taken"))

    assert revisions.settle(ModelSpec(key="mine", hub_id="org/mine"), forbidden, lock=lock).revision == A


@pytest.mark.parametrize("shared", [True, False])
def test_settle_with_update_takes_the_newest(cache: Path, shared: bool) -> None:
    """A record that replicas share is left alone: what is deployed goes on serving what it serves."""
    spec = ModelSpec(key="mine", hub_id="org/mine")
    revisions.record(cache, {"org/mine": A})
    lock = Lock(lambda: None) if shared else None

    assert revisions.settle(spec, lambda _: B, update=True, lock=lock).revision == B
    assert revisions.read(cache) == {"org/mine": A if shared else B}


def test_settle_with_a_cache_that_cannot_be_written_serves_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else can have fetched into it."""
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("not a directory")

    assert revisions.settle(ModelSpec(key="mine", hub_id="org/mine"), lambda _: B).revision == B


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


def test_lock_file_that_is_not_there_settles_nothing(tmp_path: Path) -> None:
    """It is made when there is something to record."""
    assert revisions.read(tmp_path / "models.lock.toml") == {}


def test_noted_commit_is_recorded_in_the_lock_file_and_said(tmp_path: Path) -> None:
    """Where it stands is part of the sentence."""
    said: list[str] = []
    file = tmp_path / "models.lock.toml"
    revisions.noting(file, said.append)("org/a", A)

    assert revisions.read(file) == {"org/a": A}
    assert said == [f"org/a is at {A}, recorded in {file}"]


def test_noted_commit_of_what_is_in_no_registry_stands_in_the_caches_record(cache: Path) -> None:
    """It has no lock file."""
    said: list[str] = []
    revisions.noting(None, said.append)("org/a", A)

    assert said == [f"org/a is at {A}, recorded in {cache}"]
