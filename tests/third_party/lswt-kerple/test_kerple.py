"""KERPLE's penalties and what they mean in a model."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from lswt_attention import Attention
from lswt_eager import Eager
from lswt_kerple import Kerple
from lswt_norms import LayerNorm
from lswt_pre_norm import PreNorm
from lswt_qk_norm import NoNorm
from lswt_registers import Registers
from lswt_sdpa import Sdpa
from lswt_swiglu import SwiGlu
from lswt_tied import Tied
from lswt_xl_cache import XlCache

from lswt_core.interfaces import AttentionBackend, Dims
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.model.spec import DecoderSpec, LayerSpec


def encoding(r1: list[float], r2: list[float]) -> Kerple:
    """KERPLE with these numbers, one a head."""
    made = Kerple(Dims(4 * len(r1), len(r1), 8, 1)).double()
    made.load_state_dict({"r1": torch.tensor(r1), "r2": torch.tensor(r2)})
    return made


def test_the_penalty_is_the_papers() -> None:
    bias = encoding([2.0, 0.5], [0.25, 3.0]).bias(
        torch.zeros(1, 2, 2, 4), torch.tensor([0, 1]), torch.tensor([-3, 0])
    )
    dense = bias.dense().tolist()  # [H, T, N]
    for head, (r1, r2) in enumerate([(2.0, 0.25), (0.5, 3.0)]):
        for query, key, distance in [(0, 0, 3), (0, 1, 0), (1, 0, 4), (1, 1, 1)]:
            assert dense[head][query][key] == pytest.approx(-r1 * math.log(1 + r2 * distance))


def test_what_was_learned_stays_a_penalty() -> None:
    bias = encoding([-1.0], [-1.0]).bias(
        torch.zeros(1, 1, 1, 4), torch.tensor([0]), torch.tensor([-100])
    )
    assert bias.dense().item() == pytest.approx(-0.01 * math.log(2))


def model(backend: type[AttentionBackend]) -> Decoder:
    """One layer that remembers and has registers."""
    dims = Dims(16, 4, 24, 1, vocab_size=20, d_vocab=8)
    layer = LayerSpec(
        block=PreNorm,
        mixer=Attention,
        positional=Kerple,
        has_own_positional=False,
        memories={"xl": partial(XlCache, length=32), "registers": partial(Registers, count=2)},
        attention=backend,
        qk_norm=NoNorm,
        ffn=SwiGlu,
        norm=LayerNorm,
    )
    spec = DecoderSpec(
        dims,
        trainable=True,
        head=Tied,
        positional=Kerple,
        norm=LayerNorm,
        layers=(layer,),
    )
    decoder = spec.build()
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
