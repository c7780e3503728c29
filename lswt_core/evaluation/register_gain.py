"""What registers are worth to a trained model: the loss without them, on the same tokens. Other
keys that belong to no token (the sink of softmax-off-by-one, a sink logit) count as registers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.attention_sinks import is_sink
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.probe_batch import probe_batch
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, token_losses
from lswt_core.interfaces import AttentionBackend, KVBlock
from lswt_core.plugin_api.softmax_attention import replace_attention_backends


def register_gain(model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int) -> Mean:
    """Return the loss with the keys and values of registers left out, less ``losses``, which are
    the text's in segments of ``seq_len`` tokens; nats per token, interval over documents. The
    model was trained with registers: how well one without would have learned is another question.

    Raises UsageError if no layer attends to registers.
    """
    layers: list[WithoutRegisters] = []

    def without(backend: AttentionBackend) -> WithoutRegisters:
        layers.append(WithoutRegisters(backend))
        return layers[-1]

    with replace_attention_backends(model.decoder, lambda layer: without(layer.backend)):
        ids = probe_batch(model, text)[:1, :1]
        with torch.no_grad(), model.precision.autocast(ids.device):
            model.decoder(ids)
        if not any(layer.left_out for layer in layers):
            raise UsageError("no layer of this model attends to registers")
        cut = token_losses(model, text, seq_len)
    return mean_over_tokens(cut.nll - losses.nll, losses.document)


class WithoutRegisters(nn.Module):
    """An attention backend to which keys that belong to no token are not given."""

    def __init__(self, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend, self.left_out = backend, False

    def forward(self, blocks: list[KVBlock]) -> Tensor:
        """Return what the backend computes of the other key blocks."""
        kept = [block for block in blocks if not is_sink(block)]
        self.left_out |= len(kept) < len(blocks)
        attended: Tensor = self.backend(kept)
        return attended
