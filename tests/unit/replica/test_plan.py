"""Plans of replicas: which settings they take, and what may replace one."""

from __future__ import annotations

import dataclasses

from service.registry.models import Registry
from service.replica.plan import Plan
from service.settings import Settings

TINY = Registry.load().specs["tiny"]


def test_plan_from_settings_takes_every_setting_of_the_same_name() -> None:
    """A new setting of the engine needs a field and its flag, and no line in between."""
    settings = Settings(snapshot="off", fast_boot=False, n_gpu=2, port=9000, startup_timeout_s=60, hang_s=30)
    plan = Plan.from_settings(settings, spec=TINY, default_key="tiny", device="cpu", python="python", parent_env={})

    taken = (plan.snapshot, plan.fast_boot, plan.n_gpu, plan.port, plan.startup_timeout_s, plan.hang_s)
    assert taken == ("off", False, 2, 9000, 60, 30)


def test_plan_from_settings_with_a_fact_of_the_same_name_takes_the_fact() -> None:
    """A local engine has a port of its own, whatever the gateway's is."""
    facts = {"default_key": "tiny", "device": "cpu", "python": "python", "parent_env": {}}
    plan = Plan.from_settings(Settings(port=9000), spec=TINY, port=9001, n_gpu=1, fast_boot=True, **facts)

    assert (plan.port, plan.n_gpu) == (9001, 1)


def test_settings_that_reach_a_plan_by_their_name_are_these() -> None:
    """A new setting whose name is by chance that of a fact, such as `host`, is noticed here."""
    shared = {field.name for field in dataclasses.fields(Plan)} & Settings.model_fields.keys()

    assert shared == {"fast_boot", "hang_s", "max_n", "n_gpu", "port", "snapshot", "startup_timeout_s"}
