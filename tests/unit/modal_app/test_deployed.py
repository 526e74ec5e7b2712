"""What a word of the command names of the deployed service."""

from __future__ import annotations

import pytest

from service.errors import ComputeCapabilityError
from service.modal_app import account
from service.modal_app.deployed import Names, scale
from service.settings import Settings


def test_replica_is_kept_on_no_gpu_that_the_model_cannot_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its boot would be paid for and end; nothing is asked of Modal."""
    monkeypatch.setattr(account, "deployed_apps", lambda: pytest.fail("Modal was asked"))
    names = Names(Settings())
    with pytest.raises(ComputeCapabilityError, match="Use --gpu L4 "):
        scale(names, names.target("gpt-oss-20b", "t4"), min_containers=1)
