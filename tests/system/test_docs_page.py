"""Swagger UI at `/docs` in a real browser, over a gateway with the tiny model."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.engine.dialogues import dialogue
from tests.engine.running import Service

from .browser import DESKTOP, PHONE, Visit, visit
from .conftest import ADMIN_KEY, KEY

CHAT = "/v1/chat/completions"


@contextmanager
def opened(browser: Browser, service: Service, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[Visit]:
    """Open the page as a new visitor."""
    with visit(browser, service.url, size, path="/docs", **options) as visitor:
        expect(visitor.page.get_by_role("heading", name="vllm-service")).to_be_visible()
        yield visitor


def authorize(page: Page, key: str, scheme: str = "bearer") -> None:
    """Give the page a key by its form."""
    page.get_by_role("button", name="Authorize").first.click()
    form = page.locator(".auth-container").filter(has_text=scheme)
    form.locator("input").fill(key)
    form.get_by_role("button", name="Apply credentials").click()
    expect(form.get_by_role("button", name="Remove authorization")).to_be_visible()
    form.get_by_role("button", name="Close").click()


def operation(page: Page, method: str, path: str) -> Locator:
    """Open what the page has of a route."""
    name = re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_")
    found = page.locator(f"[id$='-{name}']")
    found.locator(".opblock-summary-control").click()
    expect(found.get_by_role("button", name="Try it out")).to_be_visible()
    return found


def execute(block: Locator, example: str | None = None) -> Locator:
    """Send an example, and return the answer."""
    block.get_by_role("button", name="Try it out").click()
    if example:
        block.locator(".examples-select select").select_option(label=example)
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .response")
    expect(answer).to_be_visible()
    return answer


@pytest.mark.parametrize("scheme", ["bearer", "x-api-key"])
def test_docs_try_out_a_chat_with_a_key(browser: Browser, keyed: Service, scheme: str) -> None:
    """The answer is the model's; the command that is shown does the same in a shell, and has no key in it."""
    with opened(browser, keyed) as visitor:
        page = visitor.page
        authorize(page, ADMIN_KEY, scheme)
        block = operation(page, "POST", CHAT)
        answer = execute(block)
        expect(answer.locator(".response-col_status")).to_contain_text("200")
        expect(answer).to_contain_text(dialogue("capital").content)
        command = block.locator(".curl-command pre").inner_text()
        assert "$API_KEY" in command
        assert ADMIN_KEY not in page.content()
        kept = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])")
        assert json.loads(kept) == [{"vllm-service-key": ADMIN_KEY}, {}, ""]
    shell = subprocess.run(
        ["bash", "-c", command], env={"API_KEY": ADMIN_KEY}, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(shell.stdout)["choices"][0]["message"]["content"].strip() == dialogue("capital").content


def test_docs_try_out_a_stream_and_see_its_events(browser: Browser, keyed: Service) -> None:
    """An example of the list; the events are shown as they came."""
    with opened(browser, keyed) as visitor:
        authorize(visitor.page, KEY)
        answer = execute(operation(visitor.page, "POST", CHAT), "stream")
        expect(answer).to_contain_text("data: [DONE]")
        expect(answer).to_contain_text("chat.completion.chunk")


def test_docs_try_out_without_a_key_shows_the_error(browser: Browser, keyed: Service) -> None:
    """As the service answers it; a route that needs none is answered."""
    with opened(browser, keyed) as visitor:
        page = visitor.page
        answer = execute(operation(page, "GET", "/health"))
        expect(answer.locator(".response-col_status")).to_contain_text("200")
        answer = execute(operation(page, "GET", "/v1/key"))
        expect(answer.locator(".response-col_status")).to_contain_text("401")
        expect(answer).to_contain_text("invalid_api_key")
        visitor.errors.clear()  # the browser's own line about the 401


def test_docs_share_the_key_of_the_console_until_it_signs_out(browser: Browser, keyed: Service) -> None:
    """Who is signed in there is here too, in that tab; and `Logout` here ends it there."""
    with visit(browser, keyed.url) as visitor:
        page = visitor.page
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="API", exact=True).click()
        answer = execute(operation(page, "GET", "/v1/key"))
        expect(answer).to_contain_text('"plain"')
        page.get_by_role("button", name="Authorize").first.click()
        page.get_by_role("button", name="Remove authorization").first.click()
        page.goto(keyed.url)
        expect(page.get_by_label("API key")).to_be_visible()


def test_docs_show_schemas_of_requests_and_answers(browser: Browser, keyed: Service) -> None:
    """The engine's fields, those of the gateway's own routes, and the errors of each protocol."""
    with opened(browser, keyed) as visitor:
        page = visitor.page
        block = operation(page, "POST", "/v1/messages")
        block.get_by_role("tab", name="Schema").first.click()
        expect(block).to_contain_text("stop_sequences")
        expect(block).to_contain_text("overloaded_error")
        block = operation(page, "GET", "/admin/pools")
        expect(block).to_contain_text("dollars_per_hour")


def test_docs_work_on_a_phone_and_in_the_dark(browser: Browser, keyed: Service) -> None:
    """Nothing is wider than 375 pixels, and the page is dark where the browser is."""
    with opened(browser, keyed, PHONE, color_scheme="dark") as visitor:
        page = visitor.page
        authorize(page, KEY)
        answer = execute(operation(page, "POST", CHAT))
        expect(answer).to_contain_text(dialogue("capital").content)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert sum(int(part) for part in background[4:-1].split(",")) < 150
