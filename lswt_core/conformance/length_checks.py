"""One check at a length where mistakes show that a short text hides: a scale, a mask or a table
that begins or ends at some size.
"""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.attention_checks import supports
from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, MEMORY_LENGTH, Subject
from lswt_core.conformance.tensors import (
    VOCAB_SIZE,
    max_difference,
    random_normal,
    random_tokens,
)
from lswt_core.interfaces import AttentionRequirements, KVBlock
from lswt_core.model.decoder import Decoder

LONG = 2048  # tokens
SPLIT = (200, 1024)  # where the text is split into segments
TOLERANCE = 1e-8  # in float64, over sums of thousands of terms
ONE_LAYER = DIMS._replace(n_layers=1)
WHY = (
    "a model is trained on segments of thousands of tokens; what is right for ten and wrong for a"
    " thousand shows in no other check"
)


@rule(
    "long sequences",
    ("attention",),
    why=WHY,
    fix="let nothing depend on the number of keys but the softmax over them",
    after=("reference", "in-place writes"),
)
@torch.no_grad()
def attends_to_many_keys(subject: Subject) -> None:
    """Some queries over 2,048 new and 300 remembered keys get what the definition says."""
    backend = subject.build(DIMS)
    dtype = torch.float32
    if not supports(backend, AttentionRequirements("cpu", dtype, DIMS.d_head)):
        raise SkipTest("it does not run on the CPU in float32")
    shape = (1, LONG, DIMS.n_heads, DIMS.d_head)
    q, k, v = (2 * random_normal(*shape, seed=seed, dtype=dtype) for seed in range(3))
    old_k, old_v = (2 * random_normal(1, 300, *shape[2:], seed=s, dtype=dtype) for s in (3, 4))
    old = KVBlock(q, old_k, old_v, causal=False, positions=torch.arange(-300, 0))
    new = KVBlock(q, k, v, causal=True, positions=torch.arange(LONG))
    out = backend([old, new])
    keys, values = torch.cat((old_k, k), 1).double(), torch.cat((old_v, v), 1).double()
    for query in (0, 99, 150, 300, 1023, 1500, LONG - 1):
        seen = slice(0, 300 + query + 1)
        scores = torch.einsum("hd,nhd->hn", q[0, query].double(), keys[0, seen])
        weights = (scores * DIMS.d_head**-0.5).softmax(-1)
        expected = torch.einsum("hn,nhd->hd", weights, values[0, seen])
        error = max_difference(out[0, query].double(), expected)
        require(error <= 1e-4, f"the output of query {query} of {LONG} is off by {error:.2g}")


@rule(
    "long sequences",
    ("block", "mixer", "positional", "memory", "ffn"),
    why=WHY,
    fix="let nothing depend on a length, or raise Unsupported for what is too long",
    after=("segment invariance",),
)
@torch.no_grad()
def reads_long_texts(subject: Subject) -> None:
    """A text of 2,048 tokens: no token sees a later one, and segments give what the whole does."""
    if subject.kind == "ffn" and not subject.is_stateful_ffn:
        raise SkipTest("a position-wise layer has no length")
    subject = subject.with_memory_length(LONG)
    decoder, ids = subject.decoder(ONE_LAYER), random_tokens(1, LONG)
    expected, _ = decoder(ids)
    changed = ids.clone()
    changed[:, 1500] = (ids[:, 1500] + 1) % VOCAB_SIZE
    error = max_difference(decoder(changed)[0][:, :1500], expected[:, :1500])
    require(error <= TOLERANCE, f"hidden states before token 1500 depend on it, by {error:.2g}")
    if subject.segment_dependent is None and not forgets(decoder):
        error = max_difference(read_split(decoder, ids), expected)
        require(
            error <= TOLERANCE,
            f"{LONG} tokens in segments that end at {', '.join(map(str, SPLIT))} differ from one"
            f" segment by {error:.2g}",
        )


def forgets(decoder: Decoder) -> bool:
    """Whether a long text in segments may see less than the whole: a cache shorter than it."""
    reaches = [layer.reach for layer in decoder.layers() if layer.reach is not None]
    return any(MEMORY_LENGTH <= reach < LONG for reach in reaches)


def read_split(decoder: Decoder, ids: Tensor) -> Tensor:
    """Hidden states of ids read in segments of very different length."""
    outputs, state = [], None
    for first, last in zip((0, *SPLIT), (*SPLIT, ids.shape[1]), strict=True):
        states, state = decoder(ids[:, first:last], state)
        outputs.append(states)
    return torch.cat(outputs, dim=1)
