"""Debian's Chromium, without a window: pages whose errors, dialogs and requests are collected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from . import programs

DESKTOP, PHONE = (1280, 800), (375, 740)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=programs.find("chromium-headless-shell"))
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page of one visitor.

    Attributes:
        errors: What the page reported to the browser's console, exceptions included.
        dialogs: What an injected script would have shown.
        urls: What the page has requested.
        bodies: Bodies that it was sent, by path.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    bodies: dict[str, str] = field(default_factory=dict)


@contextmanager
def visit(
    browser: Browser, url: str, size: tuple[int, int] = DESKTOP, *, path: str = "", **options: Any
) -> Iterator[Visit]:
    """Open a page of a service as a new visitor; no error, no dialog, and no request to another host may come of it."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(60_000)
    found = Visit(context.new_page())
    page = found.page
    page.on("console", lambda message: found.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda request: found.urls.append(request.url))

    def dismiss(dialog: Any) -> None:
        found.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(url + path)
    try:
        yield found
    finally:
        context.close()
    others = [one for one in found.urls if not one.startswith((url, "data:", "blob:"))]
    assert (found.errors, found.dialogs, others) == ([], [], [])
