"""A deploy that breaks off."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import ServiceError
from service.modal_app import account, deploy
from service.modal_app.deploy_plan import DeployRequest, make_plan
from service.settings import Settings


@pytest.mark.parametrize("error", [ServiceError("Modal did not answer."), KeyboardInterrupt()])
def test_deploy_that_ends_before_it_has_scaled_says_how_to_do_the_rest(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next deploy finds the version as it should be, and would not do it."""

    def refused(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(account, "set_autoscaler", refused)
    settings, said = Settings.model_validate({"min_containers": 2}), list[str]()
    plan = make_plan(DeployRequest(names=("qwen3-8b",)), settings, lambda _: None)
    with pytest.raises(type(error)):
        deploy._scale(plan.apps[0], said.append)
    assert said == [
        "vllm-h100 is published, but not scaled as its settings say. What is left: "
        "vllm-service scale qwen3-8b --gpu H100 --min 2 --buffer 0"
    ]
