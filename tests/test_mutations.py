"""Deliberate mistakes, each of which the comparisons with other authors' numbers must notice
(Sophia's are in test_sophia.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lswt_gelu
import lswt_norms
import lswt_simctg
import lswt_swiglu
import pytest
import torch
from helpers import DIMS, GOLDEN, distance
from lswt_eager import Eager
from lswt_rope import Rope
from original import seed_errors, small_errors
from safetensors.torch import load_file
from torch import Tensor, nn

from lswt_core.interfaces import Batch, Dims, KVBlock, Output


def logits() -> float:
    """The comparison of reversed positions with registers, in every pattern of calls."""
    return max(seed_errors("rev_reg5", torch.float64, "eager").values())


def ungated() -> float:
    """The comparison of the model without a gate."""
    return max(small_errors("gelu", "eager").values())


def simctg() -> float:
    """The comparison of the contrastive loss where pads are scattered."""
    golden = load_file(GOLDEN / "simctg" / "simctg.safetensors")
    ids = golden["scattered/input_ids"]
    term = lswt_simctg.SimCtg(DIMS, margin=0.5)(
        Output(golden["hidden"].double()), Batch(ids, ids, valid=ids != 1)
    )
    return distance(term.total / term.count, golden["scattered/m0.5/lswt/cl_f64"])


def swap_gate(patch: pytest.MonkeyPatch) -> None:
    """Llama's order of SwiGLU's halves."""

    def forward(self: lswt_swiglu.SwiGlu, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * nn.functional.silu(gate))

    patch.setattr(lswt_swiglu.SwiGlu, "forward", forward)


def approximate_gelu(patch: pytest.MonkeyPatch) -> None:
    """GELU by the hyperbolic tangent."""
    patch.setattr(lswt_gelu, "gelu", lambda x: nn.functional.gelu(x, approximate="tanh"))


def shrink_eps(patch: pytest.MonkeyPatch) -> None:
    """Another epsilon in the norms."""

    def forward(self: lswt_norms.LayerNorm, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, 1e-6)

    patch.setattr(lswt_norms.LayerNorm, "forward", forward)


def raise_base(patch: pytest.MonkeyPatch) -> None:
    """Frequencies from a base 0.1 % larger."""
    plain = Rope.table

    def table(self: Rope, *given: Any) -> tuple[Tensor, Tensor]:
        other = Rope(Dims(2, 1, 1, 1), base=self.base * 1.001, reversed=self.reversed)
        return plain(other, *given)

    patch.setattr(Rope, "table", table)


def attend(patch: pytest.MonkeyPatch, *, registers_first: bool, aligned: bool) -> None:
    """Attention as one causal call over all keys side by side, its mask aligned to the bottom right
    or to the top left.
    """

    def forward(self: Eager, blocks: Sequence[KVBlock]) -> Tensor:
        blocks = sorted(blocks, key=lambda block: (block.positions is None) is not registers_first)
        # [B, H, T, N]
        scores = torch.cat(
            [block.q.transpose(1, 2) @ block.k.permute(0, 2, 3, 1) for block in blocks], -1
        )
        new, old = scores.shape[-2:]
        visible = torch.ones(new, old, dtype=torch.bool).tril(old - new if aligned else 0)
        weights = (
            (scores * blocks[0].q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1)
        )
        return (weights @ torch.cat([block.v for block in blocks], 1).transpose(1, 2)).transpose(
            1, 2
        )

    patch.setattr(Eager, "forward", forward)


def call_as_the_original(patch: pytest.MonkeyPatch) -> None:
    """No mistake: registers first, the mask aligned to the bottom right."""
    attend(patch, registers_first=True, aligned=True)


def append_registers(patch: pytest.MonkeyPatch) -> None:
    """Registers after the tokens, where a causal mask hides them and shows tokens that are still to
    come.
    """
    attend(patch, registers_first=False, aligned=True)


def align_top_left(patch: pytest.MonkeyPatch) -> None:
    """A causal mask that counts keys from the left."""
    attend(patch, registers_first=True, aligned=False)


def leak_one_token(patch: pytest.MonkeyPatch) -> None:
    """A causal mask one diagonal too wide."""
    plain = KVBlock.visible

    def visible(self: KVBlock) -> Tensor | None:
        mask = plain(self)
        size = self.q.shape[1]
        return (
            torch.ones(size, size, dtype=torch.bool).tril(1) if self.causal and size > 1 else mask
        )

    patch.setattr(KVBlock, "visible", visible)


def count_the_diagonal(patch: pytest.MonkeyPatch) -> None:
    """Pairs of a token with itself in SimCTG's denominator."""
    patch.setattr(
        lswt_simctg.SimCtg, "count", lambda self, batch: self.valid(batch).sum(-1).square().sum()
    )


MISTAKES = [
    (logits, 1e-6, swap_gate),
    (logits, 1e-6, shrink_eps),
    (logits, 1e-6, raise_base),
    (logits, 1e-6, append_registers),
    (logits, 1e-6, align_top_left),
    (logits, 1e-6, leak_one_token),
    (ungated, 1e-12, approximate_gelu),
    (simctg, 1e-12, count_the_diagonal),
]


@pytest.mark.parametrize(
    "compare, tolerance, mutate", MISTAKES, ids=lambda given: getattr(given, "__name__", "")
)
def test_a_comparison_notices_a_mistake(
    compare: Callable[[], float],
    tolerance: float,
    mutate: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert compare() <= tolerance
    mutate(monkeypatch)
    assert compare() > 10 * tolerance


def test_the_mutated_attention_is_otherwise_right(monkeypatch: pytest.MonkeyPatch) -> None:
    call_as_the_original(monkeypatch)
    assert logits() <= 1e-6
