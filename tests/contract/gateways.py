"""The gateway on the control plane: its deploy, and the secrets that it needs."""

from __future__ import annotations

from tests.contract.conftest import modal_cli
from tests.fakes.modal import ModalPlane

APP, TAG = "vllm-gateway", "serve"
KEY = {"Authorization": "Bearer sk-alice"}


def deploy_gateway(plane: ModalPlane, **environment: str) -> str:
    """Deploy the gateway and require that it worked without a warning; return its URL."""
    done = modal_cli(plane, "deploy", "-m", "service.gateway_app", **environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said.lower(), said
    return plane.url_of(f"{environment['SERVICE_APP']}-gateway" if "SERVICE_APP" in environment else APP, TAG)


def put_secrets(plane: ModalPlane) -> None:
    """Give the workspace the secrets of the gateway: clients' keys, and a proxy token for the tiers."""
    token = plane.proxy_tokens.create()
    keys = {"API_KEYS": "alice=sk-alice,bob=sk-bob", "API_LIMITS": '{"alice": {"admin": true}}'}
    plane.secrets.put("vllm-api-key", keys)
    plane.secrets.put("vllm-proxy-token", {"MODAL_KEY": token.key, "MODAL_SECRET": token.secret})
