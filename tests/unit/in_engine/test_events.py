"""The events of a boot: each phase is well defined, and one line defines an event for both sides."""

from __future__ import annotations

import itertools
import json

import pytest

from service.boots.phases import Phases
from service.in_engine.vllm_service.events import Event


@pytest.mark.parametrize("event", Event)
def test_event_names_its_phase_by_events_that_come_before_it(event: Event) -> None:
    """A phase begins with an earlier event, and only an event that ends one has such."""
    order = list(Event)

    assert bool(event.phase) == bool(event.since)
    assert all(order.index(Event(begin)) < order.index(event) for begin in event.since)


@pytest.mark.parametrize("event", Event)
def test_event_crosses_the_pipe_as_its_name(event: Event) -> None:
    """JSON holds the name, and the name gives the same event back."""
    assert Event(json.loads(json.dumps({"event": event}))["event"]) is event


@pytest.mark.parametrize("event", [event for event in Event if event.phase])
def test_event_that_ends_a_phase_gives_a_span(event: Event) -> None:
    """Nothing besides the line in the enum is needed for it."""
    phases = Phases()
    phases.begin(0.0)
    phases.engine_begins()
    phases.mark(Event(event.since[-1]), 1.0)
    phases.mark(event, 3.0)

    assert [(span.name, span.start, span.end) for span in phases.spans()] == [(event.phase, 1.0, 3.0)]


@pytest.mark.parametrize("hold", ["", "imported", "asleep"])
def test_phases_of_a_boot_do_not_overlap(hold: str) -> None:
    """Each begins where the one before it ended: an event that is added is in `since` of those that follow it."""
    asleep = {Event.WARMED, Event.ASLEEP, Event.AWAKE, Event.WOKEN}
    passed = [event for event in Event if event.is_boot_event and (hold == "asleep" or event not in asleep)]
    if hold:  # the release comes after the hold
        passed.remove(Event.RELEASED)
        passed.insert(passed.index(Event(hold)) + 1, Event.RELEASED)
    phases = Phases()
    phases.begin(0.0)
    phases.engine_begins()
    for second, event in enumerate(passed):
        phases.mark(event, float(second))

    spans = phases.spans()
    assert len(spans) == sum(bool(event.phase) for event in passed)
    assert all(before.end <= after.start for before, after in itertools.pairwise(spans)), spans
