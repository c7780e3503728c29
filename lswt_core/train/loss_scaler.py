"""Dynamic loss scaling for float16: the loss is multiplied before the backward pass, so that small
gradients do not underflow, and gradients are divided afterwards.
"""

from __future__ import annotations

import math

import torch

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # updates without an overflow after which the scale is doubled


class LossScaler:
    """The loss scale: doubled after GROWTH_INTERVAL good updates, halved when a gradient overflows
    (Micikevicius et al. 2018, arXiv 1710.03740; the rule of torch.amp.GradScaler).

    Always a power of two, so that scaling is exact within float16's range. Constant 1 in every
    other precision.
    """

    def __init__(self, precision: torch.dtype) -> None:
        self.enabled = precision == torch.float16
        self.scale = INITIAL_SCALE if self.enabled else 1.0
        self.growth_tracker = 0  # updates since the scale last changed

    def update(self, *, found_inf: bool) -> None:
        """Adjust the scale after an update (``found_inf`` False) or an overflow (True)."""
        if not self.enabled:
            return
        if found_inf:
            self.scale, self.growth_tracker = self.scale / 2, 0
            return
        self.growth_tracker += 1
        if self.growth_tracker == GROWTH_INTERVAL:
            self.scale, self.growth_tracker = self.scale * 2, 0

    def explains_overflow(self, loss: float) -> bool:
        """Whether the scale may have caused a gradient that is not finite: the loss itself is
        finite, and the scale can still be lowered.
        """
        return self.enabled and math.isfinite(loss) and self.scale > 1

    def state(self) -> list[float]:
        """The scale and its growth tracker, for a checkpoint."""
        return [self.scale, self.growth_tracker]

    def load_state(self, state: list[float]) -> None:
        """Restore ``state()``. A run resumed in another precision keeps its initial scale."""
        if self.enabled and state[0] > 1:
            self.scale, self.growth_tracker = state[0], int(state[1])
