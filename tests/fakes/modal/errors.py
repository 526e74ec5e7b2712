"""The exceptions that the plane raises in tests; clients get gRPC errors instead."""


class PlaneError(Exception):
    """Base of every error of the plane."""


class ContainerRuntimeError(PlaneError):
    """The interpreter given for containers cannot run them."""


class ClientDirectoryError(PlaneError):
    """The directory with the modal client for containers cannot be built."""


class ClientVersionUnsupported(PlaneError):
    """The installed modal client is of a version that the plane was not tested with."""


class NotDeployed(PlaneError):
    """No client has published the app, function or web method that a test looks up."""


class PlaneTimeout(PlaneError):
    """The condition that a test waits for did not become true in time."""
