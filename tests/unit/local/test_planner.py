"""What this machine can run, and with which context, by what is known without a request to the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service import memory
from service.errors import ContextMemoryError, GpuCountError, GpuMemoryError, MemoryTooSmallError, WeightsError
from service.hardware import Hardware, NvidiaGpu
from service.local import planner
from service.local.planner import LocalPlanner
from service.registry.models import Adapter, unregistered
from service.settings import Settings
from service.weights import revisions
from tests.fakes.lora import lay_adapter

COMMIT = "0123456789012345678901234567890123456789"
CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": 65536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give it 8 GB of memory, no GPU, and an empty cache."""
    show(monkeypatch)
    monkeypatch.setattr(memory, "_room", lambda: memory.Room(8 * 10**9, "this machine has 8.0 GB"))
    monkeypatch.setattr(memory, "_held_by_children", lambda: 0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def show(monkeypatch: pytest.MonkeyPatch, *memory_mib: int) -> None:
    """Show GPUs of these sizes."""
    gpus = tuple(NvidiaGpu(f"GPU {size}", size, "580.1", f"GPU-{size}") for size in memory_mib)
    monkeypatch.setattr(planner, "probe", lambda: Hardware(gpus, ()))


def plan(tmp_path: Path, entries: str = "") -> LocalPlanner:
    """Return a planner with these entries beside the built-in ones."""
    file = tmp_path / "models.toml"
    file.write_text(entries or "[aliases]\no1 = 'tiny'\n")
    return LocalPlanner(Settings(models_file=str(file)), None, {})  # type: ignore[arg-type]


def write_model(directory: Path) -> Path:
    """Write a model that looks complete: its configuration and a file of weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors").write_bytes(b"0" * 1000)
    return directory


def context(here: LocalPlanner, key: str) -> int | None:
    """Return the context of an entry."""
    return here.max_model_len(here.registry.specs[key])


def test_context_without_a_gpu_is_what_the_planner_gives(tmp_path: Path) -> None:
    """The registry's figure is what fits on its GPU; an entry of one's own and a directory say what they have."""
    write_model(tmp_path / "model")
    here = plan(tmp_path, "[models.a]\npath = 'model'\n[models.b]\npath = 'model'\nmax_model_len = 49152\n")
    assert (context(here, "qwen3-8b"), context(here, "tiny")) == (8192, 2048)
    assert (context(here, "a"), context(here, "b")) == (8192, 49152)


def test_context_of_a_hub_id_is_known_once_it_is_here(tmp_path: Path) -> None:
    """From its config.json in the cache, wherever that comes from."""
    here, spec = plan(tmp_path), unregistered("org/mine")
    assert here.max_model_len(spec) is None
    repository = tmp_path / "cache" / "hub" / "models--org--mine"
    write_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert here.max_model_len(spec) == 8192


def test_context_with_a_gpu_is_the_entrys_or_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cap there."""
    show(monkeypatch, 24_000)
    write_model(tmp_path / "model")
    here = plan(tmp_path, "[models.a]\npath = 'model'\n")
    assert (context(here, "qwen3-8b"), context(here, "a")) == (40960, 65536)


def test_check_refuses_weights_over_the_memory(tmp_path: Path) -> None:
    """A laptop and a model of 236 GB; what is not known is not refused."""
    here = plan(tmp_path)
    with pytest.raises(MemoryTooSmallError, match=r"'qwen3-235b' are 236\.4 GB"):
        here.check_known(here.registry.specs["qwen3-235b"])
    here.check_known(here.registry.specs["tiny"])
    here.check_known(unregistered("org/mine"))


def test_check_refuses_a_context_over_the_memory(tmp_path: Path) -> None:
    """An entry's own, once the model's files are here."""
    here = plan(tmp_path, "[models.a]\npath = 'model'\nmax_model_len = 500_000\n")
    here.check_known(here.registry.specs["a"])
    write_model(tmp_path / "model")
    with pytest.raises(ContextMemoryError, match="500000 tokens of model 'a' needs"):
        here.check_known(here.registry.specs["a"])


def test_check_refuses_gpus_that_are_too_few_or_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By count, and by the memory of as many as the model takes."""
    show(monkeypatch, 24_000)
    here = plan(tmp_path)
    with pytest.raises(GpuCountError, match="n_gpu=2 GPUs and 1 are visible"):
        here.check_known(here.registry.specs["qwen3-235b"])
    with pytest.raises(GpuMemoryError, match=r"'qwen3-30b-a3b' are 61\.1 GB, and 1 of this machine's GPUs have 25\.2"):
        here.check_known(here.registry.specs["qwen3-30b-a3b"])
    here.check_known(here.registry.specs["qwen3-8b"])


def test_model_outside_the_registry_replaces_an_entry_of_its_key(tmp_path: Path) -> None:
    """`up org/qwen3-8b` must not be answered by the built-in model of that key."""
    here = plan(tmp_path)
    spec = here.resolve("org/qwen3-8b")
    assert here.registry.specs["qwen3-8b"] is spec
    assert here.registry.resolve("qwen3-8b").spec.hub_id == "org/qwen3-8b"
    assert here.registry.resolve("o1").spec.key == "tiny"


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("name", ["org/mine", "org/qwen3-8b", "own"])
def test_commit_of_a_model_is_recorded_where_its_entry_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, refused: bool
) -> None:
    """In the lock file for an entry without a revision; for a model of no models file in the cache's record alone.

    Models that were read and refused change nothing of that.
    """
    here = plan(tmp_path, "[models.own]\nhub_id = 'org/own'\n")
    spec = here.resolve(name)
    if refused:
        (tmp_path / "models.toml").write_text("[models.own]\nhub_id = 'org/other'\n")
        here.read_models(name)
    repository = tmp_path / "cache" / "hub" / f"models--{str(spec.hub_id).replace('/', '--')}"
    write_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(revisions.RevisionResolver, "__call__", lambda _, hub_id: {spec.hub_id: COMMIT}[hub_id])
    here.fetch(spec)
    assert revisions.read(revisions.cache_record()) == {spec.hub_id: COMMIT}
    in_lock = revisions.read(revisions.lock_file(here.settings.models_file))
    assert in_lock == ({spec.hub_id: COMMIT} if name == "own" else {})


def test_planner_after_a_restart_has_the_adapters_that_were_loaded_before(tmp_path: Path) -> None:
    """A reload too; one that is removed from their file is gone with the next."""
    write_model(tmp_path / "model")
    entries = "[models.a]\npath = 'model'\nmax_cpu_loras = 2\n"
    adapter = Adapter(name="poet", hub_id="org/poet", revision="a" * 40)
    plan(tmp_path, entries).adapter_file.add("a", adapter)
    here = plan(tmp_path, entries)
    assert here.resolve("a").adapters == here.read_models("a").specs["a"].adapters == (adapter,)
    here.adapter_file.path.unlink()
    assert here.read_models("a").specs["a"].adapters == ()


def test_planner_refuses_an_adapter_of_another_model_before_anything_boots(tmp_path: Path) -> None:
    """What is here is checked without a connection."""
    lay_adapter(tmp_path / "poet", rank=16)
    entries = "[models.a]\npath = 'model'\nmax_lora_rank = 8\n[[models.a.adapters]]\nname = 'poet'\npath = 'poet'\n"
    write_model(tmp_path / "model")
    here = plan(tmp_path, entries)
    for fetch in (False, True):
        with pytest.raises(WeightsError, match="Adapter 'poet' has rank 16"):
            here.adapters(here.registry.specs["a"], fetch)
