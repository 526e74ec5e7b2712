"""The tree of errors. A message says what happened, the value and what was expected; a hint says what to do next.

Neither ever holds a secret. Library code raises these; only the command line turns them into an exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class ServiceError(Exception):
    """Any error of this service that a user can read. `exit_code` is what a command ends with.

    `is_transient`: the same attempt may succeed a little later, without anybody's doing.

    Args:
        message: What happened: one or more sentences.
        hint: What to do next: one or more sentences. A terminal shows it on a line of its own, HTTP joins the two.
    """

    exit_code = 1
    is_transient = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def to_terminal(self) -> str:
        """Return what a terminal shows: a line `error: …`, and a line `hint: …` where there is a hint."""
        return f"error: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")

    def to_fields(self) -> dict[str, str]:
        """Return what crosses the border of a process: class, message and hint, as JSON can hold them."""
        return {"error": type(self).__name__, "message": self.message, "hint": self.hint}

    @staticmethod
    def from_fields(fields: Mapping[str, str]) -> ServiceError:
        """Return the error that `to_fields` described; one of an unknown class becomes a plain `ServiceError`."""
        kind = globals().get(fields["error"])
        if not (isinstance(kind, type) and issubclass(kind, ServiceError)):
            kind = ServiceError
        return kind(fields["message"], hint=fields["hint"])


class UsageError(ServiceError, ValueError):
    """The user's input is wrong: a setting, a file, a name. Nothing was started.

    It is a ValueError too, so that pydantic collects what several validators raise.
    """

    exit_code = 2


class SettingsError(UsageError):
    """A `SERVICE_` variable is unknown or its value is outside the valid range."""


class RegistryError(UsageError):
    """A models file cannot be read, or one of its entries is wrong."""


class UnknownModelError(UsageError):
    """No registry entry has this name."""


class UnknownShapeError(ServiceError):
    """It is not known what vLLM keeps of a model's sequences; a boot tells it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        boot = "The engine's log tells the size of its KV cache at a boot: choose a GPU with room beside the weights."
        super().__init__(message, hint=hint or boot)


class UnknownGpuError(UsageError):
    """Modal offers no GPU of this name, or not so many in one container."""


class GpuFitError(UsageError):
    """A model cannot run on a GPU tier."""


class GpuMemoryError(GpuFitError):
    """The weights alone are more than a GPU tier gives the engine."""


class ComputeCapabilityError(GpuFitError):
    """vLLM has no kernels for the model on a GPU this old."""


class ContextMemoryError(UsageError):
    """The KV cache of an entry's context does not fit into memory beside the weights."""


class UnsupportedPlatformError(ServiceError):
    """The engine has no build for this operating system, processor or Python."""


class DiskSpaceError(ServiceError):
    """There is not enough room for the engine's environment or for the weights."""


class MemoryTooSmallError(ServiceError):
    """The weights alone are more than this machine's memory."""


class EnvironmentBuildError(ServiceError):
    """The engine's environment could not be installed."""


class UnauthenticatedBindError(UsageError):
    """Without keys the server would answer every client that can reach it."""


class PortInUseError(ServiceError):
    """Another process listens on the service's port."""


class GpuCountError(ServiceError):
    """The container or machine shows fewer GPUs than the model is to be spread over."""


class GpuDriverError(ServiceError):
    """The machine has a GPU, and its driver does not answer."""


class WeightsError(ServiceError):
    """The weights could not be fetched."""


class HubUnreachableError(WeightsError):
    """The hub does not answer, or not now."""

    is_transient = True


class GatedModelError(WeightsError):
    """The hub gives this model only to those who accepted its licence, and no token of theirs is here."""


class EngineError(ServiceError):
    """The engine did not become ready, or died afterwards."""


class EngineTimeoutError(EngineError):
    """The engine runs, but did not reach the next state in time."""


def one_line(error: BaseException) -> str:
    """Return an error's text as one line without its full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class RecordedFailureError(ServiceError):
    """An earlier boot with the same GPU, image, model and arguments failed, as this one would."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `choices` in any case, or an empty string when none is near."""
    spelled = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), sorted(spelled), n=1, cutoff=0.5)
    return f" Did you mean '{spelled[near[0]]}'?" if near else ""


def edit_distance(left: str, right: str) -> int:
    """Count the insertions, deletions, substitutions and swaps of neighbours that turn one name into the other."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(right, 1):
            edits = min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                edits = min(edits, older[j - 2] + 1)
            row.append(edits)
    return row[-1]
