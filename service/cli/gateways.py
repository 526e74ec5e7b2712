"""Which gateway a word speaks to: this machine's, the deployed one, or one at a URL. Its key is in VLLM_API_KEY."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from service.cli import cloud
from service.modal_app.gateway_access import api_key, base_url
from service.ports import is_loopback
from service.settings import Settings


@dataclass(frozen=True)
class Gateway:
    """A gateway, and the key for it.

    Attributes:
        url: Without `/v1`.
        key: Empty: none is set.
    """

    url: str
    key: str = field(repr=False)

    @property
    def needs_key(self) -> bool:
        """Whether its clients send a key: where one is set, and everywhere but on this machine."""
        return bool(self.key) or not is_loopback(urlsplit(self.url).hostname or "")


def find(url: str | None, modal: bool, settings: Settings) -> Gateway:
    """Return the gateway that is meant: of the option, of Modal, of VLLM_GATEWAY_URL, or of `up`.

    Raises:
        UsageError: The URL is none.
        ServiceError: It is looked up at Modal, and not there.
    """
    local = f"http://127.0.0.1:{settings.port}"
    found = cloud.deployed_gateway() if modal else url or os.environ.get("VLLM_GATEWAY_URL") or local
    return Gateway(base_url(found), api_key())
