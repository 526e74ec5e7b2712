"""The events of a boot, in order: each one's name on the parent pipe, its label, and the phase that it ends.

The engine emits most of them to its parent; the parent reports a few itself. To add one, add a line here with its
phase, put it into `since` of the phases that follow, so that no two overlap, and emit it. While its phase lasts, the
terminal shows the label of the event before it.
Standard library only: parent and engine both import this.
"""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """An event of a boot, of serving or of the shutdown.

    Attributes:
        label: What the terminal shows from this event on; "" keeps the label before.
        phase: The phase of the boot record that ends with this event; "" ends none.
        since: The events that can begin that phase; it begins with the latest of them that happened.
    """

    label: str
    phase: str
    since: tuple[str, ...]

    ENVIRONMENT = "environment"  # by the parent: it looks for the engine's environment, and builds a missing one
    WEIGHTS = "weights", "Looking for the weights"  # by the parent
    SPAWNED = "spawned", "Starting the engine"  # by the parent
    STARTED = "started", "Importing vLLM"
    IMPORTED = "imported", "Loading the model", "import", "started"
    RELEASED = "released"  # by the parent: it has sent the command `release`
    BUILDING = "building", "", "import", "imported released"  # the imports that had to wait for a GPU are done
    LOADED = "loaded", "Generating the first tokens", "load", "building"
    WARMED = "warmed", "", "warm-up", "loaded"
    CANARY = "canary", "Opening the port", "canary", "loaded warmed"
    ASLEEP = "asleep", "", "sleep", "canary"
    AWAKE = "awake", "", "wake", "asleep released"
    WOKEN = "woken", "", "canary", "awake"
    OPENING = "opening"  # vLLM opens its port now
    READY = "ready", "", "ready", "canary woken released"  # by the parent: the port has answered
    HEARTBEAT = "heartbeat"
    USAGE = "usage"  # what an aborted request used, of which no answer can tell the gateway
    ADAPTER = "adapter"  # the outcome of a command `load_adapter` or `unload_adapter`
    DRAINING = "draining", "Stopping: streams in flight may finish (Ctrl-C again ends them)"  # by the parent
    DRAINED = "drained"

    def __new__(cls, name: str, label: str = "", phase: str = "", since: str = "") -> Event:
        """Make a member whose value is its name on the pipe."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.label, member.phase, member.since = label, phase, tuple(since.split())
        return member

    @property
    def is_boot_event(self) -> bool:
        """Whether it belongs to the boot, and not to serving or to the shutdown."""
        return self not in {Event.HEARTBEAT, Event.USAGE, Event.ADAPTER, Event.DRAINING, Event.DRAINED}
