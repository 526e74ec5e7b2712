"""What the plane raises to the test that drives it; what it answers to a client are gRPC errors instead."""


class PlaneError(Exception):
    """Base of every error of the plane."""


class ContainerRuntimeError(PlaneError):
    """The interpreter given for containers cannot run them."""


class ClientDirectoryError(PlaneError):
    """The directory that carries the modal client into containers cannot be built."""


class ClientVersionUnsupported(PlaneError):
    """The installed modal client speaks a protocol that the plane was not checked against."""


class NotDeployed(PlaneError):
    """A test asked for an app, a function or a web method that no client has published."""


class PlaneTimeout(PlaneError):
    """What a test waited for did not come."""
