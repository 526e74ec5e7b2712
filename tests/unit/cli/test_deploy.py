"""What the word `deploy` prints after everything is published."""

from __future__ import annotations

from typing import Any

import pytest

from service.cli import deploy as cli_deploy
from service.errors import ServiceError
from service.modal_app import deploy as deploying
from service.modal_app import gateway_check, prices
from service.modal_app.deploy import Prepared
from service.modal_app.deploy_plan import DeployRequest, make_plan
from service.modal_app.prerequisites import Missing
from service.settings import Settings


def test_deploy_whose_prices_modal_refuses_to_keep_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line tells it; check and greeting follow."""
    request, settings, asked = DeployRequest(("tiny-l4",)), Settings.load({}), []
    prepared = Prepared(request, "someone", make_plan(request, settings, lambda _: None), (), Missing(None, None))

    def refused(_app: str) -> None:
        raise ServiceError("Modal refused to keep the prices: full.")

    def replaced(module: Any, name: str, answer: Any) -> None:
        monkeypatch.setattr(module, name, answer)

    monkeypatch.delenv(cli_deploy.KEY_VARIABLE, raising=False)
    replaced(deploying, "prepare", lambda *_: prepared)
    replaced(deploying, "gateway_url", lambda _: "https://gateway.example")
    replaced(cli_deploy, "_greeting", lambda url, *_: f"Done: {url}")
    replaced(prices, "leave_for_gateway", refused)
    replaced(gateway_check, "health", asked.append)
    cli_deploy.run(request, settings, yes=True, dry_run=False, retry=False, check=False, as_json=False)
    printed = capsys.readouterr()
    assert (printed.out, asked) == ("Done: https://gateway.example\n", ["https://gateway.example"])
    text = "'vllm-gateway' counts by the prices that it has: Modal refused to keep the prices: full."
    assert text in " ".join(printed.err.split())
