"""The loss scale of float16: gradients too small for its range are multiplied before they are
computed, and divided afterwards.
"""

from __future__ import annotations

import torch

FIRST = 2.0**16
GROWTH = 2000  # steps without an overflow after which the scale is doubled


class LossScale:
    """Doubled now and then, halved when a gradient overflows (Micikevicius et al. 2018, arXiv
    1710.03740; torch.amp.GradScaler's rule).

    A power of two, so that scaling changes no bit of what is in range. 1 and constant for every
    precision but float16.
    """

    def __init__(self, precision: torch.dtype) -> None:
        self.active = precision == torch.float16
        self.value = FIRST if self.active else 1.0
        self.steady = 0  # steps since it last changed

    def held(self) -> None:
        """A step was taken."""
        self.steady += self.active
        if self.steady == GROWTH:
            self.value, self.steady = self.value * 2, 0

    def can_give_way(self, loss: float) -> bool:
        """Whether a gradient that is not finite, beside this loss, may be the scale's doing."""
        return self.active and loss == loss and abs(loss) != float("inf") and self.value > 1

    def give_way(self) -> None:
        """A gradient overflowed."""
        self.value, self.steady = self.value / 2, 0

    def state(self) -> list[float]:
        """What a checkpoint holds."""
        return [self.value, self.steady]

    def restore(self, state: list[float]) -> None:
        """Stand where a checkpoint stood; a run that goes on in another precision begins its scale
        anew.
        """
        if self.active and state[0] > 1:
            self.value, self.steady = state[0], int(state[1])
