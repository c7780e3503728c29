"""ALiBi's slopes, penalties and what they mean in a model."""

from __future__ import annotations

import pytest
import torch
from lswt_alibi import Alibi, slopes
from lswt_eager import Eager
from lswt_norms import LayerNorm
from lswt_registers import Registers
from lswt_sdpa import Sdpa
from lswt_swiglu import SwiGlu
from lswt_xl_cache import XlCache

from lswt_core.head import Vocabulary
from lswt_core.interfaces import AttentionBackend, Dims
from lswt_core.model import Attention, Block, Decoder, initialise

EIGHT = [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize(
    "n_heads, wanted",
    [(1, [2.0**-8]), (8, EIGHT), (12, [*EIGHT, 0.70710678, 0.35355339, 0.1767767, 0.08838835])],
)
def test_slopes_are_the_papers(n_heads: int, wanted: list[float]) -> None:
    assert slopes(n_heads) == pytest.approx(wanted)


def test_24_heads_take_every_other_of_32() -> None:
    assert slopes(24) == pytest.approx([*slopes(16), *slopes(32)[:16:2]])


def test_the_penalty_is_the_distance_times_the_slope() -> None:
    bias = Alibi(Dims(8, 2, 8, 1)).bias(torch.zeros(1, 2, 2, 4), torch.tensor([0, 1]), torch.tensor([-3, 0]))
    assert bias.dense()[0].flatten().tolist() == [-3 / 16, 0, -4 / 16, -1 / 16]


def model(backend: type[AttentionBackend]) -> Decoder:
    """One layer that remembers and has registers."""
    dims = Dims(16, 4, 24, 1)
    attention = Attention(dims, {"xl": XlCache(dims, length=32), "registers": Registers(dims, count=2)}, backend(dims))
    block = Block(LayerNorm(dims), attention, LayerNorm(dims), SwiGlu(dims))
    decoder = Decoder(Vocabulary(20, 8, 16), Alibi(dims), LayerNorm(dims), [block], LayerNorm(dims))
    initialise(decoder, seed=0, std=0.4)
    return decoder.double()


@pytest.mark.parametrize("backend", [Eager, Sdpa])
def test_a_text_means_the_same_however_it_is_cut(backend: type[AttentionBackend]) -> None:
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    whole, _ = model(Eager)(ids)
    states, state = [], None
    for first in range(0, 12, 5):
        found, state = model(backend)(ids[:, first : first + 5], state)
        states.append(found)
    assert (torch.cat(states, 1) - whole).abs().max() < 1e-12
