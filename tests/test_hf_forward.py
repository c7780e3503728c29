"""Forward passes and ``generate`` of the transformers classes: padding, packing, cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from helpers import distance
from hf_parts import CUT_DEPENDENT, MIXES, cache_of, every_mix, generate, ids, logits, model_of
from torch import Tensor

from lswt_core.plugin_api.pytree import tree_leaves

# ---------- forward


MASKS = {
    "left": [[0] * 5 + [1] * 7, [0] * 2 + [1] * 10, [1] * 12],
    "right": [[1] * 7 + [0] * 5, [1] * 10 + [0] * 2, [1] * 12],
    "scattered": [[1] * 3 + [0, 0, 1, 1, 0] + [1] * 4, [0] + [1] * 10 + [0], [1] * 12],
}


@every_mix
@pytest.mark.parametrize("side", MASKS)
def test_a_padded_batch_gives_what_each_row_gives_alone(mix: str, side: str) -> None:
    model, mask = model_of(mix), torch.tensor(MASKS[side])
    if mix == "stretching":
        with pytest.raises(ValueError, match="padded"):
            model(ids(), attention_mask=mask)
        return
    together = logits(model, ids(), attention_mask=mask)
    for row, valid in enumerate(mask.bool()):
        assert distance(together[row, valid], logits(model, ids()[row : row + 1, valid])[0]) < 1e-12


@every_mix
def test_labels_give_the_mean_loss_of_the_next_token(mix: str) -> None:
    model, labels = model_of(mix, torch.float32), ids().clone()
    labels[0, :6] = -100
    out = model(ids(), labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert distance(out.loss, expected) < 1e-5
    out.loss.backward()
    table = model.get_input_embeddings().weight
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )
    assert (table.grad is None) == (not model.config.recipe["embedding"]["trainable"])


def test_arguments_of_forward() -> None:
    model = model_of("family")
    whole = model(ids(), output_hidden_states=True)
    assert [tuple(state.shape) for state in whole.hidden_states] == [(3, 12, 32)] * 4
    assert whole.hidden_states[-1].equal(model.model(ids()).last_hidden_state)
    assert logits(model, inputs_embeds=model.get_input_embeddings()(ids())).equal(whole.logits)
    assert distance(logits(model, ids(), logits_to_keep=2), whole.logits[:, -2:]) < 1e-12
    assert (
        distance(logits(model, ids(), logits_to_keep=torch.tensor([0, 5])), whole.logits[:, [0, 5]])
        < 1e-12
    )
    assert model(ids(), return_dict=False)[0].equal(whole.logits)
    assert cache_of(model(ids(), use_cache=False)) is None
    for given in ({}, {"input_ids": ids(), "inputs_embeds": torch.zeros(3, 12, 24)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(**given)
    with pytest.raises(ValueError, match=r"24.*32"):
        model(inputs_embeds=torch.zeros(3, 12, 32))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids(), attention_mask=torch.ones(3, 4))
    with pytest.raises(TypeError, match="LswtCache"):
        model(ids(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in (*CUT_DEPENDENT, "no-memory")])
def test_a_text_may_be_read_in_several_calls(mix: str) -> None:
    model = model_of(mix)
    with torch.no_grad():
        first = model(ids()[:, :5], use_cache=True)
        second = model(ids()[:, 5:], past_key_values=cache_of(first))
    assert distance(torch.cat((first.logits, second.logits), 1), logits(model, ids())) < 1e-12
    assert cache_of(second).get_seq_length() == 12


def test_padding_after_cached_tokens_is_refused() -> None:
    model = model_of("family")
    begun = cache_of(model(ids(), use_cache=True))
    with pytest.raises(ValueError, match="middle"):
        model(
            ids(3, 2), attention_mask=torch.tensor([[0, 1], [1, 1], [1, 1]]), past_key_values=begun
        )


# ---------- packed


def counted(*lengths: int) -> Tensor:
    """Positions of texts of some lengths, one after the other."""
    return torch.cat([torch.arange(length) for length in lengths])


PACKED = [(4, 8), (12,), (1, 1, 7, 3)]


@every_mix
def test_packed_texts_give_what_each_gives_alone(mix: str) -> None:
    model, positions = model_of(mix), torch.stack([counted(*lengths) for lengths in PACKED])
    if mix in ("stretching", "reference-reversed"):
        with pytest.raises(ValueError, match="several texts"):
            model(ids(), position_ids=positions)
        return
    together = logits(model, ids(), position_ids=positions)
    for row, lengths in enumerate(PACKED):
        texts = ids()[row].split(lengths)
        alone = torch.cat([logits(model, text[None])[0] for text in texts])
        assert distance(together[row], alone) < 1e-12
    assert distance(together, logits(model, ids())) > 1e-3


@pytest.mark.parametrize("side", MASKS)
def test_packed_rows_can_be_padded(side: str) -> None:
    model, mask = model_of("family"), torch.tensor(MASKS[side])
    positions = torch.full_like(mask, 1)  # as transformers 4 writes it at padding
    for row, valid in enumerate(mask.bool()):
        positions[row, valid] = counted(3, int(valid.sum()) - 3)
    together = logits(model, ids(), attention_mask=mask, position_ids=positions)
    for row, valid in enumerate(mask.bool()):
        texts = ids()[row, valid].tensor_split([3])
        alone = torch.cat([logits(model, text[None])[0] for text in texts])
        assert distance(together[row, valid], alone) < 1e-12


@pytest.mark.parametrize("mix", ["family", "window", "xl-hidden", "alibi", "xpos"])
def test_a_packed_row_continues_its_last_text(mix: str) -> None:
    model = model_of(mix)
    with torch.no_grad():
        cache = cache_of(model(ids()[:1], position_ids=counted(5, 7)[None], use_cache=True))
        states = [copy.deepcopy(cache) for _ in range(4)]
        positions_given = (
            None,
            counted(10)[None, 7:],
            counted(15)[None, 12:],
            torch.tensor([[7, 0, 1]]),
        )
        actual = [
            logits(model, ids()[1:2, :3], position_ids=positions, past_key_values=one)
            for positions, one in zip(positions_given, states, strict=True)
        ]
    expected = logits(model, torch.cat((ids()[0, 5:], ids()[1, :3]))[None])[:, 7:]
    assert all(distance(one, expected) < 1e-12 for one in actual[:3])
    assert distance(actual[3][:, :1], expected[:, :1]) < 1e-12
    assert distance(actual[3][:, 1:], logits(model, ids()[1:2, 1:3])) < 1e-12


def test_default_position_ids_change_nothing() -> None:
    model = model_of("family", torch.float32)
    plain, mask = logits(model, ids()), torch.tensor(MASKS["left"])
    assert logits(model, ids(), position_ids=torch.arange(12)[None]).equal(plain)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    assert logits(model, ids(), attention_mask=mask, position_ids=position_ids).equal(
        logits(model, ids(), attention_mask=mask)
    )


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12], "from 10 to 12"),
        ([0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8], "from 5 to 3"),
        ([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "from 1 to 1"),
        ([*range(2, 14)], "begin at 2, not 0"),
        ([*range(-1, 11)], "begin at -1, not 0"),
        ([*range(11)], r"must be \[3, 12\], not \[1, 11\]"),
    ],
)
def test_invalid_position_ids_are_refused(positions: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_of("family")(ids(), position_ids=torch.tensor([positions]))


def test_position_ids_must_continue_the_cache() -> None:
    model = model_of("family")
    cache = cache_of(model(ids(), use_cache=True))
    for first in (0, 11, 13):
        with pytest.raises(ValueError, match=f"begin at {first}, not 12"):
            model(
                ids(3, 2),
                position_ids=torch.arange(first, first + 2)[None],
                past_key_values=copy.deepcopy(cache),
            )


@pytest.mark.parametrize(
    "name",
    [
        "token_type_ids",
        "head_mask",
        "cu_seq_lens_q",
        "output_attentions",
        "is_causal",
        "atention_mask",
    ],
)
def test_unknown_arguments_are_refused(name: str) -> None:
    value = {"output_attentions": True, "is_causal": False}.get(name, torch.ones(3, 12))
    model = model_of("family")
    for one in (model, model.model):
        with pytest.raises(TypeError, match=name):
            one(ids(), **{name: value})


def test_arguments_that_transformers_passes_along_are_accepted() -> None:
    model = model_of("family", torch.float32)
    plain = model(ids(), labels=ids())
    nothing = {
        "output_attentions": False,
        "is_causal": True,
        "cache_position": torch.arange(12),
        "head_mask": None,
    }
    output = model(ids(), labels=ids(), num_items_in_batch=torch.tensor(66), **nothing)
    assert output.logits.equal(plain.logits) and distance(output.loss, plain.loss / 2) < 1e-6


# ---------- generate


def chosen_slowly(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """Greedy search with a full forward pass at every step."""
    for _ in range(tokens):
        prompt = torch.cat((prompt, logits(model, prompt, use_cache=False)[:, -1:].argmax(-1)), 1)
    return prompt


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in CUT_DEPENDENT])
@pytest.mark.parametrize("search", SEARCHES)
def test_the_memory_serves_as_cache(mix: str, search: str) -> None:
    model, generated = model_of(mix), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        generated.append(generate(model, ids(), use_cache=use_cache, **SEARCHES[search]))
    assert (
        generated[0].equal(generated[1]) and len(set(generated[0][:, 12:].flatten().tolist())) > 4
    )
    if search == "greedy":
        assert generated[0].equal(chosen_slowly(model, ids(), 10))


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in ("stretching", "compressing")])
def test_left_padded_rows_generate_as_each_alone(mix: str) -> None:
    model, mask = model_of(mix), torch.tensor(MASKS["left"])
    together = generate(model, ids(), attention_mask=mask)
    for row, valid in enumerate(mask.bool()):
        assert together[row, 12:].equal(
            generate(model, ids()[row : row + 1, valid])[0, int(valid.sum()) :]
        )


def test_padded_rows_are_refused_once_a_memory_groups_tokens() -> None:
    model, short = model_of("compressing"), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    # the last is not read
    together = generate(model, ids(2, 4), attention_mask=short, max_new_tokens=3)
    assert together[0, 4:].equal(generate(model, ids(2, 4)[:1, 2:], max_new_tokens=3)[0, 2:])
    with pytest.raises(
        ValueError,
        match=r"'compressed'.* 6 tokens",
    ):
        generate(model, ids(2, 4), attention_mask=short, max_new_tokens=5)
    generate(model, ids(2, 4), attention_mask=torch.ones_like(short), max_new_tokens=9)


def test_the_cache_is_bounded_by_the_memory_length() -> None:
    model = model_of("short-memory")
    out = generate(model, ids(), max_new_tokens=20, return_dict_in_generate=True)
    cache = cache_of(out)
    assert cache.get_seq_length() == 31
    assert {tensor.shape[1] for tensor in tree_leaves(cache.state)} == {5}
    prompt = cache_of(model(ids(1, 80), use_cache=True))
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tree_leaves(prompt.state)
    )


def test_other_generation_modes() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.put_ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.put_ids += value.flatten().tolist()

        def end(self) -> None:
            self.put_ids.append(-1)

    model, streamer = model_of("family"), Streamer()
    plain = generate(model, ids()[:1])
    generate(model, ids()[:1], streamer=streamer)
    assert streamer.put_ids == [*plain[0].tolist(), -1]
    embeds = model.get_input_embeddings()(ids()[:1])
    assert model.generate(
        inputs_embeds=embeds, max_new_tokens=10, do_sample=False, eos_token_id=None
    ).equal(plain[:, 12:])
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids()[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache of its own"):
        generate(model, ids()[:1], cache_implementation="static")


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="generate() does not count given positions on"
)
def test_a_packed_row_generates_as_its_last_text() -> None:
    model = model_of("family")
    packed = generate(model, ids()[:1], position_ids=counted(5, 7)[None])
    assert packed[:, 12:].equal(generate(model, ids()[:1, 5:])[:, 7:])


def test_cache_rows_can_be_selected_and_repeated() -> None:
    model = model_of("family")
    with torch.no_grad():
        cache = cache_of(model(ids(), use_cache=True))
        doubled = copy.deepcopy(cache)
        doubled.batch_repeat_interleave(2)
        doubled.batch_select_indices(torch.tensor([0, 3, 5]))
        one, other = (logits(model, ids(3, 1), past_key_values=given) for given in (cache, doubled))
    assert distance(one, other) < 1e-12
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.state is None
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(3)
