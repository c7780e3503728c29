"""For losses that predict further ahead than the next token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lswt_core.interfaces import IGNORE, Batch


def labels_after(batch: Batch, distance: int) -> Tensor:
    """The label ``distance`` tokens after each token's own, [B, T].

    IGNORE where the token itself predicts nothing (padding), where no further label is known and,
    under document masking, where it belongs to another document.
    """
    labels = batch.labels
    length = labels.shape[1]
    known = labels
    if batch.labels_ahead is not None:
        known = torch.cat((labels, batch.labels_ahead[:, :distance]), dim=1)
    known = pad(known, (0, length + distance - known.shape[1]), value=IGNORE)
    predicted = labels != IGNORE
    if batch.first_visible is not None:
        # beyond the segment, labels of other documents than the last token's are IGNORE already
        beyond = batch.first_visible[:, -1:].expand(-1, distance)
        starts = torch.cat((batch.first_visible, beyond), dim=1)[:, distance:]
        predicted = predicted & (starts <= torch.arange(length, device=labels.device))
    return known[:, distance:].masked_fill(~predicted, IGNORE)
