"""GPUs that Modal offers: names in any spelling, counts."""

from __future__ import annotations

import datetime

import pytest

from service.errors import UnknownGpuError
from service.registry.gpus import GPUS, PRICES_DATE, check_count, find_gpu


@pytest.mark.parametrize("name", sorted(GPUS))
def test_gpu_by_its_name_is_found_in_any_case(name: str) -> None:
    """Modal's own spelling, lower and upper case."""
    assert find_gpu(name) is find_gpu(name.lower()) is find_gpu(name.upper()) is GPUS[name]


@pytest.mark.parametrize("name", sorted(GPUS))
def test_gpu_by_its_slug_is_found(name: str) -> None:
    """The name in apps and models leads back to the GPU."""
    assert find_gpu(GPUS[name].slug) is GPUS[name]


def test_gpu_slugs_are_distinct_and_fit_an_app_name() -> None:
    """`H100` and `H100!` are two tiers, and Modal takes letters, digits, dashes in names of apps."""
    slugs = [gpu.slug for gpu in GPUS.values()]

    assert len(set(slugs)) == len(slugs)
    assert all(slug.replace("-", "").isalnum() and slug == slug.lower() for slug in slugs)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("H100!", "h100-only"), ("B200+", "b200-plus"), ("A100-80GB", "a100"), ("A100-40GB", "a100-40gb"), ("L4", "l4")],
)
def test_gpu_slug_spells_out_marks(name: str, slug: str) -> None:
    """Characters that an app's name may not contain become words."""
    assert GPUS[name].slug == slug


@pytest.mark.parametrize("name", ["A100", "a100", "A100-80GB", "a100-80gb"])
def test_gpu_a100_without_a_memory_is_the_80_gb_card(name: str) -> None:
    """Modal's `A100` may be either; here it is one of them, and Modal is asked for that one by its full name."""
    assert (find_gpu(name).name, find_gpu(name).memory_gb, find_gpu(name).slug) == ("A100-80GB", 80, "a100")


def test_gpu_of_the_old_name_is_found() -> None:
    """Modal called the A10 A10G once."""
    assert find_gpu("A10G") is GPUS["A10"]


@pytest.mark.parametrize(("name", "nearest"), [("H10", "H100"), ("L40", "L40S"), ("RTX6000", "RTX-PRO-6000")])
def test_gpu_unknown_offers_the_nearest_and_all(name: str, nearest: str) -> None:
    """The error has the value, the nearest name and the whole list."""
    with pytest.raises(UnknownGpuError) as caught:
        find_gpu(name)

    assert str(caught.value).startswith(f"Unknown GPU '{name}'. Did you mean '{nearest}'?")
    assert all(known in str(caught.value) for known in GPUS)


def test_gpu_with_a_count_is_told_where_the_count_goes() -> None:
    """`H200:2` is Modal's spelling, not a name."""
    with pytest.raises(UnknownGpuError, match="SERVICE_GPU=H200 SERVICE_N_GPU=2"):
        find_gpu("H200:2")


@pytest.mark.parametrize(("name", "n_gpu"), [("H100", 1), ("H100", 8), ("A10", 4)])
def test_gpu_count_within_a_container_is_accepted(name: str, n_gpu: int) -> None:
    """One to eight, four for the A10."""
    check_count(GPUS[name], n_gpu)


@pytest.mark.parametrize(("name", "n_gpu"), [("H100", 0), ("H100", 9), ("A10", 5), ("H100", -1)])
def test_gpu_count_outside_a_container_is_refused(name: str, n_gpu: int) -> None:
    """The error has the count, the GPU and the range."""
    with pytest.raises(UnknownGpuError, match=f"{n_gpu} x {name} .* 1 to {GPUS[name].max_count}"):
        check_count(GPUS[name], n_gpu)


def test_prices_are_positive_and_dated() -> None:
    """Prices change, so the table has its date."""
    assert datetime.date.fromisoformat(PRICES_DATE)
    assert all(gpu.dollars_per_hour > 0 and gpu.memory_gb >= 16 for gpu in GPUS.values())


@pytest.mark.parametrize(
    ("name", "price"),
    [("T4", 0.59), ("L4", 0.80), ("A10", 1.10), ("L40S", 1.95), ("A100-40GB", 2.10), ("A100-80GB", 2.50),
     ("RTX-PRO-6000", 3.03), ("H100", 3.95), ("H200", 4.54), ("B200", 6.25), ("B300", 7.10)],
)  # fmt: skip
def test_price_is_the_one_transcribed(name: str, price: float) -> None:
    """The figures of models.md, part B."""
    assert GPUS[name].dollars_per_hour == price
