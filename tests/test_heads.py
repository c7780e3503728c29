"""Heads of one and two tables, and capped logits, against the formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import distance, tiny
from hf_parts import config_of, ids, model_of
from lswt_cross_entropy import Chunked
from lswt_soft_cap import SoftCapped
from lswt_tied import Tied
from lswt_untied import Untied
from test_head import Way, dims_of, every_way, states_and_labels
from torch import Tensor
from torch.nn.functional import cross_entropy

from lswt_core import LswtForCausalLM
from lswt_core.errors import Incompatible
from lswt_core.interfaces import IGNORE, CrossEntropyOutput, LabelSampling
from lswt_core.model.build import check_cross_entropy
from lswt_core.model.initialise import initialise
from lswt_core.model.parameters import build_parameter_groups, count_parameters
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy
from lswt_core.plugin_api.lm_head import LMHead

CAP = 1.3  # of logits that reach 4


def head_of(build: Any, dtype: torch.dtype = torch.float64) -> LMHead:
    """A small head with numbers."""
    head: LMHead = build(dims_of())
    initialise(head, seed=0, std=0.8)
    return head.to(dtype)


def plain_logits(head: LMHead, states: Tensor, cap: float | None) -> Tensor:
    """Logits [B*T, V] as the paper says them."""
    table = head.unembedding.weight if isinstance(head, Untied) else head.table.weight
    logits = states.flatten(0, 1) @ head.output.weight.T @ table.T
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_scores(head: LMHead, states: Tensor, labels: Tensor, uniforms: Tensor) -> Any:
    """Total, sampled total and logsumexp of capped logits, by torch's autograd."""
    logits, kept = plain_logits(head, states, CAP), labels.flatten() != IGNORE
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    drawn = (cumulative <= uniforms.flatten()[:, None]).sum(-1).masked_fill(~kept, IGNORE)
    score = partial(cross_entropy, logits, ignore_index=IGNORE, reduction="sum")
    return score(labels.flatten()), score(drawn), (logits.logsumexp(-1) * kept).view_as(labels)


HEADS = {"tied": partial(SoftCapped, cap=CAP), "untied": partial(Untied, soft_cap=CAP)}


@every_way
@pytest.mark.parametrize("build", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("trainable", [False, True])
def test_capped_logits_are_scored_sampled_and_differentiated(
    way: Way, build: Any, trainable: bool
) -> None:
    if not way.build().takes_soft_cap:
        pytest.skip("Triton's interpreter runs no kernel that calls tanh")
    head, (states, labels) = head_of(build, way.dtype), way.states_and_labels()
    for table in head.pretrained_tables():
        table.requires_grad_(trainable)
    uniforms = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))
    score = head.score(states, labels, LabelSampling(uniforms), by=way.build(), logsumexp=True)
    outputs = (score.total, score.sampled, score.logsumexp)
    expected = plain_scores(head, states, labels, uniforms)
    weights = [states, *(p for p in head.parameters() if p.requires_grad)]

    def gradients(terms: Any) -> list[Tensor]:
        alone = [terms[0], terms[1], terms[2].square().sum()]
        losses = [*alone, 0.3 * alone[0] + 0.7 * alone[1] + alone[2]]
        grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
        # copies: Liger scales its own in place when the graph is differentiated again
        return [one.clone() for loss in losses for one in grad(loss, weights)]

    assert all(way.near(a, b) for a, b in zip(outputs, expected, strict=True))
    loose = way._replace(off=10 * way.off)
    for a, b in zip(gradients(outputs), gradients(expected), strict=True):
        assert loose.near(a, b)
    assert distance(head.logits(states).flatten(0, 1), plain_logits(head, states, CAP)) < 1e-5
    hits = head.logits(states).argmax(-1) == labels
    assert int(score.correct) == int(hits.sum())


def test_the_cap_changes_what_is_sampled() -> None:
    head, (states, labels) = head_of(HEADS["tied"]), states_and_labels()
    uniforms = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))
    capped, head.soft_cap = head.score(states, labels, LabelSampling(uniforms)), None
    plain = head.score(states, labels, LabelSampling(uniforms))
    assert capped.drawn is not None and plain.drawn is not None
    assert not capped.drawn.equal(plain.drawn)


def test_a_cap_far_away_is_none() -> None:
    (states, labels), one = states_and_labels(), head_of(Tied)
    other = head_of(partial(SoftCapped, cap=1e8))
    assert distance(one.logits(states), other.logits(states)) < 1e-6
    assert distance(one.score(states, labels).total, other.score(states, labels).total) < 1e-6
    assert bool((head_of(HEADS["tied"]).logits(100 * states).abs() <= CAP).all())


def test_a_compiled_chunk_caps_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    head, (states, labels) = head_of(HEADS["tied"]), states_and_labels()
    draws = LabelSampling(torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)))
    plain, fused = Chunked(chunk=13), Chunked(chunk=13)
    fused.compile_kernels()
    pairs = []
    for by in (plain, fused):
        score = head.score(states, labels, draws, by=by, logsumexp=True)
        assert score.sampled is not None and score.logsumexp is not None
        total = score.total + 0.3 * score.sampled + score.logsumexp.square().sum()
        pairs.append([total, *torch.autograd.grad(total, [states, head.table.weight])])
    assert all(distance(a, b) < 1e-11 for a, b in zip(*pairs, strict=True))


def test_capped_dense_scores_have_right_second_derivatives() -> None:
    head, (states, labels) = head_of(HEADS["tied"]), states_and_labels(1, 3)
    assert torch.autograd.gradgradcheck(
        lambda states: head.score(states, labels, by=dense_cross_entropy).total, [states]
    )


class Unaware(Chunked):
    """A cross-entropy from before there were caps."""

    takes_soft_cap = False

    def forward(  # type: ignore[override]
        self, z: Tensor, table: Tensor, labels: Tensor, draws: Any = None, *, logsumexp: bool
    ) -> CrossEntropyOutput:
        return super().forward(z, table, labels, draws, logsumexp=logsumexp)


def test_a_cross_entropy_without_caps_is_refused_by_heads_that_need_one() -> None:
    cpu, (states, labels) = torch.device("cpu"), states_and_labels()
    check_cross_entropy(Unaware(), head_of(Tied), cpu)
    assert head_of(Tied).score(states, labels, by=Unaware()).total > 0
    with pytest.raises(Incompatible, match=r"'soft-cap' caps logits at 1\.3"):
        check_cross_entropy(Unaware(), head_of(HEADS["tied"]), cpu)


# ---------- two tables


def test_untied_is_the_tied_head_where_both_tables_are_one() -> None:
    one, other, (states, labels) = head_of(Tied), head_of(Untied), states_and_labels()
    for name, parameter in one.named_parameters():
        assert dict(other.named_parameters())[name].equal(parameter), "initial values are shared"
    assert not other.unembedding.weight.equal(other.table.weight)
    other.unembedding.weight.data.copy_(one.table.weight)
    assert other.logits(states).equal(one.logits(states))
    assert other.score(states, labels).total.equal(one.score(states, labels).total)
    other.score(states, labels).total.backward()
    assert other.table.weight.grad is None and other.unembedding.weight.grad is not None


def test_freezing_is_of_the_input_alone() -> None:
    head = head_of(Untied)
    head.freeze()
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert trained == {"input.weight", "output.weight", "unembedding.weight"}


def test_a_wrapped_output_layer_is_scored_by_what_it_returns() -> None:
    head, (states, labels) = head_of(Untied), states_and_labels()
    head.unembedding.register_forward_hook(lambda module, args, out: 2 * out)
    logits = head.logits(states).flatten(0, 1)
    expected = cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert distance(head.score(states, labels).total, expected) < 1e-10


def test_the_output_table_is_grouped_as_the_tied_one() -> None:
    decoder = tiny(head=Untied)
    groups = {name: group for group in build_parameter_groups(decoder) for name in group["names"]}
    name = "vocabulary.unembedding.weight"
    assert groups[name]["weight_decay"] == 0.0 and name not in groups[name]["matrices"]
    owners = count_parameters(decoder)["by_component"]
    assert owners["head.untied"] == owners["embedding"] == decoder.vocabulary.table.weight.numel()


# ---------- transformers


@pytest.mark.parametrize("mix", ["untied", "soft-cap"])
def test_transformers_computes_the_same_loss(mix: str) -> None:
    model, given = model_of(mix), ids()
    states, _ = model.model.decoder(given[:, :-1])
    ours = model.model.decoder.vocabulary.score(states, given[:, 1:])
    loss = model(given, labels=given).loss
    assert float(loss.detach()) == pytest.approx(
        float(ours.total.detach()) / given[:, 1:].numel(), rel=1e-6
    )


def test_transformers_knows_and_resizes_both_tables() -> None:
    model = model_of("untied", torch.float32)
    head = model.model.decoder.vocabulary
    assert model.get_output_embeddings() is head.unembedding
    assert not model.config.tie_word_embeddings
    before, given = model(ids()).logits, ids()
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(given).logits
    assert after.shape[-1] == 70 and after[..., :61].equal(before)
    assert head.table.weight.shape == head.unembedding.weight.shape == (70, 24)
    assert model_of("family").get_output_embeddings() is None
    assert isinstance(LswtForCausalLM(config_of("untied")).get_output_embeddings(), torch.nn.Linear)
