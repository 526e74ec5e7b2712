"""Model names: which pool each selects, and which are refused."""

from __future__ import annotations

import asyncio
import json

import pytest

from service.gateway.router import ModelRouter
from service.registry.models import Adapter, ModelSpec, Registry
from tests.gateway.upstream import Engine, TestPool, answers, serve_gateway


@pytest.mark.parametrize(
    ("name", "key", "told"),
    [
        ("tiny", "tiny", "tiny"),
        ("small", "tiny", "small"),
        ("llm", "tiny", "tiny"),
        ("Org/Other-1B", "other", "Org/Other-1B"),
        ("org/OTHER-1b", "other", "other"),
        ("other-h200", "other H200", "other"),
        ("tiny-local", "tiny", "tiny"),
        ("other-h200-local", "other H200", "other"),
        (None, "tiny", "tiny"),
        ("", "tiny", "tiny"),
        ("  ", "tiny", "tiny"),
        (" tiny ", "tiny", "tiny"),
        ("hosted_vllm/tiny", "tiny", "tiny"),
        ("openai/llm", "tiny", "tiny"),
        ("openrouter/org/other-1b", "other", "other"),
        ("litellm_proxy/hosted_vllm/other-h200-local", "other H200", "other"),
        ("tiny:latest", "tiny", "tiny"),
        ("ollama/Tiny:latest", "tiny", "tiny"),
        ("gpt-4o", "other", "other"),
        ("openai/gpt-4o:latest", "other", "other"),
        ("claude-haiku-4-5-20251001", "tiny", "tiny"),
        ("anthropic/claude-opus-4-5", "other H200", "other"),
    ],
)
def test_name_selects_a_pool_and_the_engine_gets_a_name_that_it_knows(name: str | None, key: str, told: str) -> None:
    """Key, alias, hub id in any case, `llm`, with a GPU, with `-local`, with what clients add, none at all."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post({"messages": []} | ({} if name is None else {"model": name})) as answer:
                assert answer.status == 200
            assert json.loads(engine.requests[0].body)["model"] == told
            assert gateway.pools[key].wakes == 1

    asyncio.run(run())


@pytest.mark.parametrize("name", ["tinny", "hosted_vllm/tinny:latest", "a/b/tinny", "/tiny", "tiny/"])
def test_name_that_is_unknown_is_answered_with_the_nearest(name: str) -> None:
    """404 `model_not_found`; nothing is woken. Only a word before the slash is a provider's prefix."""

    async def run() -> None:
        async with serve_gateway() as gateway, gateway.post({"model": name, "messages": []}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert f"Unknown model '{name}'. Did you mean 'tiny'?" in error["message"]
            assert not gateway.pools

    asyncio.run(run())


def test_adapter_on_a_gpu_is_that_adapter() -> None:
    """A GPU after its name changes where it runs, not which adapter it is."""
    spec = ModelSpec(key="base", path="x", adapters=(Adapter(name="SQL", path="y"),))
    router = ModelRouter(Registry({"base": spec}), "base", lambda spec, _: TestPool(spec))

    assert [router.find(name).name for name in ("sql", "sql-h200", "SQL-h200-local")] == ["SQL", "SQL", "SQL"]
    assert router.find("base-h200").name == "base"
