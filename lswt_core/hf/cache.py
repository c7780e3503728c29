"""The state of the model's memories as a transformers cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lswt_core.plugin_api.pytree import detach_state, tree_map


class LswtCache(Cache):
    """The state that the memories of all layers returned last, of whatever structure. Its size is
    bounded by the memories' length, not by the text's.

    ``text_length`` [B] counts the tokens of the text that every row ends with, without padding and
    without earlier texts of a packed row.
    """

    is_compileable = False
    is_sliding = (False,)
    is_linear = (False,)

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: Any = None
        self.text_length: Tensor | None = None
        self.length = 0  # tokens read so far, padding included
        self.has_masked_tokens = False  # whether padding or earlier texts were read

    def advance(self, state: Any, text_length: Tensor | None, rows: int, length: int) -> None:
        """Store the memories' state after a call over [rows, length] tokens. ``text_length`` [B] is
        that of each row's last text; None: all tokens of the call belong to it.
        """
        if text_length is None:
            before = self.text_length
            if before is None:
                before = torch.zeros(rows, dtype=torch.int64)
            self.text_length = before + length
        else:
            self.text_length = text_length
            self.has_masked_tokens = True
        self.state = detach_state(state)
        self.length += length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were read, padding included; the memories may keep fewer."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace every row by row ``beam_idx[row]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.map_tensors(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map_tensors(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``function(tensor)``."""
        self.state = tree_map(function, self.state)
        if self.text_length is not None:
            self.text_length = function(self.text_length)

    def reset(self) -> None:
        """Empty the cache."""
        self.state, self.text_length = None, None
        self.length, self.has_masked_tokens = 0, False

    def crop(self, *_: Any) -> None:
        """Raise NotImplementedError: tokens that left the memory cannot come back."""
        raise NotImplementedError(
            "crop: the memories keep only the last tokens, so earlier ones cannot be restored"
        )

    def update(self, *_: Any, **__: Any) -> Any:
        """Raise NotImplementedError: the state is stored as a whole, not per layer."""
        raise NotImplementedError(
            "update: this cache stores the state of all memories at once and belongs to the LSWT"
            " models"
        )

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.length})"
