"""For mixers whose heads are not as wide as the layer's: a positional encoding of their own."""

from __future__ import annotations

from lswt_core.interfaces import Dims, MixerParts, PositionalEncoding, Unsupported


def own_encoding(mixer: str, parts: MixerParts, dims: Dims) -> PositionalEncoding:
    """The layer's positional encoding, built for heads of ``dims``, as an instance of the mixer's
    own (``SoftmaxAttention.positional``).

    Raises Unsupported for an encoding with parameters, which would be trained in the mixer only
    while the layer's own lay idle, and for one that reads the layer's inputs.
    """
    encoding = parts.positional(dims)
    reason = None
    if any(True for _ in encoding.parameters()):
        reason = "it has parameters"
    elif type(encoding).features is not PositionalEncoding.features:
        reason = "it reads the layer's inputs"
    elif type(encoding).block_biases is not PositionalEncoding.block_biases:
        reason = "it needs all keys for its bias"
    if reason is not None:
        raise Unsupported(
            f"{mixer} builds its positional encoding for heads of another width, which"
            f" {encoding.name!r} does not allow: {reason}; use rope, alibi or none"
        )
    return encoding
