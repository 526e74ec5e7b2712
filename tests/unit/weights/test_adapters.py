"""A LoRA adapter is checked by its own files and its model's, before an engine reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import WeightsError
from service.registry.models import Adapter, ModelSpec
from service.weights import adapters, store
from tests.fakes.lora import lay_adapter

TINY = Path(__file__).parents[3] / "service/assets/tiny"
SPEC = ModelSpec(key="mine", path=str(TINY), max_lora_rank=8)


def rewrite(directory: Path, **fields: object) -> None:
    """Change fields of an adapter's configuration."""
    file = directory / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_bytes()) | fields))


def cut(directory: Path) -> None:
    """Leave the last byte of its weights out."""
    file = directory / adapters.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("base", [TINY, None])
def test_adapter_that_fits_its_model_is_taken(tmp_path: Path, base: Path | None) -> None:
    """Also while the model is not here yet."""
    adapters.check_directory(lay_adapter(tmp_path / "one"), "one", SPEC, base)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 16}, "Adapter 'one' has rank 16, and model 'mine' serves adapters up to rank 8."),
        ({"hidden": 64}, r"Adapter 'one' does not fit model 'mine': .*q_proj.lora_A.weight is 4 x 64, and the model's"),
        ({"hidden": 256}, "the model's model.layers.0.self_attn.q_proj has 128 where it has 256."),
        (
            {"module": "self_attn.k_proj"},
            "lora_B.weight is 128 x 4, and the model's model.layers.0.self_attn.k_proj has",
        ),
        ({"layers": 5}, "it changes model.layers.4.self_attn.q_proj, which the model does not have."),
    ],
)
def test_adapter_of_another_model_is_refused(tmp_path: Path, options: dict[str, int], sentence: str) -> None:
    """Narrower ones too, of which vLLM would use a part."""
    with pytest.raises(WeightsError, match=sentence):
        adapters.check_directory(lay_adapter(tmp_path / "one", **options), "one", SPEC, TINY)  # type: ignore[arg-type]


def test_adapter_of_another_model_is_refused_with_the_model_that_it_names(tmp_path: Path) -> None:
    """So that the operator sees what was mixed up."""
    directory = lay_adapter(tmp_path / "one", hidden=64)
    rewrite(directory, base_model_name_or_path="org/other")
    with pytest.raises(WeightsError) as refused:
        adapters.check_directory(directory, "one", SPEC, TINY)
    assert refused.value.message.endswith("Its adapter_config.json names the model 'org/other'.")
    assert refused.value.hint == "Name an adapter that was trained on mine."


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, "was not written whole: it has [0-9]+ bytes, and its header tells of [0-9]+. Save or download it again."),
        (lambda place: (place / adapters.WEIGHTS).write_text("text of some length"), "not in the safetensors format"),
        (lambda place: (place / adapters.WEIGHTS).write_bytes(b""), "not in the safetensors format"),
        (lambda place: (place / adapters.WEIGHTS).unlink(), "has no adapter_model.safetensors that can be read"),
        (lambda place: (place / adapters.CONFIG).unlink(), "has no adapter_config.json that can be read"),
        (lambda place: (place / adapters.CONFIG).write_text("{"), "it is no JSON"),
        (lambda place: (place / adapters.CONFIG).write_text("[" * 100_000), "it is no JSON"),
        (lambda place: (place / adapters.CONFIG).write_text("[]"), "holds no table"),
        (lambda place: rewrite(place, peft_type="IA3"), "is of PEFT's type 'IA3', and vLLM serves LORA."),
        (lambda place: rewrite(place, r=None), "has no rank: r is None in its adapter_config.json."),
        (lambda place: rewrite(place, r=1), "is taken"),
    ],
)
def test_damaged_adapter_is_refused(tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    """With one sentence that says what is wrong, and the next step."""
    directory = lay_adapter(tmp_path / "one")
    damage(directory)
    if sentence == "is taken":  # a rank that its tensors do not have is vLLM's to judge
        adapters.check_directory(directory, "one", SPEC, TINY)
        return
    with pytest.raises(WeightsError, match=f"Adapter 'one' .*{sentence}"):
        adapters.check_directory(directory, "one", SPEC, TINY)


def test_tensor_above_the_rank_of_its_entry_is_refused_whatever_the_configuration_says(tmp_path: Path) -> None:
    """VLLM would write beyond the memory that is set aside, or fail in the middle."""
    directory = lay_adapter(tmp_path / "one", rank=16)
    rewrite(directory, r=4)
    with pytest.raises(WeightsError, match=r"lora_A\.weight has rank 16, and it serves adapters up to rank 8"):
        adapters.check_directory(directory, "one", SPEC, TINY)


def test_adapters_that_are_here_are_checked_without_a_connection(tmp_path: Path) -> None:
    """One of the hub that is not here yet is left out; its directory is checked once it is."""
    parts = (
        Adapter(name="far", hub_id="org/far", revision="a" * 40),
        Adapter(name="one", path=str(lay_adapter(tmp_path / "one"))),
    )
    assert store.find_adapters(SPEC.model_copy(update={"adapters": parts})) == {"one": tmp_path / "one"}
    cut(tmp_path / "one")
    with pytest.raises(WeightsError, match="not written whole"):
        store.find_adapters(SPEC.model_copy(update={"adapters": parts}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": "4", "rank_pattern": {"q_proj": 4}}, "r is '4'"),
        ({"r": 0, "rank_pattern": {"q_proj": 4}}, "r is 0"),
        ({"r": 4.0, "rank_pattern": {"q_proj": 4}}, "r is 4.0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is"),
        ({"rank_pattern": {"(q_proj": 4}}, r"rank_pattern has '\(q_proj'"),
    ],
)
def test_adapter_with_what_vllm_does_not_serve_is_refused(
    tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    """A cold model's next boot would end with it, and so would each one after that."""
    directory = lay_adapter(tmp_path / "one")
    rewrite(directory, **fields)
    with pytest.raises(WeightsError, match=f"is none that vLLM serves: in its adapter_config.json {words}"):
        adapters.check_directory(directory, "one", SPEC, TINY)


@pytest.mark.parametrize(
    "fields", [{"init_lora_weights": "gaussian"}, {"modules_to_save": ["score"]}, {"use_rslora": True}]
)
def test_adapter_with_what_vllm_serves_is_taken(tmp_path: Path, fields: dict[str, object]) -> None:
    """These change no weight beside the LoRA, or those of classification."""
    directory = lay_adapter(tmp_path / "one")
    rewrite(directory, **fields)
    adapters.check_directory(directory, "one", SPEC, TINY)
