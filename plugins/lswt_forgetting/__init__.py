"""Forgetting attention: a forget gate on the scores of softmax attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Bias,
    DifferenceBias,
    Dims,
    KeyValue,
    PositionalEncoding,
    Unsupported,
)


class Forgetting(PositionalEncoding):
    """FoX's forget gate: every token multiplies the weights of all earlier ones by f in (0, 1).

    The bias of query i on key j is log f_(j+1) + ... + log f_i, with f_t = sigmoid(w x_t + b) for
    every query head, x_t being the layer's normed input (Lin et al. 2025, arXiv 2503.02130, eq. 9
    and 10). As in the paper's FoX (LLaMA) nothing is rotated. Weights start as any other Linear, b
    at 0, as in the authors' code. Memories keep log f beside keys and values, so it is exact across
    segments; sinks are never forgotten. For gates of every layer's own, as in the paper, use it in
    [layers."every 1".positional] and "none" in [positional].
    """

    name = "forgetting"
    has_bias = True
    citation = """@inproceedings{lin2025forgetting,
  title={Forgetting Transformer: Softmax Attention with a Forget Gate},
  author={Lin, Zhixuan and Nikishin, Evgenii and He, Xu Owen and Courville, Aaron},
  booktitle={ICLR}, year={2025}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.gate = nn.Linear(dims.d_model, dims.n_heads)

    def features(self, x: Tensor) -> Tensor:
        """The logarithm of the gates of x [B, N, M], [B, N, H], in float32 at least."""
        gate = self.gate(x)
        return logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))

    def block_biases(
        self, q: Tensor, keys: Sequence[KeyValue], q_positions: Tensor
    ) -> Sequence[Bias | None]:
        """Differences of a running sum of log f that is 0 right before the new segment, where it is
        the most exact.
        """
        *old, new = [log_gates(kv) for kv in keys if kv.positions is not None]
        q_terms = new.cumsum(-1)
        if not old:
            return [DifferenceBias(q_terms, q_terms)]
        later = pad(torch.cat(old, -1)[..., 1:], (0, 1))  # log f of every key's next token
        k_terms = -later.flip(-1).cumsum(-1).flip(-1)
        sizes = [gates.shape[-1] for gates in old]
        return [DifferenceBias(q_terms, terms) for terms in (*k_terms.split(sizes, -1), q_terms)]


def log_gates(block: KeyValue) -> Tensor:
    """The features of a block, [B, H, N]."""
    if block.features is None:
        raise Unsupported(
            "positional encoding 'forgetting' needs a memory that keeps KeyValue.features beside"
            " keys and values, as 'xl-cache' does"
        )
    return block.features.transpose(1, 2)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the forget gate."""
    return [Forgetting]
