"""Parameters on a mesh of ranks: FSDP2 (torch's ``fully_shard``) around every block and around the
rest of the model. One engine for data parallelism, sharding, and both (HSDP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lswt_core.errors import PluginError

FIX = "\n  fix: "


class Sharding(NamedTuple):
    """How a model's parameters lie on a mesh.

    Each replica holds every parameter once, cut along its first dimension over the ranks of the
    replica. A block's parameters are gathered before its forward and its backward pass, and freed
    after them; gradients are summed over all ranks, each of which computes its share of the loss.
    """

    mesh: DeviceMesh  # (replicas, shards)
    # what parameters are gathered in; None: their own. They, and sums of gradients, stay float32.
    gathered: torch.dtype | None = None

    def shard(self, module: nn.Module) -> None:
        """Cut the parameters of a module that are not cut yet. Raises PluginError for parameters
        that cannot be.
        """
        # slow to import, and of no use to a single process
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        check_shardable(module)
        reduced = None if self.gathered is None else torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self.gathered, reduce_dtype=reduced, cast_forward_inputs=False
        )
        # also the outermost module: else it would keep the weights of an evaluation
        fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for method in getattr(module, "forward_methods", ()):
            register_fsdp_forward_method(module, method)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # sums, by the one operation that every backend has
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
                # An expert may be used by one rank only: its gradient is 0 on the others. Before
                # torch 2.13 the ranks' collectives would differ there, which ends in an error.
                if hasattr(part, "set_reduce_scatter_unused_params"):
                    part.set_reduce_scatter_unused_params(True)


def check_shardable(module: nn.Module) -> None:
    """Raise PluginError for a parameter that would be trained wrongly once it is cut: a scalar, one
    that two modules share, or one that a module keeps a second reference to.
    """
    owners: dict[nn.Parameter, str] = {}
    for path, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            name = f"{path}.{key}".lstrip(".")
            if parameter.ndim == 0:
                raise PluginError(
                    f"parameter {name!r} of {type(part).__name__} is a scalar, which cannot be cut"
                    f" over ranks{FIX}give it the shape [1]"
                )
            if owners.setdefault(parameter, name) != name:
                raise PluginError(
                    f"parameter {name!r} of {type(part).__name__} is also {owners[parameter]!r}:"
                    f" on several ranks the two would be trained apart{FIX}let one module own it,"
                    " and hand it to the other in forward"
                )
    for path, part in module.named_modules():
        for key in kept_references(part, owners):
            raise PluginError(
                f"{type(part).__name__} at {path!r} keeps a parameter in its attribute {key!r}:"
                " on several ranks that would be a stale copy of it"
                f"{FIX}read the parameter from the module that owns it whenever it is needed"
            )


def kept_references(module: nn.Module, parameters: dict[nn.Parameter, str]) -> Iterator[str]:
    """The plain attributes of a module in which parameters stand."""
    for key, value in vars(module).items():
        if key not in ("_parameters", "_modules") and any(
            isinstance(one, nn.Parameter) and one in parameters for one in flattened(value)
        ):
            yield key


def flattened(value: Any) -> Iterator[Any]:
    """The items of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from flattened(item)
    else:
        yield value


def is_fsdp(model: nn.Module) -> bool:
    """Whether a module's parameters were cut by ``Sharding.shard``."""
    return hasattr(model, "set_requires_all_reduce")


@contextmanager
def deferred_all_reduce(model: Any, defer: bool) -> Iterator[None]:
    """With ``defer``, a backward pass within the block leaves its gradients unsummed over replicas;
    the next one adds them to its own.
    """
    if not defer or not is_fsdp(model):
        yield
        return
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)
