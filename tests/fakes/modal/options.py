"""Applies `with_options`, `with_concurrency` and `with_batching` to a class's definition.

Owns the list of supported options; another option is an error with its name. Regions and clouds are recorded in the
definition and have no effect, since all containers of the plane run on this machine.
"""

from __future__ import annotations

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

_SCALARS = {
    "concurrency_limit": "concurrency_limit",
    "timeout_secs": "timeout_secs",
    "task_idle_timeout_secs": "task_idle_timeout_secs",
    "warm_pool_size": "warm_pool_size",
    "target_concurrent_inputs": "target_concurrent_inputs",
    "buffer_containers": "_experimental_buffer_containers",
    "max_concurrent_inputs": "max_concurrent_inputs",
    "batch_max_size": "batch_max_size",
    "batch_linger_ms": "batch_linger_ms",
    "cloud_provider_str": "cloud_provider_str",
    "routing_region": "routing_region",
}
_MESSAGES = ("resources", "retry_policy", "scheduler_placement")
_REPLACED = {"replace_secret_ids": "secret_ids", "replace_volume_mounts": "volume_mounts"}
_APPLIED = {*_SCALARS, *_MESSAGES, *_REPLACED, *_REPLACED.values()}


def with_options(base: pb.Function, options: pb.FunctionOptions) -> pb.Function:
    """Return the definition with the given options, the others unchanged. Raises: GRPCError UNIMPLEMENTED."""
    given = [field.name for field, _ in options.ListFields()]
    if unknown := sorted(set(given) - _APPLIED):
        text = f"The modal plane for tests does not know the option {', '.join(unknown)} of a variant."
        raise GRPCError(Status.UNIMPLEMENTED, text)
    definition = pb.Function()
    definition.CopyFrom(base)
    for option in given:
        if option in _SCALARS:
            setattr(definition, _SCALARS[option], getattr(options, option))
        elif option in _MESSAGES:
            getattr(definition, option).CopyFrom(getattr(options, option))
        elif option in _REPLACED:
            name = _REPLACED[option]
            definition.ClearField(name)  # type: ignore[arg-type]
            getattr(definition, name).extend(getattr(options, name))
    return definition
