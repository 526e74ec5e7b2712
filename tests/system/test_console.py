"""The console in a real browser, over a gateway with the tiny model."""

from __future__ import annotations

import base64
import json
import re
import time
from contextlib import AbstractContextManager
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, Page, Route, expect

from tests.engine.dialogues import COUNTING, dialogue
from tests.engine.running import Service, requests_running, wait_until

from .browser import PHONE, Visit, visit
from .conftest import ADMIN, ADMIN_KEY, KEY

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"
TABS = ("Models", "Playground", "Requests", "Usage", "Keys")


@pytest.fixture
def service(keyed: Service) -> Service:
    """The service of this package that has keys."""
    return keyed


def opened(browser: Browser, service: Service, **options: Any) -> AbstractContextManager[Visit]:
    """Open the console as a new visitor."""
    return visit(browser, service.url, **options)


def sign_in(page: Page, key: str = ADMIN_KEY) -> None:
    """Sign in with a key, by keyboard."""
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    expect(tab(page, "Models")).to_be_visible()


def tab(page: Page, name: str) -> Any:
    """Return the tab of a name."""
    return page.get_by_role("tab", name=name)


def ask(page: Page, text: str) -> None:
    """Send a message in the playground."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def further_fields(page: Page, fields: dict[str, Any]) -> None:
    """Write fields of the body."""
    page.get_by_text("Further fields", exact=True).click()
    page.get_by_label("Fields of the body").fill(json.dumps(fields))


def card(page: Page, model: str = "tiny") -> Any:
    """Return what the tab Models has of a model."""
    return page.get_by_role("article", name=model, exact=True)


def test_console_chats_with_streaming_and_shows_the_request_with_its_cost(browser: Browser, service: Service) -> None:
    """Neither prompt nor answer is anywhere but in the playground: in no other tab, answer or storage."""
    request = dialogue("capital").request["messages"][-1]["content"]
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Playground").click()
        ask(page, request)
        expect(page.get_by_role("log")).to_contain_text(dialogue("capital").content)
        status = page.get_by_role("status").first
        expect(status).to_contain_text("cost $")
        for figure in ("first token after", "tokens/s", "tokens in"):
            expect(status).to_contain_text(figure)
        tab(page, "Requests").click()
        row = page.get_by_role("region", name="Requests that have ended").locator("tbody tr").first
        expect(row).to_contain_text("chat/completions, stream")
        expect(row).to_contain_text("$")
        expect(row).to_contain_text("root")
        for name in TABS[2:]:
            tab(page, name).click()
            expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
            assert request not in page.content()
            assert dialogue("capital").content not in page.content()
        kept = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])")
        assert json.loads(kept) == [{"vllm-service-key": ADMIN_KEY}, {}, ""]
    for path in ("/v1/requests", "/admin/pools", "/admin/boots", "/v1/usage", "/admin/keys", "/metrics"):
        answer = requests.get(service.url + path, headers=ADMIN, timeout=60)
        assert answer.status_code == 200
        assert "capital" not in answer.text
    assert "capital" not in json.dumps(service.access_log)
    assert "capital" not in service.log_file.read_text()


def test_console_folds_reasoning(browser: Browser, service: Service) -> None:
    """It is there to open once the answer has begun."""
    thinking = dialogue("thinking")
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Playground").click()
        ask(page, thinking.request["messages"][-1]["content"])
        log = page.get_by_role("log")
        expect(log.get_by_role("article").nth(1)).to_contain_text(thinking.content)
        expect(log.locator(".thoughts")).to_be_hidden()
        log.get_by_text("Reasoning").click()
        expect(log.locator(".thoughts")).to_contain_text((thinking.reasoning or "").strip())


def test_console_calls_tools_and_sends_their_results(browser: Browser, service: Service) -> None:
    """A call is shown, and asks for its result."""
    call, answer = dialogue("weather-call"), dialogue("weather-answer")
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Playground").click()
        page.locator("summary", has_text="Tools").click()
        page.get_by_label("Tools", exact=True).fill(json.dumps(call.request["tools"]))
        ask(page, call.request["messages"][-1]["content"])
        expect(page.get_by_text("calls get_weather")).to_be_visible()
        page.get_by_label("Result of get_weather").fill(answer.request["messages"][-1]["content"])
        page.get_by_role("button", name="Send results").click()
        expect(page.get_by_role("log").get_by_role("article").nth(3)).to_contain_text(answer.content)
        expect(page.get_by_label("Message")).to_be_focused()


def test_console_takes_images_schema_and_shows_the_request_as_code(browser: Browser, service: Service) -> None:
    """They are fields of the request; the programs have no key in them."""
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Playground").click()
        page.get_by_label("Images").set_input_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": base64.b64decode(PIXEL)}
        )
        expect(page.get_by_role("img", name="a.png")).to_be_visible()
        page.get_by_role("button", name="Remove a.png").click()
        page.locator("summary", has_text="JSON schema").click()
        page.get_by_label("Schema of the answer").fill('{"type": "object"}')
        further_fields(page, {"top_k": 1})
        page.get_by_label("Message").fill("It's me")
        page.get_by_role("button", name="As code").click()
        for language in ("curl", "Python", "JavaScript"):
            page.get_by_role("button", name=language, exact=True).click()
            code = page.get_by_role("dialog").locator("pre").inner_text()
            assert "json_schema" in code
            assert "top_k" in code
            assert ADMIN_KEY not in code
            if language == "Python":
                compile(code, "example.py", "exec")


def test_console_stops_a_generation(browser: Browser, service: Service) -> None:
    """The engine stops too, and the request is one whose client left."""
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Playground").click()
        page.get_by_label("Most tokens").fill(str(COUNTING["max_tokens"]))
        further_fields(page, {"n": COUNTING["n"], "ignore_eos": True})
        ask(page, COUNTING["messages"][0]["content"])
        expect(page.get_by_role("log")).to_contain_text("1 2 3")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("status").first).to_contain_text("stopped")
        metrics = f"{service.url}/metrics?model=tiny"
        wait_until(lambda: not requests_running(requests.get(metrics, headers=ADMIN, timeout=60).text), 10, service)
        tab(page, "Requests").click()
        expect(page.locator("tbody tr").first).to_contain_text("client left")


def test_console_forgets_what_was_cleared_and_who_signed_out(browser: Browser, service: Service) -> None:
    """A cleared answer is in no later request; wrong JSON keeps the message; the next key sees nothing of it."""
    with opened(browser, service) as visitor:
        page, bodies = visitor.page, list[dict[str, Any]]()
        page.on("request", lambda one: bodies.append(one.post_data_json) if "/chat/" in one.url else None)
        sign_in(page)
        tab(page, "Playground").click()
        further_fields(page, {"ignore_eos": True})
        ask(page, COUNTING["messages"][0]["content"])
        expect(page.get_by_role("log")).to_contain_text("1 2 3")
        page.get_by_role("button", name="Clear").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        page.get_by_label("Fields of the body").fill("{")
        ask(page, "Once more")
        expect(page.get_by_text("this is not JSON")).to_be_visible()
        expect(page.get_by_label("Message")).to_have_value("Once more")
        page.get_by_label("Fields of the body").fill(json.dumps({"ignore_eos": True}))
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("log").get_by_role("article")).to_have_count(2)
        assert [body["messages"] for body in bodies[1:]] == [[{"role": "user", "content": "Once more"}]]
        page.get_by_role("button", name="Sign out").click()
        sign_in(page, KEY)
        expect(tab(page, "Playground")).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("log")).to_contain_text("wakes it")
        expect(page.get_by_label("Fields of the body")).to_have_value("")
        metrics = f"{service.url}/metrics?model=tiny"
        wait_until(lambda: not requests_running(requests.get(metrics, headers=ADMIN, timeout=60).text), 10, service)
        assert len(bodies) == 2


def test_console_makes_and_revokes_a_key(browser: Browser, service: Service) -> None:
    """The key is shown once, works, and does not after it was revoked."""
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Keys").click()
        page.get_by_role("button", name="New key").click()
        page.get_by_label("Name").fill("guest")
        page.get_by_text("Limits", exact=True).last.click()
        page.get_by_label("Requests a minute").fill("7")
        page.get_by_role("button", name="Make key").click()
        key = page.locator("pre.secret").inner_text()
        models = f"{service.url}/v1/models"
        assert requests.get(models, headers={"x-api-key": key}, timeout=60).status_code == 200
        page.get_by_role("button", name="Done").click()
        expect(page.locator("pre.secret")).to_have_count(0)
        assert key not in page.content()
        row = page.get_by_role("row", name="guest")
        expect(row).to_contain_text("Requests a minute: 7")
        page.get_by_role("button", name="Revoke guest").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(row).to_contain_text("revoked")
        assert requests.get(models, headers={"x-api-key": key}, timeout=60).status_code == 401


def test_console_of_a_key_that_is_no_admins_shows_less(browser: Browser, service: Service) -> None:
    """Its own requests and usage, no commands and no keys."""
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page, KEY)
        expect(card(page)).to_contain_text("ready")
        assert page.get_by_role("button", name="Stop").count() == 0
        assert tab(page, "Keys").count() == 0
        tab(page, "Requests").click()
        expect(page.get_by_role("tabpanel")).to_contain_text("No request has ended")
    assert [one for one in visitor.urls if "/admin/" in one] == []


def test_console_shows_hostile_texts_as_texts(browser: Browser, service: Service) -> None:
    """Ids, errors and output of a model by the gateway; every other field in answers that are changed on the way."""

    def changed(route: Route) -> None:
        url = route.request.url
        answer = route.fetch(url=url.partition("?")[0] if "/admin/boots" in url else url)  # no model has that name
        route.fulfill(response=answer, json=hostile(answer.json()))

    requests.post(
        f"{service.url}/v1/chat/completions",
        json={"model": HOSTILE, "messages": []},
        headers={**ADMIN, "X-Request-Id": HOSTILE.replace(" ", "/")},
        timeout=60,
    )
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Playground").click()
        further_fields(page, {"structured_outputs": {"choice": [HOSTILE]}})
        ask(page, HOSTILE)
        expect(page.get_by_role("log").get_by_role("article").nth(1)).to_contain_text(HOSTILE)
        tab(page, "Requests").click()
        expect(page.get_by_role("tabpanel")).to_contain_text(HOSTILE.replace(" ", "/"))
        for path in ("/admin/pools", "/admin/boots*", "/v1/requests*", "/v1/usage*", "/admin/keys*", "/v1/models"):
            page.route(f"**{path}", changed)
        for name in TABS:
            tab(page, name).click()
            if name == "Usage":
                page.get_by_label("By", exact=True).select_option("key")
            expect(page.get_by_role("tabpanel", name=name)).to_contain_text(HOSTILE)
            for summary in page.locator("summary:visible").all()[:2]:
                summary.click()
        tab(page, "Models").click()
        page.locator("summary:visible").first.click()
        expect(page.locator(".boots").first).to_contain_text(HOSTILE)
        assert page.locator("img[src='x'], script:not([src])").count() == 0


def hostile(value: Any, name: str = "") -> Any:
    """Return an answer in which every text that has no meaning to the page is an attack."""
    if isinstance(value, dict):
        return {key: hostile(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return value if name == "columns" else [hostile(one, name) for one in value]
    if name == "reason" and value is None:
        return HOSTILE
    has_meaning = name in {"at", "state", "object"} or re.fullmatch(r"\d{4}-\d\d-\d\d", str(value))
    return HOSTILE if isinstance(value, str) and not has_meaning else value


def test_console_works_on_a_phone_and_by_keyboard(browser: Browser, service: Service) -> None:
    """Nothing is wider than 375 pixels, arrows change the tab, and the focus is seen."""
    with opened(browser, service, size=PHONE, color_scheme="dark") as visitor:
        page = visitor.page
        sign_in(page)
        tab(page, "Models").focus()
        for name in (*TABS[1:], TABS[0]):
            page.keyboard.press("ArrowRight")
            expect(tab(page, name)).to_be_focused()
            expect(tab(page, name)).to_have_attribute("aria-selected", "true")
            expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0], name
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            unlabelled = "e => !e.labels?.length && !e.getAttribute('aria-label')"
            fields = f"[...document.querySelectorAll('input, select, textarea')].filter({unlabelled}).length"
            assert page.evaluate(fields) == 0, name
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(int(part) for part in background[4:-1].split(",")) < 150


def test_console_asks_rarely_and_not_while_it_is_hidden(browser: Browser, service: Service) -> None:
    """Once in two seconds; a tab in the background asks nothing."""
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        expect(card(page)).to_contain_text("ready")

        def asked(seconds: float) -> int:
            before = len(visitor.urls)
            page.wait_for_timeout(seconds * 1000)
            return len(visitor.urls) - before

        assert asked(3.0) <= 2
        with page.expect_request("**/admin/pools"):
            pass
        show = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        show += " document.dispatchEvent(new Event('visibilitychange')); }"
        page.evaluate(show, True)
        assert asked(3.0) == 0
        before = len(visitor.urls)
        page.evaluate(show, False)
        page.wait_for_timeout(500)
        assert len(visitor.urls) == before + 1


def test_console_draws_a_thousand_requests_in_50_ms(browser: Browser, service: Service) -> None:
    """A filter is typed into a full list, of which a page is drawn."""
    with opened(browser, service) as visitor:
        page = visitor.page
        answer = requests.get(f"{service.url}/v1/requests?limit=1", headers=ADMIN, timeout=60).json()
        row = answer["data"][0]
        rows = [[number, *row[1:]] for number in range(1000, 0, -1)]
        full = {**answer, "data": rows, "last": 1000, "more": False}
        page.route("**/v1/requests*", lambda route: route.fulfill(json=full))
        sign_in(page)
        tab(page, "Requests").click()
        expect(page.get_by_text("1,000 of 1,000 requests")).to_be_visible()
        typed = """input => { const began = performance.now(); input.value = 'a';
            input.dispatchEvent(new Event('input')); document.body.offsetHeight; return performance.now() - began; }"""
        took = min(page.get_by_label("Filter").evaluate(typed) for _ in range(10))
        assert took <= 50
        assert page.locator("tbody tr").count() <= 100


def test_console_watches_a_model_stop_and_wake(browser: Browser, service: Service) -> None:
    """From ready to cold, and on command to ready again, with the phases of the boot and their timeline."""
    with opened(browser, service) as visitor:
        page = visitor.page
        sign_in(page)
        model = card(page)
        expect(model).to_contain_text("KV cache")
        model.get_by_role("button", name="Stop").click()
        page.get_by_role("dialog").get_by_role("button", name="Stop").click()
        expect(model.locator(".state")).to_have_text("cold")
        model.get_by_text("Last boots").click()
        expect(model.locator(".boots ol > li")).to_have_count(1)
        asked = time.monotonic()
        model.get_by_role("button", name="Wake").click()
        expect(model.locator(".state")).to_have_text("waking")
        expect(model.locator(".wake")).to_contain_text("usually")
        expect(model.locator(".wake .legend")).to_contain_text("weights")
        expect(model.locator(".state")).to_have_text("ready", timeout=120_000)
        assert time.monotonic() - asked > 1
        expect(model.locator(".boots ol > li")).to_have_count(2)
        expect(model.locator(".boots .legend")).to_contain_text("import")
