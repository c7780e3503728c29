"""The decoder against numbers computed by the original authors' code
(tests/golden/lswt_seed/manifest.json says how).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import GOLDEN, distance, stream
from lswt_rope import Rope
from lswt_simctg import SimCtg
from original import (
    BACKENDS,
    SEED,
    SEED_CASES,
    SMALL_CASES,
    dims_of,
    expected,
    rebuilt,
    seed_errors,
    small_errors,
    translate,
)
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.hf.original_weights import convert_layout
from lswt_core.interfaces import IGNORE, Batch, Dims
from lswt_core.model.train_module import CROSS_ENTROPY, TrainModule

ROPE = load_file(GOLDEN / "rope" / "tables.safetensors")
# float64: the original keeps its frequencies in float32
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}
every_case = pytest.mark.parametrize("case", SEED_CASES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_case
@every_dtype
@every_backend
def test_logits_are_the_originals(case: str, dtype: torch.dtype, backend: str) -> None:
    assert max(seed_errors(case, dtype, backend).values()) <= TOLERANCE[dtype]


@every_case
@every_dtype
def test_last_states_are_the_originals(case: str, dtype: torch.dtype) -> None:
    golden = expected(case, dtype)
    states, _ = rebuilt(case, dtype)(golden["input_ids"])
    assert distance(states, golden["last_hidden_full"]) <= TOLERANCE[dtype]


def test_states_of_every_layer_and_the_kept_keys_and_values_are_the_originals() -> None:
    golden, decoder, actual = (
        expected("rev_reg5", torch.float32),
        rebuilt("rev_reg5", torch.float32),
        [],
    )
    for module in (decoder.input_norm, *decoder.blocks, decoder.output_norm):
        module.register_forward_hook(
            lambda _module, _given, out: actual.append(out[0] if isinstance(out, tuple) else out)
        )
    _, state = decoder(golden["input_ids"])
    assert distance(torch.stack(actual), golden["hidden_states_full"]) <= 2e-5
    # [k or v, B, H, N, D], keys before any rotation
    for layer, kept in enumerate(golden["cache_full"]):
        for name, tensor in zip("kv", kept, strict=True):
            assert distance(state[layer]["xl"][name].transpose(1, 2), tensor) <= 2e-5


def loss_of(case: str, dtype: torch.dtype, backend: str, length: int = 64) -> TrainModule:
    """Cross-entropy and SimCTG of the case's model."""
    return TrainModule(
        rebuilt(case, dtype, backend, length),
        {"simctg": (SimCtg(dims_of(SEED_CASES[case]["config"]), margin=0.5), 1.0)},
    )


def batch_of(golden: dict[str, Tensor], part: slice = slice(None)) -> Batch:
    """The padded pair of inputs and labels; 1 pads both."""
    inputs, labels = golden["loss_x"][:, part], golden["loss_y"][:, part]
    return Batch(inputs, labels.masked_fill(labels == 1, IGNORE), valid=inputs != 1)


def gradient_norms(case: str, loss: TrainModule) -> Tensor:
    """Norms in the order of the manifest."""
    parameters: dict[str, Any] = dict(loss.decoder.named_parameters())
    return torch.stack(
        [
            parameters[translate(name)].grad.norm()
            for name in SEED_CASES[case]["info"]["grad_param_names"]
        ]
    )


@every_case
@every_dtype
@every_backend
def test_losses_and_gradients_are_the_originals(
    case: str, dtype: torch.dtype, backend: str
) -> None:
    golden, loss = expected(case, dtype), loss_of(case, dtype, backend)
    result = loss(batch_of(golden))
    means = {name: term.total / term.count for name, term in result.terms.items()}
    assert distance(means[CROSS_ENTROPY], golden["loss_mle"]) <= TOLERANCE[dtype]
    assert distance(means["simctg"], golden["loss_simctg_cl"]) <= TOLERANCE[dtype] / 100
    masked = result.correct / result.terms[CROSS_ENTROPY].count
    assert float(masked) == pytest.approx(
        SEED_CASES[case]["info"]["accuracy_correctly_masked"], abs=1e-9
    )
    result.loss.backward()
    assert distance(gradient_norms(case, loss), golden["grad_norms"]) <= TOLERANCE[dtype]


@every_case
def test_the_originals_accuracy_counts_predicted_pads_and_ours_does_not(case: str) -> None:
    golden, decoder = expected(case, torch.float64), rebuilt(case)
    labels = golden["loss_y"]
    likeliest = decoder.vocabulary.logits(decoder(golden["loss_x"])[0]).argmax(-1)
    counted = (likeliest == labels).sum() / (labels != 1).sum()  # pads, 1, in the numerator alone
    assert distance(counted, golden["accuracy"]) < 1e-6
    result = loss_of(case, torch.float64, "eager")(batch_of(golden))
    assert float(result.correct / result.terms[CROSS_ENTROPY].count) == pytest.approx(
        SEED_CASES[case]["info"]["accuracy_correctly_masked"]
    )


@every_dtype
@every_backend
def test_every_gradient_is_the_originals(dtype: torch.dtype, backend: str) -> None:
    loss = loss_of("rev_reg5", dtype, backend)
    loss(batch_of(expected("rev_reg5", dtype))).loss.backward()
    actual: dict[str, Any] = dict(loss.decoder.named_parameters())
    golden = load_file(SEED / "grads_rev_reg5.safetensors")
    assert {translate(name) for name in golden} == set(actual)
    for name, tensor in golden.items():
        assert distance(actual[translate(name)].grad, convert_layout(name, tensor)) <= 2e-5, name


@every_case
@every_dtype
@every_backend
def test_second_segment_over_a_trimmed_memory_is_the_originals(
    case: str, dtype: torch.dtype, backend: str
) -> None:
    golden, loss = expected(case, dtype), loss_of(case, dtype, backend, length=8)
    with torch.no_grad():
        state = loss(batch_of(golden, slice(0, 12))).state
    result = loss(batch_of(golden, slice(12, 24)), state)
    assert (
        distance(
            result.terms[CROSS_ENTROPY].total / result.terms[CROSS_ENTROPY].count,
            golden["xl_seg2_loss_mle"],
        )
        <= TOLERANCE[dtype]
    )
    assert (
        distance(
            result.terms["simctg"].total / result.terms["simctg"].count, golden["xl_seg2_loss_cl"]
        )
        <= TOLERANCE[dtype]
    )
    states, _ = loss.decoder(golden["loss_x"][:, 12:], state)
    assert (
        distance(loss.decoder.vocabulary.logits(states), golden["xl_seg2_logits"])
        <= TOLERANCE[dtype]
    )
    result.loss.backward()
    assert distance(gradient_norms(case, loss), golden["xl_seg2_grad_norms"]) <= TOLERANCE[dtype]


@every_backend
def test_sinks_out_of_position_do_not_depend_on_the_cut_and_the_originals_do(backend: str) -> None:
    ids = expected("rev_reg5", torch.float64)["input_ids"]
    with torch.no_grad():
        none, reference = (
            rebuilt("rev_reg5", backend=backend, sink_frame=frame)
            for frame in ("none", "reference")
        )
        assert distance(stream(none, ids, 24), stream(reference, ids, 24)) > 0.1
        assert all(
            distance(stream(none, ids, size), stream(none, ids, 24)) < 1e-12 for size in (1, 7, 8)
        )
        assert distance(stream(reference, ids, 8), stream(reference, ids, 24)) > 0.1


@pytest.mark.parametrize("case", SMALL_CASES)
@every_backend
def test_cases_without_gate_without_attention_bias_and_with_forward_positions_are_the_originals(
    case: str, backend: str
) -> None:
    assert max(small_errors(case, backend).values()) <= 1e-12


@pytest.mark.parametrize("base", [10_000, 500_000])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 3e-8), (torch.float64, 1e-9)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("sign, reversed", [(1, False), (-1, True)], ids=["forward", "reversed"])
def test_rotary_tables_are_right_at_every_position(
    base: int, dtype: torch.dtype, tolerance: float, sign: int, reversed: bool
) -> None:
    rope = Rope(Dims(64, 1, 1, 1), base=float(base), reversed=reversed)
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rope.table(ROPE["positions"], 64, dtype)
    assert cos.dtype == sin.dtype == dtype
    assert distance(cos[:, 0].double(), ROPE[f"b{base}/cos_f64"]) <= tolerance
    assert distance(sin[:, 0].double(), sign * ROPE[f"b{base}/sin_f64"]) <= tolerance


@pytest.mark.parametrize("base", [10_000, 500_000])
def test_float32_angles_are_the_originals_and_off_where_ours_are_right(base: int) -> None:
    ours, originals = (
        Rope(Dims(64, 1, 1, 1), base=float(base), reversed=False, angles=angles)
        for angles in ("float64", "float32")
    )
    (ours_cos, ours_sin), (cos, sin) = (
        rope.table(ROPE["positions"], 64, torch.float32) for rope in (ours, originals)
    )
    for table, right, name in ((cos, ours_cos, "cos"), (sin, ours_sin, "sin")):
        assert torch.equal(table[:, 0], ROPE[f"b{base}/{name}_naive_f32"])
        assert distance(table, right) > 1e-2


@pytest.mark.parametrize("base", [10_000, 500_000])
def test_rotary_tables_of_the_original_are_an_option_and_differ(base: int) -> None:
    tables = {}
    for angles in ("float64", "float32", "float16"):
        rope = Rope(Dims(64, 1, 1, 1), base=float(base), reversed=False, angles=angles)
        tables[angles] = rope.table(ROPE["positions"].clamp_max(60_000), 64, torch.float32)[0][
            :, 0
        ].double()
    known = ROPE["positions"] <= 60_000
    assert distance(tables["float32"][known], ROPE[f"b{base}/cos_naive_f32"][known].double()) < 1e-6
    far = ROPE["positions"][known] > 2048
    assert distance(tables["float64"][known], tables["float32"][known]) > 1e-4
    assert distance(tables["float64"][known][far], tables["float16"][known][far]) > 0.5


def test_rotation_pairs_the_halves_of_a_head() -> None:
    x = torch.arange(1, 9, dtype=torch.float64).view(1, 1, 1, 8) / 8
    expected = [
        -0.2119490671,
        0.1639765052,
        0.3712843255,
        0.4998404448,
        -0.6011053094,
        0.77337682,
        0.8765831105,
        1.0000797617,
    ]
    for rope, positions in (
        (Rope(Dims(8, 1, 1, 1), reversed=False), 3),
        (Rope(Dims(8, 1, 1, 1)), -3),
    ):
        assert (
            distance(
                rope.rotate(x, torch.tensor([positions])).flatten(),
                torch.tensor(expected, dtype=torch.float64),
            )
            < 1e-9
        )
