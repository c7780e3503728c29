"""Exported models called as transformers calls its own: padded, with memory, generated from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import distance
from hf_parts import CUT_DEPENDENT, MIXES, cache_of, every_mix, generate, ids, logits, model_of
from torch import Tensor

from lswt_core.tree import tensors

# --------------------------------------------------------------------------------------------------------------- forward


MASKS = {
    "left": [[0] * 5 + [1] * 7, [0] * 2 + [1] * 10, [1] * 12],
    "right": [[1] * 7 + [0] * 5, [1] * 10 + [0] * 2, [1] * 12],
    "scattered": [[1] * 3 + [0, 0, 1, 1, 0] + [1] * 4, [0] + [1] * 10 + [0], [1] * 12],
}


@every_mix
@pytest.mark.parametrize("side", MASKS)
def test_a_padded_batch_is_its_rows_alone(mix: str, side: str) -> None:
    model, mask = model_of(mix), torch.tensor(MASKS[side])
    if mix == "stretching":
        with pytest.raises(ValueError, match="a padded batch would not be what its rows are alone"):
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
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert distance(out.loss, wanted) < 1e-5
    out.loss.backward()
    table = model.get_input_embeddings().weight
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad) and (table.grad is None) == (
        mix == "frozen"
    )


def test_the_ways_to_ask() -> None:
    model = model_of("family")
    whole = model(ids(), output_hidden_states=True)
    assert [tuple(state.shape) for state in whole.hidden_states] == [(3, 12, 32)] * 4
    assert whole.hidden_states[-1].equal(model.model(ids()).last_hidden_state)
    assert logits(model, inputs_embeds=model.get_input_embeddings()(ids())).equal(whole.logits)
    assert distance(logits(model, ids(), logits_to_keep=2), whole.logits[:, -2:]) < 1e-12
    assert distance(logits(model, ids(), logits_to_keep=torch.tensor([0, 5])), whole.logits[:, [0, 5]]) < 1e-12
    assert model(ids(), return_dict=False)[0].equal(whole.logits) and cache_of(model(ids(), use_cache=False)) is None
    for given in ({}, {"input_ids": ids(), "inputs_embeds": torch.zeros(3, 12, 24)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given)
    with pytest.raises(ValueError, match="24 wide, not 32"):
        model(inputs_embeds=torch.zeros(3, 12, 32))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids(), attention_mask=torch.ones(3, 4))
    with pytest.raises(TypeError, match="must be an LswtCache"):
        model(ids(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in (*CUT_DEPENDENT, "no-memory")])
def test_a_text_may_be_read_in_several_calls(mix: str) -> None:
    model = model_of(mix)
    with torch.no_grad():
        first = model(ids()[:, :5], use_cache=True)
        second = model(ids()[:, 5:], past_key_values=cache_of(first))
    assert distance(torch.cat((first.logits, second.logits), 1), logits(model, ids())) < 1e-12
    assert cache_of(second).get_seq_length() == 12


def test_padding_inside_of_a_text_that_goes_on_is_refused() -> None:
    model = model_of("family")
    begun = cache_of(model(ids(), use_cache=True))
    with pytest.raises(ValueError, match="padding in the middle of a text"):
        model(ids(3, 2), attention_mask=torch.tensor([[0, 1], [1, 1], [1, 1]]), past_key_values=begun)


# -------------------------------------------------------------------------------------------------------------- generate


def chosen_slowly(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The likeliest token after all so far, from the whole text at every step."""
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
    model, found = model_of(mix), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(generate(model, ids(), use_cache=use_cache, **SEARCHES[search]))
    assert found[0].equal(found[1]) and len(set(found[0][:, 12:].flatten().tolist())) > 4
    if search == "greedy":
        assert found[0].equal(chosen_slowly(model, ids(), 10))


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in ("stretching", "compressing")])
def test_left_padded_rows_generate_as_alone(mix: str) -> None:
    model, mask = model_of(mix), torch.tensor(MASKS["left"])
    together = generate(model, ids(), attention_mask=mask)
    for row, valid in enumerate(mask.bool()):
        assert together[row, 12:].equal(generate(model, ids()[row : row + 1, valid])[0, int(valid.sum()) :])


def test_padded_rows_go_on_until_blocks_would_be_cut_through_their_padding() -> None:
    model, short = model_of("compressing"), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    together = generate(model, ids(2, 4), attention_mask=short, max_new_tokens=3)  # the last is not read
    assert together[0, 4:].equal(generate(model, ids(2, 4)[:1, 2:], max_new_tokens=3)[0, 2:])
    with pytest.raises(ValueError, match="'compressed' a padded batch of more than 6 tokens cannot go on"):
        generate(model, ids(2, 4), attention_mask=short, max_new_tokens=5)
    generate(model, ids(2, 4), attention_mask=torch.ones_like(short), max_new_tokens=9)


def test_what_is_kept_is_bounded_by_the_memory() -> None:
    model = model_of("short-memory")
    out = generate(model, ids(), max_new_tokens=20, return_dict_in_generate=True)
    cache = cache_of(out)
    assert cache.get_seq_length() == 31 and {tensor.shape[1] for tensor in tensors(cache.state)} == {5}
    prompt = cache_of(model(ids(1, 80), use_cache=True))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors(prompt.state))


def test_generating_in_other_ways() -> None:
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
    assert model.generate(inputs_embeds=embeds, max_new_tokens=10, do_sample=False, eos_token_id=None).equal(plain[:, 12:])
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids()[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="remembers by its own memories"):
        generate(model, ids()[:1], cache_implementation="static")


def test_a_cache_follows_its_rows() -> None:
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
