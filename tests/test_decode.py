"""Decoding methods against full forward passes: the KV cache changes no token."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from helpers import DIMS, VOCAB, distance, slow_unless, tiny, tokens
from lswt_alibi import Alibi
from lswt_blocked import Blocked
from lswt_blocks import HyperConnections
from lswt_bytes import Bytes
from lswt_compressed import Compressed
from lswt_forgetting import Forgetting
from lswt_moe import MixtureOfExperts
from lswt_registers import Registers
from lswt_rope import Rope, XPos
from lswt_rope.log_n import LogN
from lswt_sinks import SinkLogit, SoftmaxOffByOne
from lswt_token_shift import TokenShift
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from softmax_parts import MIXERS
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import cosine_similarity

from lswt_core.decode import (
    CachedSequence,
    Contrastive,
    DecodingMethod,
    Greedy,
    InferenceEngine,
    Sample,
    build_method,
    contrastive_score,
    generate,
    generate_batch,
    stream_text,
)
from lswt_core.decode.cuda_graph import DecodeStep, fixed_shapes
from lswt_core.decode.rolling_kv_cache import RollingKVCache, inference_copy
from lswt_core.decode.sampling import top_candidates
from lswt_core.device import Precision
from lswt_core.errors import NumericsError, UsageError
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import tree_leaves

PRECISE = Precision(torch.float32, "no autocast: the decoders are float64")
CONTEXT = 8  # shorter than prompts and texts, which are read in several segments
PROMPT = tokens(1, 11, seed=5)[0].tolist()


def registers(dims: Any) -> Registers:
    return Registers(dims, count=3)


def xl(dims: Any) -> XlCache:
    return XlCache(dims, length=64)


def window(dims: Any) -> SlidingWindow:
    return SlidingWindow(dims, length=5)


def hidden(dims: Any) -> XlHidden:
    return XlHidden(dims, length=64)


def compressed(dims: Any) -> Compressed:
    return Compressed(dims, length=64, slots=4, rate=3)


def forward(dims: Any) -> Rope:
    return Rope(dims, reversed=False)


def log_n(dims: Any) -> LogN:
    return LogN(dims, trained_length=8)


MODELS: dict[str, dict[str, Any]] = {
    "xl-reversed": {"memories": {"xl": xl}},
    "xl-forward": {"memories": {"xl": xl}, "positional": forward},
    "registers-xl-reversed": {"memories": {"registers": registers, "xl": xl}},
    "registers-xl-forward": {"memories": {"registers": registers, "xl": xl}, "positional": forward},
    "window": {"memories": {"registers": registers, "xl": window}},
    "hidden-logit": {"memories": {"xl": hidden, "sink": SinkLogit}},
    "compressed-one": {"memories": {"sink": SoftmaxOffByOne, "xl": compressed}},
    "grouped": {
        "dims": DIMS._replace(n_heads=4, queries_per_kv=2),
        "memories": {"registers": registers, "sink": SinkLogit, "xl": xl},
    },
    "log-n": {"memories": {"registers": registers, "xl": xl}, "positional": log_n},
    "forgetting": {"memories": {"registers": registers, "xl": xl}, "positional": Forgetting},
    "registers-alone": {"memories": {"registers": registers}},
    "no-memory": {},
    "latent": {"memories": {"xl": hidden}, "mixer": MIXERS["latent"]},
    **{
        name: {"memories": {"registers": registers, "xl": xl}, "mixer": MIXERS[name]}
        for name in ("gated", "differential", "value residual", "cross-layer")
    },
    "streams-shift": {"memories": {"xl": xl}, "block": HyperConnections, "ffn": TokenShift},
    "experts": {"memories": {"xl": xl}, "ffn": MixtureOfExperts},
}
every_model = pytest.mark.parametrize("parts", MODELS.values(), ids=MODELS)


def reader(decoder: Decoder, seq_len: int = CONTEXT) -> InferenceEngine:
    return InferenceEngine(decoder, PRECISE, seq_len)


def write(
    decoder: Decoder, method: DecodingMethod, count: int = 20, seq_len: int = CONTEXT
) -> list[int]:
    return list(generate(reader(decoder, seq_len), PROMPT, method, max_new_tokens=count))


def whole(decoder: Decoder, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden states [T, M] and logits [T, V] of a text by one forward pass without cache."""
    with torch.no_grad():
        states, _ = decoder(torch.tensor([ids]))
        return states[0], decoder.vocabulary.logits(states)[0]


def slow(decoder: Decoder, choose: Callable[[list[int]], int], count: int = 20) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(choose(ids))
    return ids[len(PROMPT) :]


def likeliest(decoder: Decoder, ids: list[int]) -> int:
    return int(whole(decoder, ids)[1][-1].argmax())


def similarity(decoder: Decoder, ids: list[int]) -> Tensor:
    """The largest cosine [V] of every possible next state with those before it, all of them
    computed anew.
    """
    with torch.no_grad():
        states, _ = decoder(torch.tensor([[*ids, v] for v in range(VOCAB)]))
    return cosine_similarity(states[:, :-1], states[:, -1:], dim=-1).amax(-1)


def search(decoder: Decoder, ids: list[int], k: int, alpha: float) -> int:
    """Su et al. 2022, eq. 5."""
    p = whole(decoder, ids)[1][-1].softmax(-1)
    scores = (1 - alpha) * p - alpha * similarity(decoder, ids)
    return max(sorted(p.topk(k).indices.tolist()), key=lambda v: float(scores[v]))


@every_model
@pytest.mark.parametrize("seed", slow_unless([0], range(3)))
@pytest.mark.parametrize(("k", "alpha"), [(5, 0.6), (3, 0.2), (VOCAB, 0.9)])
def test_contrastive_search_is_its_definition(
    parts: dict[str, Any], seed: int, k: int, alpha: float
) -> None:
    decoder, seq_len = (
        tiny(seed=seed, **parts),
        CONTEXT if "xl" in parts.get("memories", {}) else 64,
    )
    generated = write(decoder, Contrastive(top_k=k, alpha=alpha), seq_len=seq_len)
    assert generated == slow(decoder, lambda ids: search(decoder, ids, k, alpha))
    assert generated == write(decoder, Contrastive(top_k=k, alpha=alpha), seq_len=seq_len)


def test_contrastive_search_is_not_greedy() -> None:
    decoder = tiny(memories={"xl": xl})
    assert write(decoder, Contrastive(top_k=5, alpha=0.6)) != write(decoder, Greedy())


@every_model
def test_contrastive_search_is_greedy_if_alpha_is_0_or_top_k_is_1(parts: dict[str, Any]) -> None:
    decoder = tiny(**parts)
    expected = slow(decoder, lambda ids: likeliest(decoder, ids))
    assert write(decoder, Greedy(), seq_len=64) == expected
    assert write(decoder, Contrastive(top_k=8, alpha=0.0), seq_len=64) == expected
    assert write(decoder, Contrastive(top_k=1, alpha=0.7), seq_len=64) == expected
    # not by the shortcut
    assert write(decoder, Contrastive(top_k=8, alpha=1e-12), seq_len=64) == expected
    assert write(decoder, Sample(temperature=0), seq_len=64) == expected


def test_contrastive_search_with_alpha_1_takes_the_least_similar_token() -> None:
    decoder = tiny(memories={"registers": registers, "xl": xl})

    assert write(decoder, Contrastive(top_k=10 * VOCAB, alpha=1.0)) == slow(
        decoder, lambda ids: int(similarity(decoder, ids).argmin())
    )


def test_contrastive_scores_match_a_worked_example() -> None:
    scores = contrastive_score(
        torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.9, 0.1, 0.4]).double(), 0.6
    )
    assert scores.tolist() == pytest.approx([-0.34, 0.06, -0.16], abs=1e-7)
    assert int(scores.argmax()) == 1


def test_top_candidates_break_ties_by_the_lowest_ids() -> None:
    p, ids = top_candidates(torch.tensor([[0.0, 2.0, 1.0, 3.0, 1.0, 1.0]]), 4)
    assert ids.tolist() == [[1, 2, 3, 4]]
    assert p.equal(torch.tensor([[0.0, 2.0, 1.0, 3.0, 1.0, 1.0]]).softmax(-1)[:, [1, 2, 3, 4]])


@pytest.mark.parametrize(
    "method", [Greedy(), Contrastive(top_k=4, alpha=0.5)], ids=["greedy", "contrastive"]
)
def test_methods_break_ties_by_the_lowest_id(method: DecodingMethod) -> None:
    decoder = tiny(memories={"xl": xl})
    with torch.no_grad():
        decoder.vocabulary.table.weight.zero_()  # tokens cannot be told apart
    assert write(decoder, method) == [0] * 20


@pytest.mark.parametrize(
    "method", [Greedy(), Contrastive(top_k=5, alpha=0.6)], ids=["greedy", "contrastive"]
)
@every_model
def test_a_batch_decodes_each_row_as_alone(parts: dict[str, Any], method: DecodingMethod) -> None:
    decoder, prompts = tiny(**parts), tokens(3, 6)
    together = torch.stack(list(islice(method(reader(decoder), prompts), 12)), dim=1)
    for row, prompt in zip(together.tolist(), prompts.tolist(), strict=True):
        assert row == list(generate(reader(decoder), prompt, method, max_new_tokens=12))


@pytest.mark.parametrize(
    "memories", [{}, {"registers": registers}], ids=["no-memory", "registers-alone"]
)
def test_without_memory_the_last_tokens_are_recomputed(memories: dict[str, Any]) -> None:
    """Every state is that of a full forward over the last ``context`` tokens, however the text
    arrives.
    """
    decoder, text = tiny(memories=memories), tokens(1, 30)
    read, past = reader(decoder), None
    for first, last in [(0, 3), (3, 4), (4, 5), (5, 12), (12, 13), (13, 30)]:
        states, past = read(text[:, first:last], past)
        expected, _ = whole(decoder, text[0, max(0, last - CONTEXT) : last].tolist())
        new = min(last - first, CONTEXT)
        assert states.shape[1] == new
        assert distance(states[0], expected[-new:]) < 1e-12


@every_model
def test_a_long_enough_memory_or_sequence_gives_the_states_of_a_full_forward_pass(
    parts: dict[str, Any],
) -> None:
    decoder, text = tiny(**parts), tokens(1, 30)
    read, past, hidden = (
        reader(decoder, CONTEXT if "xl" in parts.get("memories", {}) else 64),
        None,
        [],
    )
    for piece in text.split([11, *[1] * 19], dim=1):
        states, past = read(piece, past)
        hidden.append(states)
    assert distance(torch.cat(hidden, dim=1)[0], whole(decoder, text[0].tolist())[0]) < 1e-12


def test_sampling_depends_on_the_seed_alone() -> None:
    decoder = tiny(memories={"xl": xl})
    first, again, other = (write(decoder, Sample(temperature=1.5, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 1.0}, [0.0625, 0.5, 0.25, 0.1875]),
        ({"top_p": 0.7}, [0, 0.5, 0.25, 0]),
        ({"top_p": 1e-9}, [0, 0.5, 0, 0]),
        ({"top_p": 1.0, "top_k": 3}, [0, 0.5, 0.25, 0.1875]),
        ({"top_p": 1.0, "top_k": 9}, [0.0625, 0.5, 0.25, 0.1875]),
        ({"top_p": 0.6, "top_k": 2}, [0, 0.5, 0, 0]),  # of the two, the first has 2/3 already
    ],
)
def test_samples_have_the_truncated_distribution(
    options: dict[str, Any], kept: list[float]
) -> None:
    p, count = torch.tensor([0.0625, 0.5, 0.25, 0.1875]), 20_000
    drawn = Sample(temperature=2.0, **options).sample(
        2 * p.log().expand(count, -1), torch.Generator().manual_seed(0)
    )
    expected = torch.tensor(kept) / sum(kept)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((drawn.bincount(minlength=4) / count - expected).abs() <= 4 * deviation).all()


def test_generation_ends_at_eos_or_on_a_stop() -> None:
    decoder = tiny(memories={"xl": xl})
    ids = write(decoder, Contrastive())
    end = next(i for i in ids[::-1] if ids.index(i))
    assert (
        list(generate(reader(decoder), PROMPT, Contrastive(), max_new_tokens=20, eos_id=end))
        == ids[: ids.index(end)]
    )
    asked = iter([False, False, True])
    assert (
        list(
            generate(
                reader(decoder),
                PROMPT,
                Contrastive(),
                max_new_tokens=20,
                should_stop=lambda: next(asked),
            )
        )
        == ids[:2]
    )
    assert list(generate(reader(decoder), PROMPT, Contrastive(), max_new_tokens=0)) == []


def test_logits_that_are_not_finite_raise() -> None:
    decoder = tiny(memories={"xl": xl})
    with torch.no_grad():
        decoder.vocabulary.table.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        write(decoder, Greedy())


class OnDevice(Tensor):
    """A tensor that counts how often something of it, or computed from it, is read by the host."""

    reads = 0
    READERS = (Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in OnDevice.READERS:
            return result
        OnDevice.reads += 1
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("method", [Greedy(), Sample(seed=3)], ids=["greedy", "sample"])
def test_a_token_waits_for_the_device_once(
    method: DecodingMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = InferenceEngine(tiny(memories={"xl": xl}), PRECISE, CONTEXT)
    alone = list(generate(engine, PROMPT, method, max_new_tokens=5))
    both = generate_batch(engine, [PROMPT, PROMPT[:5]], method, max_new_tokens=5)
    logits = CachedSequence.unchecked_logits
    monkeypatch.setattr(
        CachedSequence,
        "unchecked_logits",
        lambda self, states: logits(self, states).as_subclass(OnDevice),
    )
    OnDevice.reads = 0
    assert list(generate(engine, PROMPT, method, max_new_tokens=5)) == alone
    assert OnDevice.reads == 5
    again = generate_batch(engine, [PROMPT, PROMPT[:5]], method, max_new_tokens=5)
    assert again == both and OnDevice.reads == 10


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_text_is_not_compiled_for_each_of_its_lengths() -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (tiny(memories={"xl": xl}) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="eager")
    texts = [
        list(generate(InferenceEngine(decoder, PRECISE, CONTEXT), PROMPT, method, max_new_tokens=4))
        for decoder in (plain, compiled)
        for method in (Greedy(), Contrastive())
    ]
    assert texts[:2] == texts[2:] and not counters["stats"]
    compiled(tokens(1, 3))
    assert counters["stats"]["unique_graphs"], "the decoder itself stays compiled"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("contrastiv", {}, "'contrastive'"),
        ("beam", {}, "sample, greedy, contrastive"),
        ("contrastive", {"alpha": 1.01}, "from 0 to 1"),
        ("contrastive", {"alpha": -0.1}, "from 0 to 1"),
        ("contrastive", {"alpha": float("nan")}, "from 0 to 1"),
        ("contrastive", {"top_k": 0}, "at least 1"),
        ("contrastive", {"temperature": 1.0}, "an option of sample"),
        ("greedy", {"top_k": 3}, "an option of sample and contrastive"),
        ("sample", {"alpha": 0.5}, "an option of contrastive"),
        ("sample", {"temperature": -1.0}, "at least 0"),
        ("sample", {"temperature": float("inf")}, "at least 0"),
        ("sample", {"top_p": 0.0}, "above 0"),
        ("sample", {"top_p": 1.1}, "at most 1"),
        ("sample", {"top_k": 0}, "at least 1"),
        ("sample", {"seed": -1}, "at least 0"),
        ("sample", {"seed": 1 << 63}, "below"),
    ],
)
def test_unknown_methods_and_options_are_refused(
    name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build_method(name, options)


def test_text_is_streamed_in_whole_characters() -> None:
    tokenizer = Bytes()
    (prompt,) = tokenizer.encode(["Wer "])
    (ids,) = tokenizer.encode(["wäre 界 🙂 so"])
    assert list(stream_text(tokenizer, prompt, ids)) == list("wäre 界 🙂 so")
    drawn = random.Random(0)
    for _ in range(50):  # as an untrained model writes
        ids = [drawn.choice([65, 66, 0x80, 0xC3, 0xA4, 0xE2, 0xF0, 256]) for _ in range(40)]
        assert "".join(stream_text(tokenizer, prompt, ids)) == tokenizer.decode(ids)


def test_text_is_streamed_without_delay() -> None:
    def ids() -> Any:
        yield from b"abc"
        raise KeyboardInterrupt

    pieces = []
    with pytest.raises(KeyboardInterrupt):
        for piece in stream_text(Bytes(), [], ids()):
            pieces.append(piece)
    assert pieces == ["a", "b", "c"]


class Spaced(Bytes):
    """Writes a space before every word but a text's first."""

    def decode(self, ids: Any) -> str:
        return " ".join(["zero", "one", "two"][i] for i in ids)


def test_text_after_a_prompt_is_decoded_as_its_continuation() -> None:
    assert list(stream_text(Spaced(), [1], [2, 0])) == [" two", " zero"]
    assert list(stream_text(Spaced(), [], [2, 0])) == ["two", " zero"]


# ---------- reading on and on

SHORT: dict[str, dict[str, Any]] = {
    "short": {"memories": {"registers": registers, "xl": lambda dims: XlCache(dims, length=5)}},
    "one": {"memories": {"xl": lambda dims: XlCache(dims, length=1)}, "positional": forward},
    "reference": {
        "memories": {"registers": registers, "xl": xl},
        "positional": lambda dims: Rope(dims, sink_frame="reference"),
    },
    "slopes": {"memories": {"xl": xl}, "positional": lambda dims: Alibi(dims)},
    "xpos": {"memories": {"xl": xl}, "positional": XPos},
    "blocks": {
        "memories": {"registers": registers, "xl": lambda dims: XlCache(dims, length=5)},
        "attention": Blocked,
    },
    "band in blocks": {"memories": {"registers": registers, "xl": window}, "attention": Blocked},
}
CUTS = {
    "one by one": [1] * 40,
    "prompt": [11] + [1] * 29,
    "uneven": [3, 1, 9, 1, 1, 17, 2, 1, 5],
    "whole": [40],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("parts", (MODELS | SHORT).values(), ids=MODELS | SHORT)
def test_a_cached_sequence_gives_what_the_engine_gives(
    parts: dict[str, Any], cut: list[int]
) -> None:
    read, ids = reader(tiny(**parts)), tokens(2, 40)
    reading, past = read.start(), None
    for segment in ids.split(cut, dim=1):
        expected, past = read(segment, past)
        assert distance(reading(segment), expected) < 1e-12


class EagerStep:
    """A captured step without a GPU: it runs the step that would be captured for every token."""

    def __init__(self, step: DecodeStep, ids: Tensor, position: int) -> None:
        self.sequence, self.step = step.__self__, step  # type: ignore[attr-defined]
        self.captured_at = self.sequence.n_read
        for _ in range(2):  # as the warm-up before a capture
            self(ids, position)

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        self.sequence.cache_state.n_read = -1  # the host's counter is not known to a graph
        with fixed_shapes(self.sequence.decoder, self.sequence.cache_state):
            return self.step(ids, torch.tensor(position))


@pytest.mark.parametrize("pads", [None, [0, 4]], ids=["unpadded", "padded"])
@pytest.mark.parametrize("parts", (MODELS | SHORT).values(), ids=MODELS | SHORT)
def test_captured_steps_give_what_the_engine_gives(
    parts: dict[str, Any], pads: list[int] | None
) -> None:
    if pads and not any(parts is other for other in CUT_FREE.values()):
        pytest.skip("its states depend on how the text is split into calls")
    ids, outputs = tokens(2, 40), []
    for capture in (None, EagerStep):
        engine = reader(tiny(**parts))
        engine.capture = capture  # type: ignore[assignment]
        sequence = engine.start(None if pads is None else torch.tensor(pads))
        segments = ids.split([6] + [1] * 34, dim=1)
        outputs.append(torch.cat([sequence(segment) for segment in segments], dim=1))
        if capture is not None:
            # a state that is returned anew cannot be replayed
            is_slow = sequence.cache_state is None or parts.get("ffn") is TokenShift
            assert (sequence.captured is None) == is_slow
            if sequence.captured is not None:  # from the second single token on
                assert sequence.captured.captured_at == 7  # type: ignore[attr-defined]
    first = 0 if pads is None else max(pads)
    assert distance(outputs[1][:, first:], outputs[0][:, first:]) < 1e-12


@pytest.mark.parametrize(
    "parts",
    [MODELS["xl-reversed"], MODELS["registers-xl-forward"], MODELS["window"], SHORT["short"]],
)
def test_keys_that_stay_valid_are_kept_in_a_ring_buffer(parts: dict[str, Any]) -> None:
    decoder = tiny(**parts)
    sequence = reader(decoder).start()
    sequence(tokens(1, 11))
    before = [tensor.data_ptr() for tensor in tree_leaves(sequence.cache)]
    for _ in range(9):
        sequence(tokens(1, 1))
    assert [tensor.data_ptr() for tensor in tree_leaves(sequence.cache)] == before != []
    assert not any(isinstance(module, RollingKVCache) for module in decoder.modules()), (
        "the model itself is not changed"
    )


@pytest.mark.parametrize(
    "parts",
    [SHORT["xpos"], MODELS["hidden-logit"], MODELS["compressed-one"]],
    ids=["xpos", "hidden", "compressed"],
)
def test_other_memories_are_not_kept_in_a_ring_buffer(parts: dict[str, Any]) -> None:
    assert inference_copy(tiny(**parts), torch.float32)[1] is None


# pads move the cuts of a text
CUT_FREE = MODELS | {
    name: SHORT[name] for name in ("reference", "slopes", "xpos", "band in blocks")
}
del CUT_FREE["compressed-one"]  # what is compressed depends on where in the text it stands


@pytest.mark.parametrize("parts", CUT_FREE.values(), ids=CUT_FREE)
def test_padded_prompts_generate_as_each_alone(parts: dict[str, Any]) -> None:
    read = reader(tiny(**parts))
    prompts = [PROMPT, PROMPT[3:5], PROMPT[:1], PROMPT[2:]]
    generated = generate_batch(read, prompts, Greedy(), max_new_tokens=25)
    assert generated == [
        list(generate(read, prompt, Greedy(), max_new_tokens=25)) for prompt in prompts
    ]
    assert (
        generate_batch(read, prompts, Greedy(), max_new_tokens=25, eos_id=generated[1][6])[1]
        == generated[1][: generated[1].index(generated[1][6])]
    )


def test_contrastive_search_refuses_padded_prompts() -> None:
    with pytest.raises(UsageError, match="one length"):
        generate_batch(
            reader(tiny(memories={"xl": xl})), [[1, 2], [1]], Contrastive(), max_new_tokens=2
        )


def test_weights_are_converted_to_bfloat16_once_at_no_loss_of_accuracy() -> None:
    decoder, ids = tiny(memories={"xl": xl}, dtype=torch.float32), tokens(1, 30)
    read = InferenceEngine(decoder, Precision(torch.bfloat16, "asked for"), CONTEXT)
    reading, past, exact = read.start(), None, reader(decoder)(ids)[0]
    joined = torch.cat([reading(segment) for segment in ids.split([11] + [1] * 19, dim=1)], dim=1)
    slow = []
    for segment in ids.split([11] + [1] * 19, dim=1):
        states, past = read(segment, past)
        slow.append(states)
    assert joined.dtype == slow[0].dtype
    assert (
        (joined - exact).norm() < 2 * (torch.cat(slow, dim=1) - exact).norm() < 0.1 * exact.norm()
    )
    block = reading.decoder.blocks[0]
    assert block.attention.query.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert next(decoder.parameters()).dtype == torch.float32


def test_a_sequence_uses_the_weights_at_its_start() -> None:
    decoder = tiny(memories={"xl": xl}, dtype=torch.float32)
    precision = Precision(torch.bfloat16, "asked for")
    engine = InferenceEngine(decoder, precision, CONTEXT)
    before = list(generate(engine, PROMPT, Greedy(), max_new_tokens=8))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(parameter.roll(1, 0))
    after = list(generate(engine, PROMPT, Greedy(), max_new_tokens=8))
    fresh = InferenceEngine(decoder, precision, CONTEXT)
    assert after == list(generate(fresh, PROMPT, Greedy(), max_new_tokens=8)) != before
