"""Checks of the loss terms that layers return."""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.loss_checks import make_batch
from lswt_core.conformance.subject import LAYER_KINDS, Subject
from lswt_core.conformance.tensors import describe_sums
from lswt_core.interfaces import LossSum
from lswt_core.model.decoder import Decoder


def loss_terms(decoder: Decoder, ids: Tensor) -> dict[str, LossSum]:
    """The loss terms of all layers. Raises SkipTest if they neither return nor declare any."""
    losses: dict[str, LossSum] = {}
    decoder(ids, losses=losses)
    if not losses and not any(layer.loss_weights for layer in decoder.layers()):
        raise SkipTest("it returns no loss terms")
    return losses


@rule(
    "loss terms",
    LAYER_KINDS,
    why="a term is weighted and averaged by what is declared of it before the model runs",
    fix=(
        "declare every term with its weight in `loss_weights`, and return each of them in every"
        " call, as LossSum(total, count) of scalar tensors"
    ),
    after=("shapes",),
)
def loss_terms_are_declared(subject: Subject) -> None:
    """Layers return the loss terms that they declare: finite sums and counts, scalar tensors."""
    decoder, batch = subject.decoder(), make_batch(subject)
    losses = loss_terms(decoder, batch.inputs)
    declared = {name for layer in decoder.layers() for name in layer.loss_weights}
    undeclared = sorted(losses.keys() - declared)
    require(not undeclared, f"forward returns {', '.join(undeclared)}, which is not declared")
    missing = sorted(declared - losses.keys())
    require(not missing, f"`loss_weights` has {', '.join(missing)}, which forward does not return")
    for name, term in losses.items():
        is_sum = all(isinstance(part, Tensor) and part.dim() == 0 for part in term)
        require(is_sum, f"the term {name!r} is not made of two scalar tensors")
        require(term.total.isfinite(), f"the term {name!r} is not finite")


@rule(
    "count",
    LAYER_KINDS,
    why=(
        "the denominator of a global batch must be known before the backward pass of its first"
        " micro-batch"
    ),
    fix="override loss_count(name, batch) so that it returns what forward counts",
    after=("loss terms",),
)
def layers_count_right(subject: Subject) -> None:
    """loss_count(name, batch) is what forward counts, also where labels are left out."""
    decoder = subject.decoder()
    for batch in (
        make_batch(subject, padded=False),
        make_batch(subject),
        make_batch(subject, 2, 3),
    ):
        for name, term in loss_terms(decoder, batch.inputs).items():
            counts = [
                int(layer.loss_count(name, batch))
                for layer in decoder.layers()
                if name in layer.loss_weights
            ]
            rows, length = batch.inputs.shape
            require(
                sum(counts) == int(term.count),
                f"{rows} rows of {length} tokens: loss_count says {sum(counts)} for {name!r} over"
                f" all layers, forward counts {int(term.count)}",
            )


@rule(
    "micro-batches",
    LAYER_KINDS,
    why=(
        "a batch that is split into micro-batches or over data-parallel ranks must have the loss of"
        " the whole"
    ),
    fix=(
        "return a sum over rows and the number of its terms; a loss that is not linear (of load"
        " balance, say) is computed row by row"
    ),
    after=("count", "row independence"),
)
def layer_losses_add_up(subject: Subject) -> None:
    """Loss terms of the rows alone add up to those of the whole batch."""
    decoder, batch = subject.decoder(), make_batch(subject)
    whole = loss_terms(decoder, batch.inputs)
    rows = [loss_terms(decoder, one) for one in batch.inputs.split(1)]
    for name, term in whole.items():
        total = sum(float(row[name].total.detach()) for row in rows)
        expected = float(term.total.detach())
        require(
            abs(total - expected) <= 1e-9 * max(1, abs(expected)),
            f"totals of {name!r} over rows add up to {describe_sums(total, expected)}",
        )
        count = sum(int(row[name].count) for row in rows)
        require(
            count == int(term.count), f"counts of {name!r} add up to {count}, not {int(term.count)}"
        )


@rule(
    "loss gradient",
    LAYER_KINDS,
    why="a loss that is cut off from the parameters is reported, and trains nothing",
    fix="compute the total from tensors with gradients: no detach() or .item() before it",
    after=("loss terms",),
)
def layer_losses_have_gradients(subject: Subject) -> None:
    """Every loss term can be differentiated by some parameter."""
    decoder, batch = subject.decoder(), make_batch(subject)
    parameters = list(decoder.parameters())
    for name, term in loss_terms(decoder, batch.inputs).items():
        require(term.total.requires_grad, f"the term {name!r} is detached: it has no gradient")
        gradients = torch.autograd.grad(
            term.total, parameters, allow_unused=True, retain_graph=True
        )
        reached = any(gradient is not None for gradient in gradients)
        require(reached, f"the term {name!r} depends on no parameter")
