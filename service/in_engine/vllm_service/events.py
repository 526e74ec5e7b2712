"""The steps of a boot, in order: what each is called on the pipe, what people see, which phase of the record it ends.

The engine emits most of them to its parent; a few are the parent's own. To add one, add a line here with its phase, put
it into `since` of the phases that follow, so that no two overlap, and emit it. What people see while its phase lasts is
the label of the event before it.
Standard library only: both sides import this.
"""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """A step of a boot, or of the end.

    Attributes:
        label: What people see from this event on; "" leaves what they saw before.
        phase: The phase of the boot record that ends with this event; "" ends none.
        since: The events that can begin that phase: the last of them that has happened does.
    """

    label: str
    phase: str
    since: tuple[str, ...]

    ENVIRONMENT = "environment"  # of the parent: the engine's environment is looked for, and built where it is missing
    WEIGHTS = "weights", "Looking for the weights"  # of the parent
    SPAWNED = "spawned", "Starting the engine"  # of the parent
    STARTED = "started", "Importing vLLM"
    IMPORTED = "imported", "Loading the model", "import", "started"
    RELEASED = "released"  # of the parent: it has sent the release
    BUILDING = "building", "", "import", "imported released"  # under a hold: the imports that had to wait for a GPU
    LOADED = "loaded", "Generating the first tokens", "load", "building"
    WARMED = "warmed", "", "warm-up", "loaded"
    CANARY = "canary", "Opening the port", "canary", "loaded warmed"
    ASLEEP = "asleep", "", "sleep", "canary"
    AWAKE = "awake", "", "wake", "asleep released"
    WOKEN = "woken", "", "canary", "awake"
    OPENING = "opening"  # vLLM opens its port now
    READY = "ready", "", "ready", "canary woken released"  # of the parent: the port has answered
    HEARTBEAT = "heartbeat"
    DRAINING = "draining", "Stopping: streams in flight may finish (Ctrl-C again ends them)"  # of the parent
    DRAINED = "drained"

    def __new__(cls, name: str, label: str = "", phase: str = "", since: str = "") -> Event:
        """Make a member whose value is its name on the pipe."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.label, member.phase, member.since = label, phase, tuple(since.split())
        return member

    @property
    def is_of_the_boot(self) -> bool:
        """Whether it belongs to the boot, and not to serving or to the end."""
        return self not in {Event.HEARTBEAT, Event.DRAINING, Event.DRAINED}
