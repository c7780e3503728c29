"""The decoder against numbers computed by the original authors' code (tests/golden/lswt_seed/manifest.json says how)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import lswt_norms
import lswt_rope
import lswt_swiglu
import pytest
import torch
from helpers import GOLDEN, build, distance, stream
from lswt_eager import Eager
from lswt_registers import Registers
from lswt_rope import Rope
from lswt_sdpa import Sdpa
from lswt_simctg import SimCtg
from lswt_xl_cache import XlCache
from safetensors.torch import load_file
from torch import Tensor, nn

from lswt_core.hf.original import rename, reshape
from lswt_core.interfaces import IGNORE, Batch, Dims, Part
from lswt_core.loss import CROSS_ENTROPY, Loss
from lswt_core.model import Decoder

SEED = GOLDEN / "lswt_seed"
CASES = json.loads((SEED / "manifest.json").read_text())["cases"]
WEIGHTS = load_file(SEED / "weights_base.safetensors")
ROPE = load_file(GOLDEN / "rope" / "tables.safetensors")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}  # float64: the original keeps its frequencies in float32
BACKENDS: dict[str, Callable[[Dims], Any]] = {
    "eager": Eager,
    "split": partial(Sdpa, method="split"),
    "joint": partial(Sdpa, method="joint"),
}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def expected(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A case's tensors, those computed in ``dtype`` under their plain names."""
    found = load_file(SEED / f"case_{case}.safetensors")
    doubles = {name.removesuffix("_f64"): tensor for name, tensor in found.items() if name.endswith("_f64")}
    return found | doubles if dtype == torch.float64 else found


def translate(name: str) -> str:
    """The original's name of a parameter in our words."""
    return rename(name).removeprefix("model.decoder.")


def dims_of(case: str) -> Dims:
    """A case's sizes."""
    config = CASES[case]["config"]
    return Dims(config["d_model"], config["n_heads"], config["d_ffn"], config["n_layers"])


def original(
    case: str, dtype: torch.dtype = torch.float64, backend: str = "eager", length: int = 64, sink_frame: Any = "reference"
) -> Decoder:
    """The case's model with the original's weights."""
    config = CASES[case]["config"]
    memories: dict[str, Any] = {"xl": partial(XlCache, length=length)}
    if config["n_registers"]:
        memories["registers"] = partial(Registers, count=config["n_registers"])
    decoder = build(
        dims=dims_of(case),
        positional=partial(Rope, base=float(config["rope_base_freq"]), reversed=config["rope_reversed"], sink_frame=sink_frame),
        memories=memories,
        attention=BACKENDS[backend],
        vocab_size=config["vocab_size"],
        d_vocab=config["d_vocab"],
    )
    wanted = decoder.state_dict()
    named = {translate(name): reshape(name, tensor) for name, tensor in WEIGHTS.items()}
    decoder.to_empty(device="cpu").load_state_dict({name: named[name] for name in wanted})
    return decoder.to(dtype)


def errors(case: str, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """How far the logits are from the original's, by how the text was cut into calls and how much was remembered."""
    golden = expected(case, dtype)
    ids = golden["input_ids"]
    patterns = {
        "logits_full": (24, 64),
        "logits_chunk8": (8, 64),
        "logits_step1": (1, 64),
        "logits_chunk8_trim8": (8, 8),
        "logits_chunk8_trim4": (8, 4),
    }
    found = {}
    for name, (size, length) in patterns.items():
        decoder = original(case, dtype, backend, length)
        with torch.no_grad():
            found[name] = distance(decoder.vocabulary.logits(stream(decoder, ids, size)), golden[name])
    return found


@every_case
@every_dtype
@every_backend
def test_logits_are_the_originals(case: str, dtype: torch.dtype, backend: str) -> None:
    assert max(errors(case, dtype, backend).values()) <= TOLERANCE[dtype]


@every_case
@every_dtype
def test_last_states_are_the_originals(case: str, dtype: torch.dtype) -> None:
    golden = expected(case, dtype)
    states, _ = original(case, dtype)(golden["input_ids"])
    assert distance(states, golden["last_hidden_full"]) <= TOLERANCE[dtype]


def test_states_of_every_layer_and_the_kept_keys_and_values_are_the_originals() -> None:
    golden, decoder, found = expected("rev_reg5", torch.float32), original("rev_reg5", torch.float32), []
    for module in (decoder.input_norm, *decoder.blocks, decoder.output_norm):
        module.register_forward_hook(lambda _module, _given, out: found.append(out[0] if isinstance(out, tuple) else out))
    _, state = decoder(golden["input_ids"])
    assert distance(torch.stack(found), golden["hidden_states_full"]) <= 2e-5
    for layer, kept in enumerate(golden["cache_full"]):  # [k or v, B, H, N, D], keys before any rotation
        for name, tensor in zip("kv", kept, strict=True):
            assert distance(state[layer]["xl"][name].transpose(1, 2), tensor) <= 2e-5


def loss_of(case: str, dtype: torch.dtype, backend: str, length: int = 64) -> Loss:
    """Cross-entropy and SimCTG of the case's model."""
    return Loss(original(case, dtype, backend, length), {"simctg": (SimCtg(dims_of(case), margin=0.5), 1.0)})


def batch_of(golden: dict[str, Tensor], part: slice = slice(None)) -> Batch:
    """The padded pair of inputs and labels; 1 pads both."""
    inputs, labels = golden["loss_x"][:, part], golden["loss_y"][:, part]
    return Batch(inputs, labels.masked_fill(labels == 1, IGNORE), valid=inputs != 1)


def gradient_norms(case: str, loss: Loss) -> Tensor:
    """Norms in the order of the manifest."""
    found: dict[str, Any] = dict(loss.decoder.named_parameters())
    return torch.stack([found[translate(name)].grad.norm() for name in CASES[case]["info"]["grad_param_names"]])


@every_case
@every_dtype
@every_backend
def test_losses_and_gradients_are_the_originals(case: str, dtype: torch.dtype, backend: str) -> None:
    golden, loss = expected(case, dtype), loss_of(case, dtype, backend)
    result = loss(batch_of(golden))
    means = {name: term.total / term.count for name, term in result.terms.items()}
    assert distance(means[CROSS_ENTROPY], golden["loss_mle"]) <= TOLERANCE[dtype]
    assert distance(means["simctg"], golden["loss_simctg_cl"]) <= TOLERANCE[dtype] / 100
    masked = result.correct / result.terms[CROSS_ENTROPY].count
    assert float(masked) == pytest.approx(CASES[case]["info"]["accuracy_correctly_masked"], abs=1e-9)
    result.loss.backward()
    assert distance(gradient_norms(case, loss), golden["grad_norms"]) <= TOLERANCE[dtype]


@every_case
def test_the_originals_accuracy_counts_predicted_pads_and_ours_does_not(case: str) -> None:
    golden, decoder = expected(case, torch.float64), original(case)
    labels = golden["loss_y"]
    likeliest = decoder.vocabulary.logits(decoder(golden["loss_x"])[0]).argmax(-1)
    counted = (likeliest == labels).sum() / (labels != 1).sum()  # pads, 1, in the numerator alone
    assert distance(counted, golden["accuracy"]) < 1e-6
    result = loss_of(case, torch.float64, "eager")(batch_of(golden))
    assert float(result.correct / result.terms[CROSS_ENTROPY].count) == pytest.approx(CASES[case]["info"]["accuracy_correctly_masked"])


@every_dtype
@every_backend
def test_every_gradient_is_the_originals(dtype: torch.dtype, backend: str) -> None:
    loss = loss_of("rev_reg5", dtype, backend)
    loss(batch_of(expected("rev_reg5", dtype))).loss.backward()
    found: dict[str, Any] = dict(loss.decoder.named_parameters())
    golden = load_file(SEED / "grads_rev_reg5.safetensors")
    assert {translate(name) for name in golden} == set(found)
    for name, tensor in golden.items():
        assert distance(found[translate(name)].grad, reshape(name, tensor)) <= 2e-5, name


@every_case
@every_dtype
@every_backend
def test_second_segment_over_a_trimmed_memory_is_the_originals(case: str, dtype: torch.dtype, backend: str) -> None:
    golden, loss = expected(case, dtype), loss_of(case, dtype, backend, length=8)
    with torch.no_grad():
        state = loss(batch_of(golden, slice(0, 12))).state
    result = loss(batch_of(golden, slice(12, 24)), state)
    assert distance(result.terms[CROSS_ENTROPY].total / result.terms[CROSS_ENTROPY].count, golden["xl_seg2_loss_mle"]) <= TOLERANCE[dtype]
    assert distance(result.terms["simctg"].total / result.terms["simctg"].count, golden["xl_seg2_loss_cl"]) <= TOLERANCE[dtype]
    states, _ = loss.decoder(golden["loss_x"][:, 12:], state)
    assert distance(loss.decoder.vocabulary.logits(states), golden["xl_seg2_logits"]) <= TOLERANCE[dtype]
    result.loss.backward()
    assert distance(gradient_norms(case, loss), golden["xl_seg2_grad_norms"]) <= TOLERANCE[dtype]


@every_backend
def test_sinks_out_of_position_do_not_depend_on_the_cut_and_the_originals_do(backend: str) -> None:
    ids = expected("rev_reg5", torch.float64)["input_ids"]
    with torch.no_grad():
        none, reference = (original("rev_reg5", backend=backend, sink_frame=frame) for frame in ("none", "reference"))
        assert distance(stream(none, ids, 24), stream(reference, ids, 24)) > 0.1
        assert all(distance(stream(none, ids, size), stream(none, ids, 24)) < 1e-12 for size in (1, 7, 8))
        assert distance(stream(reference, ids, 8), stream(reference, ids, 24)) > 0.1


def swap_gate(patch: pytest.MonkeyPatch) -> None:
    """Llama's order of SwiGLU's halves."""

    def forward(self: lswt_swiglu.SwiGlu, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * nn.functional.silu(gate))

    patch.setattr(lswt_swiglu.SwiGlu, "forward", forward)


def shrink_eps(patch: pytest.MonkeyPatch) -> None:
    """Another epsilon in the norms."""

    def forward(self: lswt_norms.LayerNorm, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, 1e-6)

    patch.setattr(lswt_norms.LayerNorm, "forward", forward)


def raise_base(patch: pytest.MonkeyPatch) -> None:
    """Frequencies from a base 0.1 % larger."""
    plain = lswt_rope.Rope.table

    def table(self: Rope, *given: Any) -> tuple[Tensor, Tensor]:
        other = Rope(Dims(2, 1, 1, 1), base=self.base * 1.001, reversed=self.reversed)
        return plain(other, *given)

    patch.setattr(lswt_rope.Rope, "table", table)


def leak_one_token(patch: pytest.MonkeyPatch) -> None:
    """A causal mask one diagonal too wide."""
    plain = Part.visible

    def visible(self: Part) -> Tensor | None:
        seen = plain(self)
        size = self.q.shape[1]
        return torch.ones(size, size, dtype=torch.bool).tril(1) if self.causal and size > 1 else seen

    patch.setattr(Part, "visible", visible)


def misplace(patch: pytest.MonkeyPatch, order: Callable[[list[Part]], list[Part]], diagonal: Callable[[int, int], int]) -> None:
    """The keys of all parts in one row, in some order, under one triangular mask."""

    def forward(self: Eager, parts: list[Part]) -> Tensor:
        parts = order(list(parts))
        scores = torch.cat([torch.einsum("bqhd,bkhd->bhqk", part.q, part.k) for part in parts], dim=-1)
        queries, keys = scores.shape[-2:]
        hidden = ~torch.ones(queries, keys, dtype=torch.bool).tril(diagonal(queries, keys))
        weights = (scores / parts[0].q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, torch.cat([part.v for part in parts], 1))

    patch.setattr(Eager, "forward", forward)


def as_it_is(patch: pytest.MonkeyPatch) -> None:
    """No mistake: registers first, the mask aligned to the bottom right, which is what the parts mean."""
    misplace(patch, lambda parts: parts, lambda queries, keys: keys - queries)


def append_registers(patch: pytest.MonkeyPatch) -> None:
    """Registers after the tokens, under a mask aligned to the bottom right."""
    misplace(patch, lambda parts: sorted(parts, key=lambda part: part.at is None), lambda queries, keys: keys - queries)


def align_top_left(patch: pytest.MonkeyPatch) -> None:
    """The causal mask of a square put on more keys than queries."""
    misplace(patch, lambda parts: parts, lambda queries, keys: 0)


def test_the_stand_in_for_misplaced_keys_is_right_when_nothing_is_misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is(monkeypatch)
    assert max(errors("rev_reg5", torch.float64, "eager").values()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("mutate", [swap_gate, shrink_eps, raise_base, leak_one_token, append_registers, align_top_left])
def test_the_comparison_notices_mistakes(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(errors("rev_reg5", torch.float64, "eager").values()) <= TOLERANCE[torch.float64]
    mutate(monkeypatch)
    assert max(errors("rev_reg5", torch.float64, "eager").values()) > 10 * TOLERANCE[torch.float64]


def simctg_error() -> float:
    """How far the contrastive loss is from the original's."""
    golden, result = expected("rev_reg5", torch.float64), loss_of("rev_reg5", torch.float64, "eager")
    term = result(batch_of(golden)).terms["simctg"]
    return distance(term.total / term.count, golden["loss_simctg_cl"])


def test_the_comparison_notices_another_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert simctg_error() <= 1e-8
    monkeypatch.setattr(SimCtg, "count", lambda self, batch: self.valid(batch).sum(-1).square().sum())  # pairs i = j included
    assert simctg_error() > 1e-6


@pytest.mark.parametrize("base", [10_000, 500_000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-8), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("sign, reversed", [(1, False), (-1, True)], ids=["forward", "reversed"])
def test_rotary_tables_are_right_at_every_position(base: int, dtype: torch.dtype, tolerance: float, sign: int, reversed: bool) -> None:
    rope = Rope(Dims(64, 1, 1, 1), base=float(base), reversed=reversed)
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rope.table(ROPE["positions"], 64, dtype)
    assert cos.dtype == sin.dtype == dtype
    assert distance(cos[:, 0].double(), ROPE[f"b{base}/cos_f64"]) <= tolerance
    assert distance(sin[:, 0].double(), sign * ROPE[f"b{base}/sin_f64"]) <= tolerance


@pytest.mark.parametrize("base", [10_000, 500_000])
def test_rotary_tables_of_the_original_are_an_option_and_differ(base: int) -> None:
    tables = {}
    for angles in ("float64", "float32", "float16"):
        rope = Rope(Dims(64, 1, 1, 1), base=float(base), reversed=False, angles=angles)
        tables[angles] = rope.table(ROPE["positions"].clamp_max(60_000), 64, torch.float32)[0][:, 0].double()
    known = ROPE["positions"] <= 60_000
    assert distance(tables["float32"][known], ROPE[f"b{base}/cos_naive_f32"][known].double()) < 1e-6
    far = ROPE["positions"][known] > 2048
    assert distance(tables["float64"][known], tables["float32"][known]) > 1e-4
    assert distance(tables["float64"][known][far], tables["float16"][known][far]) > 0.5


def test_rotation_pairs_the_halves_of_a_head() -> None:
    x = torch.arange(1, 9, dtype=torch.float64).view(1, 1, 1, 8) / 8
    wanted = [-0.2119490671, 0.1639765052, 0.3712843255, 0.4998404448, -0.6011053094, 0.77337682, 0.8765831105, 1.0000797617]
    for rope, at in ((Rope(Dims(8, 1, 1, 1), reversed=False), 3), (Rope(Dims(8, 1, 1, 1)), -3)):
        assert distance(rope.rotate(x, torch.tensor([at])).flatten(), torch.tensor(wanted, dtype=torch.float64)) < 1e-9
