"""A model's own memory in the place of transformers' key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lswt_core.plugin_api.pytree import detach_state, tree_map


class LswtCache(Cache):
    """What the memories of all layers returned last, however they look: bounded by their length,
    not by the text's.

    ``seen`` [B] counts the tokens of the text that every row ends with: no padding, and none of
    texts before it.
    """

    is_compileable = False
    is_sliding = (False,)
    is_linear = (False,)

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: Any = None
        self.seen: Tensor | None = None
        self.length = 0  # of what was read so far, padding included
        self.padded = False  # whether any of it is not seen by what comes: padding, or another text

    def advance(self, state: Any, own: Tensor | None, rows: int, length: int) -> None:
        """Take in what a call over [rows, length] tokens left; ``own`` [B] of all tokens so far
        belong to each row's text, None: the call's all do.
        """
        before = torch.zeros(rows, dtype=torch.int64) if self.seen is None else self.seen
        self.seen = before + length if own is None else own
        self.state = detach_state(state)
        self.length += length
        self.padded = self.padded or own is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens were read, padding included; more than are kept."""
        return self.length

    def get_max_length(self) -> int:
        """No text is too long."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No text is too long."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row go on with the memory of row ``beam_idx[row]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def each(self, function: Any) -> None:
        """Replace every tensor by ``function(tensor)``."""
        self.state = tree_map(function, self.state)
        self.seen = None if self.seen is None else function(self.seen)

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.length, self.padded = None, None, 0, False

    def crop(self, *_: Any) -> None:
        """Nothing can be taken back."""
        raise NotImplementedError(
            "a memory keeps no more than its length: what it has let go cannot come back (crop)"
        )

    def update(self, *_: Any, **__: Any) -> Any:
        """For models that keep keys and values layer by layer."""
        raise NotImplementedError(
            "this cache belongs to the LSWT models, which hand their memories on as a whole"
        )

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.length})"
