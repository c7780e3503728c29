"""FlexAttention against attention by its definition and the original's numbers, as far as it runs
on a CPU: without gradients.
"""

from __future__ import annotations

from typing import Any

import lswt_flex
import original
import pytest
import torch
import torch._dynamo.config
from helpers import DIMS, distance
from lswt_flex import Flex, compiled_kernel
from test_components import ATTENTION_CASES, attention_case, one_by_one

from lswt_core.interfaces import AttentionRequirements, Unsupported

# on CUDA it is compiled
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ATTENTION_CASES,
    ids=lambda case: "-".join(f"{key}={value}" for key, value in case.items()),
)
def test_it_is_one_softmax_over_all_parts(case: dict[str, Any]) -> None:
    parts, _ = attention_case(**case)
    parts = [
        part._replace(q=part.q.detach(), k=part.k.detach(), v=part.v.detach()) for part in parts
    ]
    shared = {id(part.q): parts[-1].q for part in parts if part.q.equal(parts[-1].q)}
    parts = [part._replace(q=shared.get(id(part.q), part.q)) for part in parts]
    with torch.no_grad():
        # its CPU kernel sums in float32
        assert distance(Flex(DIMS)(parts), one_by_one(parts)) < 1e-6


@pytest.mark.parametrize("case", original.SEED_CASES)
def test_logits_are_the_originals(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(original.BACKENDS, "flex", Flex)
    assert max(original.seed_errors(case, torch.float32, "flex").values()) <= 2e-5


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device": "cpu"}, "no backward pass on cpu"),
        ({"double_backward": True}, "second derivative"),
    ],
)
def test_it_says_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Flex(DIMS).require(AttentionRequirements("cuda", torch.bfloat16, 64)._replace(**change))


def test_the_compiled_kernel_may_have_a_graph_for_every_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: options)
    with torch._dynamo.config.patch(recompile_limit=8):
        compiled_kernel.__wrapped__()
        assert torch._dynamo.config.recompile_limit > 100


def test_a_mask_that_shapes_determine_is_made_once_for_all_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    make = lswt_flex.create_block_mask

    def note(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[-1])
        return make(*arguments, **options)

    monkeypatch.setattr(lswt_flex, "create_block_mask", note)
    lswt_flex.causal_block_mask.cache_clear()
    plain = {"sinks": True, "memory": True, "bias": "no"}
    for documents, count in ((False, 1), (False, 1), (True, 2), (True, 3)):
        parts, _ = attention_case(documents=documents, **plain)  # type: ignore[arg-type]
        with torch.no_grad():
            assert distance(Flex(DIMS)(parts), one_by_one(parts)) < 1e-6
        assert len(made) == count
