"""Passes of a rank that has fewer micro-batches than another. Parameters are gathered and gradients
summed by all ranks together, so all must make as many passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from lswt_core.interfaces import Batch, LabelSampling
from lswt_core.model.train_module import BatchLoss
from lswt_core.plugin_api.pytree import tree_map
from lswt_core.train.step_context import StepContext


class IdlePasses(NamedTuple):
    """Passes over one row, whose loss is multiplied by 0."""

    batch: Batch
    state: Any
    number: int


def idle_passes(
    context: StepContext, chosen: Sequence[int], own: int, batch: Batch, state: Any
) -> IdlePasses | None:
    """What this rank runs besides its ``own`` micro-batches of the ``chosen`` rows of the global
    batch: the first row of another batch. None if no rank has more micro-batches.
    """
    size = len(context.rows)
    most = max(Counter(row // size for row in chosen).values())
    number = -(-most // context.micro_batch_size) - own
    if not number:
        return None
    fields, first_state = tree_map(itemgetter(slice(0, 1)), (tuple(batch), state))
    return IdlePasses(Batch(*fields), first_state, number)


def idle_results(
    idle: IdlePasses | None,
    run: Callable[..., BatchLoss],
    *,
    sample: bool = False,
    **options: Any,
) -> Iterator[BatchLoss]:
    """The results of idle passes, their losses multiplied by 0. ``run`` computes the loss of some
    rows; with ``sample`` also against sampled labels.
    """
    if idle is None:
        return
    if sample:
        inputs = idle.batch.inputs
        options["draws"] = LabelSampling(torch.zeros(inputs.shape, device=inputs.device))
    for _ in range(idle.number):
        result = run(idle.batch, idle.state, **options)
        sampled = None if result.sampled is None else result.sampled * 0
        yield result._replace(loss=result.loss * 0, sampled=sampled)
