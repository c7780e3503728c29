"""The check of what parameters that are cut over ranks change: nothing."""

from __future__ import annotations

from unittest import SkipTest

import torch
import torch.distributed as dist

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.sharded_training import training_module
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, Subject
from lswt_core.conformance.two_processes import difference_of
from lswt_core.distributed.sharding import check_shardable
from lswt_core.errors import PluginError

KINDS = (*(kind for kind in MODEL_KINDS if kind != "attention"), "loss", "optimizer")


@rule(
    "sharding",
    KINDS,
    why=(
        "on several ranks parameters, gradients and optimizer state are cut over them; what reads"
        " its own piece as if it were the whole trains another model, silently"
    ),
    fix=(
        "let one module own each parameter, of one dimension or more, and read it from there in"
        " forward; in an optimizer take whole tensors and their norms from"
        ' lswt_core.plugin_api.sharded_tensor, or declare unit = "matrix", and get gradients from'
        " the objective"
    ),
    after=("micro-batches", "gradients", "stateless", "resume", "curvature update"),
)
def several_ranks_train_alike(subject: Subject) -> None:
    """A few updates by two processes, each of which holds a half of every parameter, give the
    losses, gradients, parameters and optimizer state of one process.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        raise SkipTest("this build of torch has no torch.distributed with gloo")
    if subject.kind != "optimizer":
        require_shardable(subject)
    found = difference_of(subject)
    require(not found, found)


def require_shardable(subject: Subject) -> None:
    """Raise Violation for a parameter that cannot be cut, SkipTest if the component has none. Also
    as it is constructed: memory that is allocated later is no longer shared.
    """
    loss = training_module(subject)
    with torch.device("meta"):
        constructed = subject.build(DIMS) if subject.kind == "loss" else subject.meta_decoder()
    try:
        check_shardable(constructed)
        check_shardable(loss)
    except PluginError as error:
        raise Violation(" ".join(str(error).split())) from error
    own = [module for module in loss.modules() if isinstance(module, subject.component)]
    if not any(True for module in own for _ in module.parameters()):
        raise SkipTest("it has no parameters")
