"""How much context a model uses: relative effective context length (RECL), by cold restarts.

Dai et al. 2019 (arXiv 1901.02860), appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.memory_length import longest_memory
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import score
from lswt_core.interfaces import IGNORE
from lswt_core.plugin_api.pytree import detach_state
from lswt_core.plugin_api.seeding import derive_seed

HARDEST = (0.1, 0.5, 1.0)  # shares r of the targets, hardest first
LEAST_GAIN = 0.01  # of relative perplexity
TOKENS_AT_ONCE = 16_384
LONGEST_CONTEXT, CONTEXTS = 4, 16  # segments, unless memories reach further; at most so many
TARGETS, LEAST_TARGETS = 256, 16
COLD_BUDGET = 16  # times the tokens of the text that cold restarts may read


class Targets(NamedTuple):
    """Tokens whose losses are compared between contexts."""

    document: np.ndarray  # [targets]
    position: np.ndarray  # [targets] of the input that predicts the target


class ContextLosses(NamedTuple):
    """The losses of the same tokens with contexts of different lengths."""

    contexts: Sequence[int]  # tokens that a target is predicted from, evenly spaced
    losses: np.ndarray  # [contexts, targets]
    targets: Targets

    def means(self) -> list[Mean]:
        """The mean losses, one a context."""
        return [mean_over_tokens(row, self.targets.document) for row in self.losses]

    def over_longest(self) -> list[Mean]:
        """The mean losses less that with the longest context, token by token, one a context."""
        gaps = self.losses - self.losses[-1]
        return [mean_over_tokens(row, self.targets.document) for row in gaps]


def choose_contexts(models: Sequence[LoadedModel], text: Text) -> Sequence[int]:
    """Return at most CONTEXTS contexts, evenly spaced: up to four segments of the first model, or
    to a segment and twice the longest memory of any, as far as documents are long enough for
    LEAST_TARGETS tokens. Raises UsageError if they are for fewer than two contexts.
    """
    seq_len = models[0].seq_len
    memory = max(longest_memory(model.decoder) for model in models)
    return spaced_contexts(text, seq_len, max(LONGEST_CONTEXT * seq_len, seq_len + 2 * memory))


def spaced_contexts(text: Text, seq_len: int, longest: int) -> Sequence[int]:
    """Return contexts up to ``longest``, or as far as the text allows, in steps of quarters of a
    segment: of one where CONTEXTS of these are enough.
    """
    before = np.sort(np.concatenate([np.flatnonzero(one != IGNORE) for one in text.labels])) + 1
    most = min(longest, int(before[-min(LEAST_TARGETS, len(before))]))
    quarter = max(1, seq_len // 4)
    step = quarter * max(1, math.ceil(most / (CONTEXTS * quarter)))
    contexts = range(step, most + 1, step)
    if len(contexts) < 2:
        raise UsageError(
            f"fewer than {LEAST_TARGETS} scored tokens of {text.name!r} have {2 * step:,} tokens"
            " of their document before them\n  fix: --text with longer documents"
        )
    return contexts


def measure_context(model: LoadedModel, text: Text, contexts: Sequence[int]) -> ContextLosses:
    """Return the losses of as many of a text's tokens as COLD_BUDGET allows, each predicted from
    exactly c tokens, for every c in ``contexts`` (increasing). Which tokens they are depends on
    the text and the contexts alone.

    Raises UsageError if no document is longer than the longest context, or there is but one.
    """
    if len(contexts) < 2:
        raise UsageError(
            f"RECL compares contexts: {contexts[0]:,} is a single one\n"
            "  fix: name several, evenly spaced, e.g. 16,32,48"
        )
    targets = min(TARGETS, max(LEAST_TARGETS, COLD_BUDGET * text.read // sum(contexts)))
    chosen = choose_targets(text, contexts[-1], targets)
    losses = np.stack([cold_losses(model, text, chosen, c) for c in contexts])
    return ContextLosses(contexts, losses, chosen)


def relative_lengths(
    contexts: Sequence[int], group: Sequence[np.ndarray]
) -> list[dict[float, int]]:
    """Return RECL of every model of a group by share r of the hardest targets; their losses are
    [contexts, targets] of the same targets.
    """
    least = np.min(group, axis=0)
    return [
        {share: relative_length(contexts, own, least, share) for share in HARDEST} for own in group
    ]


def choose_targets(text: Text, longest: int, targets: int) -> Targets:
    """Return up to ``targets`` tokens that have ``longest`` tokens of their document before them,
    drawn from all of these.
    """
    positions = [
        np.flatnonzero(labels[longest - 1 :] != IGNORE) + longest - 1 for labels in text.labels
    ]
    position = np.concatenate(positions)
    document = np.repeat(np.arange(len(positions)), [len(one) for one in positions])
    if not len(document):
        raise UsageError(
            f"no document of {text.name!r} has {longest:,} tokens, which the longest context takes"
            "\n  fix: --context with shorter ones, or --text with longer documents"
        )
    generator = np.random.PCG64(derive_seed(0, "targets", len(document)))
    order = np.argsort(generator.random_raw(len(document)), kind="stable")[:targets]
    return Targets(document[order], position[order])


@torch.no_grad()
def cold_losses(model: LoadedModel, text: Text, targets: Targets, context: int) -> np.ndarray:
    """Return the losses [targets], each predicted from exactly ``context`` tokens, the states empty
    before them.
    """
    size = max(1, TOKENS_AT_ONCE // context)
    device = next(model.decoder.parameters()).device
    losses = []
    for begin in range(0, len(targets.document), size):
        inputs, labels, some = [], [], slice(begin, begin + size)
        for document, position in zip(targets.document[some], targets.position[some], strict=True):
            ids = text.documents[document]
            inputs.append(ids[position - context + 1 : position + 1])
            labels.append(text.labels[document][position])
        last = last_losses(
            model,
            torch.from_numpy(np.stack(inputs)).to(device),
            torch.tensor(np.array(labels), device=device),
        )
        losses.append(last.double().cpu().numpy())
    return np.concatenate(losses)


def last_losses(model: LoadedModel, inputs: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the losses [B] of the labels ``last`` [B] of the last inputs [B, c], which are read in
    segments that end with them.
    """
    first = (inputs.shape[1] - 1) % model.seq_len + 1
    sizes = [first] + [model.seq_len] * ((inputs.shape[1] - first) // model.seq_len)
    state, nll = None, None
    for segment in inputs.split(sizes, dim=1):
        labels = torch.full_like(segment, IGNORE)
        labels[:, -1] = last  # the last segment's alone count
        nll, state = score(model, segment, labels, state)
        state = detach_state(state)
    assert nll is not None
    return nll[:, -1]


def relative_length(
    contexts: Sequence[int], losses: np.ndarray, least: np.ndarray, share: float
) -> int:
    """Return RECL of a model with ``losses`` [contexts, T]: the context from which a longer one
    gains less than LEAST_GAIN; the longest one, a lower bound, if there is none. ``least``
    [contexts, T] are the least losses of any model of the group, itself among them: what has no use
    for a short context gains nothing by a longer one that others do not need.

    With b = least(c), f(c, c') is the mean of min(b, l(c')) over the share of targets with the
    largest b, and the gain (exp f(c, c) - exp f(c, c')) / exp f(c, c).
    """
    for i, context in enumerate(contexts[:-1]):
        hardest = np.argsort(-least[i], kind="stable")[: max(1, round(share * losses.shape[1]))]
        base = least[i][hardest]
        before, after = base.mean(), np.minimum(base, losses[i + 1][hardest]).mean()
        if 1 - np.exp(after - before) < LEAST_GAIN:
            return context
    return contexts[-1]
