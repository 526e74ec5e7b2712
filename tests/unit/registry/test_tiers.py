"""GPU tiers: their names in Modal's spelling and ours, which one a model runs on, and whether its weights fit."""

from __future__ import annotations

import pytest

from service.errors import ComputeCapabilityError, GpuMemoryError, UnknownGpuError
from service.registry.gpus import GPUS, find_gpu
from service.registry.models import ModelSpec, Registry
from service.registry.tiers import Tier, check_fit, parse_tier, tier_of, tier_of_app

SPECS = Registry.load().specs


@pytest.mark.parametrize(
    ("gpu", "n_gpu", "names"),
    [
        ("H100", 1, ("vllm-h100", "H100", "H100", "SERVICE_GPU=H100")),
        ("H200", 2, ("vllm-h200x2", "H200:2", "2 x H200", "SERVICE_GPU=H200 SERVICE_N_GPU=2")),
        ("H100!", 8, ("vllm-h100-onlyx8", "H100!:8", "8 x H100!", "SERVICE_GPU=H100! SERVICE_N_GPU=8")),
        ("A100", 1, ("vllm-a100", "A100-80GB", "A100-80GB", "SERVICE_GPU=A100-80GB")),
        ("A100-40GB", 1, ("vllm-a100-40gb", "A100-40GB", "A100-40GB", "SERVICE_GPU=A100-40GB")),
    ],
)
def test_tier_is_named_after_gpu_and_count(gpu: str, n_gpu: int, names: tuple[str, ...]) -> None:
    """The contract: `vllm-<gpu>[x<n>]`; Modal's spelling has the count behind a colon."""
    tier = Tier(find_gpu(gpu), n_gpu)

    assert (tier.app_name, tier.request, tier.label, tier.settings) == names


@pytest.mark.parametrize(
    ("text", "gpu", "n_gpu"),
    [("h100", "H100", None), ("H200:2", "H200", 2), ("h200x2", "H200", 2), ("a100", "A100-80GB", None)],
)
def test_tier_is_parsed_as_gpu_and_count(text: str, gpu: str, n_gpu: int | None) -> None:
    """In Modal's spelling and in that of the apps."""
    assert parse_tier(text) == (GPUS[gpu], n_gpu)


@pytest.mark.parametrize("text", ["h1000", "H100:x", "A10:5", "h100x9", ":2"])
def test_tier_that_modal_does_not_offer_is_refused(text: str) -> None:
    """Each with the reason."""
    with pytest.raises(UnknownGpuError):
        parse_tier(text)


def test_tier_is_found_by_the_name_of_its_app() -> None:
    """Each app that a tier is named after, and no other."""
    for tier in (Tier(gpu, count) for gpu in GPUS.values() for count in (1, 2)):
        assert tier_of_app(tier.app_name) == tier
    assert [tier_of_app(name) for name in ("vllm-gateway", "vllm-h100x9", "other")] == [None] * 3


def test_tier_of_more_gpus_than_a_container_has_is_refused() -> None:
    """One to eight, four of the A10."""
    with pytest.raises(UnknownGpuError, match="5 x A10"):
        Tier(GPUS["A10"], 5)


@pytest.mark.parametrize(
    ("key", "gpu", "n_gpu", "expected"),
    [
        ("qwen3-235b", None, None, ("H200", 2)),
        ("qwen3-235b", "H200", None, ("H200", 2)),
        ("qwen3-235b", "B300", None, ("B300", 1)),
        ("qwen3-235b", None, 4, ("H200", 4)),
        ("qwen3-8b", "L4", 2, ("L4", 2)),
    ],
)
def test_tier_of_a_model_is_its_entrys_unless_told_otherwise(
    key: str, gpu: str | None, n_gpu: int | None, expected: tuple[str, int]
) -> None:
    """The entry's count speaks of the entry's GPU alone."""
    tier = tier_of(SPECS[key], gpu and find_gpu(gpu), n_gpu)

    assert (tier.gpu.name, tier.n_gpu) == expected


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.key)
def test_tier_of_each_entry_holds_its_weights(spec: ModelSpec) -> None:
    """No entry is refused where it runs by default."""
    assert tier_of(spec).holds(spec)


@pytest.mark.parametrize(("weights_gb", "fits"), [(73.5, True), (73.7, False), (80.0, False), (None, True)])
def test_tier_holds_weights_below_what_vllm_uses(weights_gb: float | None, fits: bool) -> None:
    """92 % of 80 GB are 73.6; weights that nobody has stated pass."""
    spec = ModelSpec(key="mine", hub_id="me/mine", weights_gb=weights_gb)

    assert Tier(GPUS["H100"]).holds(spec) is fits
    assert Tier(GPUS["H100"], 2).holds(spec)


@pytest.mark.parametrize(
    ("key", "gpu", "ways"),
    [
        ("gemma-3-27b", "L40S", "Use A100-80GB:1 (A100-80GB, $2.50/h, the cheapest that fits) or "
         "H100:1 (H100, $3.95/h, its registry entry's own)."),
        ("gemma-3-12b", "L4", "Use L40S:1 (L40S, $1.95/h, the cheapest that fits)."),
        ("qwen3-235b", "H100", "Use B300:1 (B300, $7.10/h, the cheapest that fits) or "
         "H200:2 (2 x H200, $9.08/h, its registry entry's own)."),
    ],
)  # fmt: skip
def test_tier_too_small_for_the_weights_is_refused_with_tiers_that_fit(key: str, gpu: str, ways: str) -> None:
    """The cheapest, and the one that the entry was written for, spelled as a request spells them."""
    with pytest.raises(GpuMemoryError) as caught:
        check_fit(SPECS[key], tier_of(SPECS[key], find_gpu(gpu)), lambda tier: f"{tier.gpu.name}:{tier.n_gpu}")

    sentence = str(caught.value)
    assert sentence.startswith(f"Model '{key}' does not fit on {gpu}: its weights are {SPECS[key].weights_gb} GB")
    assert sentence.endswith(ways)


@pytest.mark.parametrize(("gpu", "least", "runs"), [("T4", 8.0, False), ("T4", 7.5, True), ("B300", 10.3, True)])
def test_tier_below_the_compute_capability_of_a_model_is_refused(gpu: str, least: float, runs: bool) -> None:
    """However much memory it has."""
    spec = ModelSpec(key="mine", hub_id="me/mine", weights_gb=1, min_compute_capability=least)

    assert Tier(GPUS[gpu], 8).holds(spec) is runs


def test_tier_without_kernels_for_the_model_is_refused_with_tiers_that_have_them() -> None:
    """MXFP4 needs 8.0; the cheapest that has it and the memory is offered."""
    with pytest.raises(ComputeCapabilityError) as caught:
        check_fit(SPECS["gpt-oss-20b"], Tier(GPUS["T4"], 2), lambda tier: tier.settings)

    assert str(caught.value) == (
        "Model 'gpt-oss-20b' does not run on 2 x T4: vLLM has kernels for it from compute capability 8.0 on, and T4 "
        "has 7.5. Use SERVICE_GPU=L4 (L4, $0.80/h, the cheapest that fits) or SERVICE_GPU=H100 (H100, $3.95/h, its "
        "registry entry's own)."
    )


def test_tier_too_small_where_no_other_fits_leads_to_the_entrys_count() -> None:
    """A model larger than any one GPU needs several, which its entry states."""
    spec = ModelSpec(key="mine", hub_id="me/mine", weights_gb=700)

    with pytest.raises(GpuMemoryError, match="No single GPU holds it: set n_gpu in its registry entry"):
        check_fit(spec, tier_of(spec), lambda tier: tier.settings)
