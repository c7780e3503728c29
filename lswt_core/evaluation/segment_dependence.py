"""How much what a model says depends on where a text is cut into segments: 0 where positions are
distances between tokens, more where a token is told from its place in the segment.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.memory_gain import require_memory
from lswt_core.evaluation.memory_length import longer_memories
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, token_losses
from lswt_core.model.decoder import Decoder

PIECES = 8  # of a segment


def segment_dependence(model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int) -> Mean:
    """Return by how much the loss of a token changes, whether up or down, where every segment is
    read in eight pieces, its memory as long as for the whole segment; ``losses`` are the text's in
    segments of ``seq_len`` tokens; nats, interval over documents.

    A cache reaches as far back as before; what a memory that summarises tokens sees may change.
    Rounding counts, which in bfloat16 is most of it for a model that has no other dependence.
    Raises UsageError if the model has no memory, or segments are of one token.
    """
    require_memory(model, text, seq_len)
    if seq_len == 1:
        raise UsageError("segments of one token have no pieces")
    in_pieces = model._replace(decoder=cast(Decoder, InPieces(model.decoder)))
    changed = token_losses(in_pieces, text, seq_len).nll - losses.nll
    return mean_over_tokens(np.abs(changed), losses.document)


class InPieces(nn.Module):
    """A decoder that reads every segment piece by piece. Memories of the last tokens are cut to
    their length at the segment's end.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.vocabulary = decoder, decoder.vocabulary

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As ``Decoder.forward``."""
        length, read = inputs.shape[1], list[Tensor]()
        *pieces, last = inputs.split(max(1, length // PIECES), 1)
        with longer_memories(self.decoder, length):
            for piece in pieces:
                states, state = self.decoder(piece, state)
                read.append(states)
        states, state = self.decoder(last, state)
        return torch.cat([*read, states], 1), state
