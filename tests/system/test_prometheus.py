"""The examples for Prometheus and Grafana in Debian's Prometheus, which scrapes a service with the tiny model."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from service.gateway.gauges import SpendGauges
from service.gateway.spend_day import Day, date_of
from service.gateway.spending import SpendGuard
from tests.engine.dialogues import COUNTING, QUESTION
from tests.engine.running import REPOSITORY, Service, free_port, wait_until

from . import programs
from .conftest import ADMIN, KEY, LIMITED_KEY, SCRAPER_KEY

EXAMPLES = REPOSITORY / "examples/prometheus"
DASHBOARD = json.loads((REPOSITORY / "examples/grafana/vllm-service.json").read_text())
# What Grafana puts in for its variables; the interval holds the whole test.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1m", "$model": ".*", "$key": ".*"}
# What the titles' queries must show of the requests of `use`, beside being there.
SHOWN = {
    "Requests by status": {("status", "200"), ("status", "401"), ("status", "404"), ("status", "429")},
    "Errors by key": {("key", "-"), ("key", "limited"), ("key", "plain")},
    "Wakes": {("outcome", "ready")},
    "By key, in this time range": {("key", "plain")},
}


def panels() -> Iterator[dict[str, Any]]:
    """Yield the dashboard's panels, those within rows too."""
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def queries() -> dict[tuple[str, str], str]:
    """Return the dashboard's queries by the titles of their panels and their own letters."""
    found = {}
    for panel in panels():
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            assert "$" not in query
            found[panel["title"], target["refId"]] = query
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples as a user copies them, with a key."""
    copied = tmp_path_factory.mktemp("prometheus") / "examples"
    shutil.copytree(EXAMPLES, copied)
    (copied / "admin-key").write_text(SCRAPER_KEY)
    return copied


def promtool(directory: Path, *arguments: str) -> str:
    """Run `promtool`, insist that it finds nothing wrong, and return what it says."""
    command = [programs.find("promtool"), *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_configuration_and_rules_and_every_alert_has_a_test(directory: Path) -> None:
    """Each with series at which it fires."""
    rules = yaml.safe_load((EXAMPLES / "rules.yml").read_text())["groups"][0]["rules"]
    assert f"{len(rules)} rules found" in promtool(directory, "check", "config", "prometheus.yml")
    promtool(directory, "check", "rules", "rules.yml")
    promtool(directory, "test", "rules", "rules_test.yml")
    tests = yaml.safe_load((EXAMPLES / "rules_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one.get("exp_alerts")}
    documented = re.findall(r"^\| (`[A-Z][a-z].*?) \|", (REPOSITORY / "docs/monitoring.md").read_text(), re.M)
    assert fired == {rule["alert"] for rule in rules} == set(re.findall(r"[A-Z]\w+", " ".join(documented)))


def test_dashboard_is_whole() -> None:
    """Panels have ids of their own, overlap nowhere, and ask the data source that is chosen."""
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources)


class Prometheus:
    """A running one.

    Args:
        url: Of its API.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **params: str) -> Any:
        """Return the data of an answer."""
        answer = requests.get(f"{self._url}/api/v1/{path}", params=params, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def is_ready(self) -> bool:
        """Tell whether it answers."""
        with suppress(requests.ConnectionError):
            return requests.get(f"{self._url}/-/ready", timeout=10).status_code == 200
        return False

    def samples(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and values that a query has now, without those that are no number."""
        found = [(one["metric"], float(one["value"][1])) for one in self.get("query", query=query)["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]


@pytest.fixture(scope="module")
def limited_day() -> Iterator[int]:
    """The port of the one page of a gateway that only Modal has: what the day has cost of its limit."""
    registry, port = CollectorRegistry(), free_port()
    guard = SpendGuard(None, max_dollars_per_day=20)  # type: ignore[arg-type] - nothing is kept
    guard._day = Day(day=date_of(time.time()), at=time.time(), dollars=5.0)
    registry.register(SpendGauges(guard))
    server, thread = start_http_server(port, "127.0.0.1", registry)
    yield port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def prometheus(keyed: Service, limited_day: int, directory: Path) -> Iterator[Prometheus]:
    """Prometheus as the example configures it, but for ports, the model, and the interval."""
    gateway, port = f"127.0.0.1:{keyed.port}", free_port()
    text = (EXAMPLES / "prometheus.yml").read_text()
    for written, here in (
        ('targets: ["127.0.0.1:8000"]', f'targets: ["{gateway}", "127.0.0.1:{limited_day}"]'),
        ('replacement: "127.0.0.1:8000"', f'replacement: "{gateway}"'),
        ("targets: [qwen3-8b]", "targets: [tiny]"),
        ("scrape_interval: 15s", "scrape_interval: 500ms"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert text.count(written) == 1, written
        text = text.replace(written, here)
    (directory / "here.yml").write_text(text)
    command = [
        *(programs.find("prometheus"), "--config.file=here.yml", f"--storage.tsdb.path={directory / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
        running = Prometheus(f"http://127.0.0.1:{port}")
        try:
            wait_until(lambda: running.is_ready() or process.poll() is not None, 30)
            assert process.poll() is None, (directory / "log").read_text()
            yield running
        finally:
            process.terminate()
            process.wait(30)


def use(service: Service) -> None:
    """Send requests that are answered, that are refused in four ways, and one whose client leaves."""

    def ask(key: str, **fields: object) -> int:
        body, headers = {"model": "tiny", **QUESTION, **fields}, {"Authorization": f"Bearer {key}"}
        return requests.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=120).status_code

    assert [ask(KEY), ask(KEY, stream=True), ask(KEY, model="nope"), ask("sk-wrong")] == [200, 200, 404, 401]
    assert 429 in [ask(LIMITED_KEY) for _ in range(3)]
    body = {"model": "tiny", **COUNTING, "stream": True}
    with closing(
        requests.post(f"{service.url}/v1/chat/completions", json=body, headers=ADMIN, stream=True, timeout=120)
    ) as answer:
        next(answer.iter_lines())


def test_every_query_of_the_dashboard_has_data_of_a_real_run(prometheus: Prometheus, keyed: Service) -> None:
    """After requests that were answered, refused, left, held, and woken; no rule of the alerts fails."""
    wait_until(lambda: len(prometheus.samples("up == 1")) == 3, 20, keyed)
    use(keyed)
    stopped = requests.post(f"{keyed.url}/admin/pools/stop", json={"model": "tiny"}, headers=ADMIN, timeout=60)
    assert stopped.status_code == 202
    wait_until(lambda: bool(prometheus.samples('gateway_pool_state{model="tiny",state="cold"} == 1')), 30, keyed)
    use(keyed)  # the first of them is held
    use(keyed)
    missing: dict[tuple[str, str], str] = {}

    def all_there() -> bool:
        missing.clear()
        missing.update({name: query for name, query in queries().items() if not _is_shown(prometheus, name[0], query)})
        return not missing

    with suppress(AssertionError):
        wait_until(all_there, 15)
    assert missing == {}

    used = re.findall(r"\b(?:gateway_|vllm:)\w+", (EXAMPLES / "rules.yml").read_text())
    assert set(used) <= set(prometheus.get("label/__name__/values"))
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    woken = 'increase(gateway_cold_starts_total{model="tiny",outcome="ready"}[1m]) > 0.5'
    assert prometheus.samples(woken)
    requests_of_tiny = 'gateway_request_duration_seconds_count{model="tiny"} > 8'
    wait_until(lambda: bool(prometheus.samples(requests_of_tiny)), 20, keyed)  # those that were left end a little later
    assert not prometheus.samples('gateway_time_to_first_byte_seconds_count{model="tiny"} > 60')  # no scrapes


def _is_shown(prometheus: Prometheus, title: str, query: str) -> bool:
    labels = {item for found, value in prometheus.samples(query) if value or title != "Wakes" for item in found.items()}
    return bool(prometheus.samples(query)) and labels >= SHOWN.get(title, set())
