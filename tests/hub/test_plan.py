"""What a plan reads of a model that no entry has: from the hub once, from the cache then, and a clear error without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.errors import HubUnreachableError, WeightsError
from service.planning.models import planned_model
from service.registry.models import ModelSpec, unregistered
from service.weights import hub_cache
from tests.fakes.hub import Hub
from tests.unit.engine.test_kv_cache import QWEN3

from .conftest import READ, SHARDS

pytestmark = pytest.mark.usefixtures("_clean_environment")
MINE = unregistered("org/mine")
WEIGHTS = sum(map(len, SHARDS.values()))


@pytest.fixture(autouse=True)
def shaped(hub: Hub) -> Hub:
    """Give the model a shape."""
    hub.repositories["org/mine"].files["config.json"] = json.dumps(QWEN3 | {"max_position_embeddings": 4096}).encode()
    return hub


def test_shape_is_read_from_the_hub_and_then_from_the_cache(hub: Hub, cache: Path) -> None:
    """The configuration and the index alone are fetched; without the hub the same is known afterwards."""
    first = planned_model(MINE, offline=False)
    assert (first.weights_bytes, first.context, first.config["num_hidden_layers"]) == (WEIGHTS, 4096, 28)
    fetched = {path.name for path in cache.rglob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors.index.json"}
    hub.repositories.clear()
    assert planned_model(MINE, offline=True) == first  # this index has no total


def test_size_of_one_file_without_an_index_stays_known(hub: Hub) -> None:
    """The hub lists it once; of a cache that has the configuration alone it is an error that says how to learn it."""
    files = hub.repositories["org/mine"].files
    hub.repositories["org/mine"].files = {"config.json": files["config.json"], "model.safetensors": bytes(1234)}
    assert planned_model(MINE, offline=False).weights_bytes == 1234
    hub.repositories.clear()
    assert planned_model(MINE, offline=True).weights_bytes == 1234
    for kept in hub_cache.repository("org/mine").glob("vllm-service/*"):
        kept.unlink()
    with pytest.raises(WeightsError, match=r"size of the weights of org/mine .* Without --offline the hub is asked"):
        planned_model(MINE, offline=True)


def test_index_with_a_total_is_enough_for_a_plan_without_the_hub(hub: Hub) -> None:
    """As every published index has one."""
    index = json.loads(READ["model.safetensors.index.json"]) | {"metadata": {"total_size": 123_456}}
    hub.repositories["org/mine"].files["model.safetensors.index.json"] = json.dumps(index).encode()
    planned_model(MINE, offline=False)
    assert planned_model(MINE, offline=True).weights_bytes == 123_456


def test_model_that_is_not_known_here_is_an_error_offline() -> None:
    """It says how it becomes known."""
    with pytest.raises(WeightsError) as caught:
        planned_model(MINE, offline=True)
    assert str(caught.value) == (
        "The shape of org/mine is not known on this machine. Without --offline the hub is asked for its config.json."
    )


def test_hub_out_of_reach_is_its_own_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is guessed."""
    assert hub
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError, match="not in reach"):
        planned_model(MINE, offline=False)


def test_upload_is_not_known_here() -> None:
    """Its files are on Modal's volume."""
    with pytest.raises(WeightsError, match=r"upload 'mine' is not known on this machine.*Or name its directory"):
        planned_model(ModelSpec(key="mine", volume="mine"), offline=False)


def test_directory_of_a_model_is_read(tmp_path: Path) -> None:
    """Its configuration, and the size of its weights; without them it is refused."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    with pytest.raises(WeightsError, match="has no safetensors"):
        planned_model(unregistered(str(tmp_path)), offline=False)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert planned_model(unregistered(str(tmp_path)), offline=True).weights_bytes == 1000
