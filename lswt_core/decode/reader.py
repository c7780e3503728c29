"""One step over a decoder: new ids in, their states out, and what has been read carried along."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from lswt_core.errors import NumericsError
from lswt_core.interfaces import Memory
from lswt_core.model import Decoder
from lswt_core.parallel import Precision

Past: TypeAlias = Any  # what has been read: None at the start, else a tree of tensors, batch row first (see lswt_core.tree)


class Reader:
    """Reads ids with a decoder, as training does: in segments of at most ``context`` tokens, memories carried along.

    Later calls see as much of earlier ones as the memories keep. Where some layer has no memory that keeps tokens (registers do
    not), a call would see nothing of the one before; the past is then the text itself, whose last ``context`` ids are read
    again from cold at every call.
    """

    def __init__(self, decoder: Decoder, precision: Precision, context: int) -> None:
        self.decoder, self.precision, self.context = decoder, precision, context
        self.device = next(decoder.parameters()).device
        self.remembers = all(any(m.length for m in block.modules() if isinstance(m, Memory)) for block in decoder.blocks)

    @torch.no_grad()
    def __call__(self, ids: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        """Ids [B, T] and what was read before -> normed states [B, T, M] and what has been read now. Read again from cold, only
        the last ``context`` ids have states.
        """
        with self.precision.autocast(self.device):
            return self.carry_on(ids, past) if self.remembers else self.read_again(ids, past)

    def carry_on(self, ids: Tensor, past: Past) -> tuple[Tensor, Past]:
        """The past is what the memories keep."""
        found = []
        for segment in ids.split(self.context, dim=1):
            states, past = self.decoder(segment, past)
            found.append(states)
        return torch.cat(found, dim=1), past

    def read_again(self, ids: Tensor, past: Past) -> tuple[Tensor, Past]:
        """The past is the text, [B, <= context]."""
        text = (ids if past is None else torch.cat((past, ids), dim=1))[:, -self.context :]
        states, _ = self.decoder(text)
        return states[:, -ids.shape[1] :], text

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """States [B, M] -> logits [B, V] in float32 at least; raises NumericsError if one is not finite."""
        with self.precision.autocast(self.device):
            logits = self.decoder.vocabulary.logits(states)
        if not logits.isfinite().all():
            raise NumericsError("the model's logits are not finite: go back to an earlier checkpoint, or compute in float32")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
