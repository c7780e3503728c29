"""Components of the model together: memories and streams, what attention backends agree on,
parameters and their groups. What each promises by itself is asked in test_conformance.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import flash_parts
import lswt_blocked
import lswt_flash
import pytest
import torch
from helpers import DIMS, GOLDEN, build, distance, slow_unless, stream, tiny, tokens
from lswt_blocked import Blocked
from lswt_eager import Eager
from lswt_flash import Flash
from lswt_gelu import Gelu
from lswt_nope import NoPosition
from lswt_norms import LayerNorm
from lswt_registers import Registers
from lswt_rope import Rope
from lswt_sdpa import Sdpa, selection
from lswt_sdpa.kernels import EachQueryOfGroup
from lswt_sdpa.selection import KERNELS
from lswt_xl_cache import XlCache
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from lswt_core.device import compile_blocks
from lswt_core.errors import PluginError
from lswt_core.interfaces import (
    AttentionRequirements,
    DenseBias,
    DifferenceBias,
    Dims,
    KVBlock,
    ScoreTransform,
    SlopeBias,
    SoftCap,
    Unsupported,
)
from lswt_core.model.parameters import build_parameter_groups
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api import short_blocks
from lswt_core.plugin_api.attention_merge import (
    BackwardInputs,
    ProbeSize,
    find_fault,
    first_verified,
    merged_attention,
    run_probe,
)
from lswt_core.plugin_api.pytree import tree_leaves, tree_map
from lswt_core.plugin_api.short_blocks import ShortBlocks

XL = {"xl": partial(XlCache, length=32)}
REGISTERS = {"registers": partial(Registers, count=3)}
BACKENDS: dict[str, Callable[[Dims], Any]] = {
    "eager": Eager,
    "sdpa": Sdpa,
    "split": partial(Sdpa, method="split"),
    "joint": partial(Sdpa, method="joint"),
    "blocked": Blocked,
}
COUNTS = json.loads((GOLDEN / "param_counts" / "param_counts.json").read_text())
every_backend = pytest.mark.parametrize("backend", BACKENDS)


# ---------- memories


def test_the_cache_keeps_no_more_than_its_length_and_only_the_newest() -> None:
    decoder, ids = tiny(memories={"xl": partial(XlCache, length=5)}), tokens(1, 12)
    _, short = decoder(ids[:, :3])
    assert {tensor.shape[1] for tensor in tree_leaves(short)} == {3}
    state: Any = None
    for first in range(0, 12, 3):
        _, state = decoder(ids[:, first : first + 3], state)
    assert {tensor.shape[1] for tensor in tree_leaves(state)} == {5}
    newest = decoder(ids)[1][0]["xl"]  # the first layer's keys depend on their own token alone
    assert distance(state[0]["xl"]["k"], newest["k"]) < 1e-12


@every_backend
def test_what_was_remembered_in_another_precision_is_still_understood(backend: str) -> None:
    decoder, ids = (
        tiny(memories=XL | REGISTERS, attention=BACKENDS[backend], dtype=torch.float32),
        tokens(2, 8),
    )
    _, kept = decoder(ids[:, :4])
    expected, _ = decoder(ids[:, 4:], kept)
    actual, following = decoder(ids[:, 4:], tree_map(Tensor.bfloat16, kept))
    assert (actual - expected).norm() / expected.norm() < 0.02
    assert {tensor.dtype for tensor in tree_leaves(following)} == {torch.float32}


# ---------- streaming


@every_backend
@pytest.mark.parametrize(
    "memories", [XL, XL | REGISTERS, REGISTERS | XL], ids=["xl", "xl-registers", "registers-xl"]
)
@pytest.mark.parametrize(
    "positional",
    [Rope, partial(Rope, reversed=False), NoPosition],
    ids=["reversed", "forward", "none"],
)
def test_a_text_means_the_same_however_it_is_cut(
    backend: str, memories: dict[str, Any], positional: Any
) -> None:
    decoder, ids = (
        tiny(positional=positional, memories=memories, attention=BACKENDS[backend]),
        tokens(2, 17),
    )
    whole = decoder(ids)[0]
    assert max(distance(stream(decoder, ids, size), whole) for size in (1, 7, 17)) < 1e-12


def test_without_sinks_reversed_rotation_is_forward_rotation_with_half_of_every_head_negated() -> (
    None
):
    forward, backward = (tiny(positional=partial(Rope, reversed=flag)) for flag in (False, True))
    sign = torch.ones(DIMS.n_heads, 2, DIMS.d_head // 2, dtype=torch.float64)
    sign[:, 1] = -1
    with torch.no_grad():
        for name, parameter in backward.named_parameters():
            if ".attention.query." in name or ".attention.key." in name:
                parameter.mul_(sign.flatten().view(-1, *[1] * (parameter.ndim - 1)))
    assert distance(forward(tokens(2, 9))[0], backward(tokens(2, 9))[0]) < 1e-12


@pytest.mark.parametrize("backend", ["eager", "sdpa", "joint", "blocked"])
@pytest.mark.parametrize("size", [4, 20])
def test_parted_documents_do_not_see_each_other(backend: str, size: int) -> None:
    decoder, ids = tiny(memories=XL | REGISTERS, attention=BACKENDS[backend]), tokens(2, 20)
    borders = ([0, 5, 13], [0, 11])  # where each row's documents start
    first_visible = torch.tensor(
        [[max(b for b in row if b <= i) for i in range(20)] for row in borders]
    )
    states = stream(decoder, ids, size, first_visible)
    for row, firsts in enumerate(borders):
        for first, last in zip(firsts, [*firsts[1:], 20], strict=True):
            alone = decoder(ids[row : row + 1, first:last])[0]
            assert distance(states[row, first:last], alone[0]) < 1e-12


# ---------- backends


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_that_are_run_again_give_the_same_gradient_from_less(
    backend: str, dtype: torch.dtype
) -> None:
    decoder, ids = (
        tiny(
            memories=XL | REGISTERS,
            attention=BACKENDS[backend],
            dtype=torch.float32 if dtype == torch.bfloat16 else dtype,
        ),
        tokens(2, 12),
    )
    _, state = decoder(ids)
    results = []
    for again in (False, True):
        decoder.activation_checkpointing = again
        kept = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            states, following = decoder(ids, tree_map(Tensor.detach, state))
        results.append(
            (
                torch.autograd.grad(
                    states.square().sum(), list(decoder.parameters()), allow_unused=True
                ),
                tree_leaves(following),
                kept,
            )
        )
    (gradients, memories, much), (others, same, little) = results
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(memories, same, strict=True)) and little < much / 3


def traces_float64() -> bool:
    """Whether torch's trace of its attention kernel for CPUs has the kernel's dtypes."""
    with FakeTensorMode() as mode:
        q = mode.from_tensor(torch.ones(1, 1, 2, 8, dtype=torch.float64))
        _, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    return logsumexp.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("backend", slow_unless(["blocked"], [*BACKENDS, "flash"]))
def test_compiled_blocks_are_two_graphs_for_all_layers_and_steps(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    flash_parts.install(monkeypatch, 2)
    attention = (BACKENDS | {"flash": Flash})[backend]
    memories = {"xl": partial(XlCache, length=16), **REGISTERS}
    plain, compiled = (
        tiny(dims=DIMS._replace(n_layers=4), memories=memories, attention=attention)
        for _ in range(2)
    )
    compiler = torch.nn.Module.compile  # the tracing alone: no compiler of C++ is needed
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiler, backend="aot_eager"))
    compile_blocks(compiled.blocks)
    # before torch 2.13 the logsumexp of float64 attention on a CPU is traced as float32
    allowed = 1e-9 if traces_float64() else 1e-4
    states: Any = [None, None]
    for step in range(5):  # the memory of 16 tokens is full after two segments of 8
        ids = tokens(2, 8, seed=step)
        outputs = []
        for i, decoder in enumerate((plain, compiled)):
            out, states[i] = decoder(ids, states[i])
            states[i] = tree_map(Tensor.detach, states[i])
            outputs.append(
                [out, *torch.autograd.grad(out.square().sum(), list(decoder.blocks.parameters()))]
            )
        assert max(distance(a, b) for a, b in zip(*outputs, strict=True)) < allowed
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3  # cold, filling, full


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_blocks_have_a_graph_for_every_shape_and_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where recipes are benched side by side; the ninth is asked for in a thread, as a GPU's
    backward pass runs in one.
    """
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager")
    )
    dims = DIMS._replace(n_layers=1)
    makes = [tiny(dims=dims), tiny(dims=dims, ffn=Gelu)]
    for decoder in makes:
        compile_blocks(decoder.blocks)
    with torch.no_grad(), ThreadPoolExecutor(1) as aside:
        for rows in range(1, 5):
            for decoder in makes:
                decoder(tokens(rows, 3))
        aside.submit(makes[0], tokens(5, 3)).result()
    assert counters["stats"]["unique_graphs"] == 9


def attention_case(
    sinks: bool,
    memory: bool,
    bias: str,
    documents: bool,
    own_queries: bool = True,
    window: bool = False,
    shared: int = 1,
    cap: float = 0.0,
    selects: bool = False,
) -> tuple[list[KVBlock], list[Tensor]]:
    """Random parts and the tensors they are made of; head width 4, three queries of two rows, two
    key/value heads, each ``shared`` by so many query heads.
    """
    generator = torch.Generator().manual_seed(5)
    leaves: list[Tensor] = []

    def draw(size: int, heads: int = 2) -> Tensor:
        leaves.append(
            (
                2 * torch.randn(2, size, heads, 4, dtype=torch.float64, generator=generator)
            ).requires_grad_()
        )
        return leaves[-1]

    positions, past = torch.arange(3), torch.arange(-4, 0)
    first_visible = (
        torch.tensor([[-2, -2, 1], [-4, 1, 2]])
        if documents
        else positions[None] - 2
        if window
        else None
    )
    q, parts = draw(3, 2 * shared), []

    def bias_over(k_positions: Tensor) -> Any:
        if bias == "slopes":
            slopes = 0.5 / torch.arange(1, 1 + 2 * shared, dtype=torch.float64)
            return SlopeBias(slopes, positions, k_positions)
        if bias == "difference":
            terms = torch.randn(2, 2 * shared, 3 + len(k_positions), generator=generator).double()
            return DifferenceBias(terms[..., :3], terms[..., 3:])
        sizes = (2, 2 * shared, 3, len(k_positions))
        drawn = torch.randn(sizes, dtype=torch.float64, generator=generator)
        return DenseBias(drawn) if bias == "dense" else None

    if sinks:
        own = draw(3, 2 * shared) if own_queries else q
        parts.append(KVBlock(own, draw(2), draw(2), causal=False))
    if memory:
        parts.append(
            KVBlock(
                q,
                draw(4),
                draw(4),
                causal=False,
                bias=bias_over(past),
                positions=past,
                first_visible=first_visible,
            )
        )
    parts.append(
        KVBlock(
            q,
            draw(3),
            draw(3),
            causal=True,
            bias=bias_over(positions),
            positions=positions,
            first_visible=first_visible,
        )
    )
    if cap:
        transform = SoftCap(cap)
        parts = [part._replace(transform=transform) for part in parts]
    if selects:
        chosen = torch.rand(2, 2 * shared, 3, 4, generator=generator) < 0.6
        own_choice = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()
        parts[-1] = parts[-1]._replace(selected=own_choice)  # broadcasts
        parts[:-1] = [part._replace(selected=chosen[..., : part.k.shape[1]]) for part in parts[:-1]]
    return parts, leaves


def one_by_one(parts: Sequence[KVBlock]) -> Tensor:
    """Attention by the definition: for every query the list of keys it may see."""
    rows, length, heads, width = parts[0].q.shape
    shared = heads // parts[0].k.shape[2]
    out = torch.zeros(rows, length, heads, width, dtype=torch.float64)
    for b, i, h in torch.cartesian_prod(
        torch.arange(rows), torch.arange(length), torch.arange(heads)
    ).tolist():
        scores, values = [], []
        for part in parts:
            for j in range(part.k.shape[1]):
                positions = None if part.positions is None else int(part.positions[j])
                first_visible = (
                    None
                    if positions is None or part.first_visible is None
                    else part.first_visible.expand(rows, length)
                )
                hidden = (part.causal and j > i) or (
                    first_visible is not None and positions < int(first_visible[b, i])
                )
                if part.selected is not None:
                    chosen = part.selected.expand(rows, heads, length, -1)
                    hidden = hidden or not chosen[b, h, i, j]
                if not hidden:
                    dense = (
                        0.0
                        if part.bias is None
                        else part.bias.dense().expand(rows, heads, length, -1)[b, h, i, j]
                    )
                    score = part.q[b, i, h] @ part.k[b, j, h // shared] / width**0.5
                    if isinstance(part.transform, SoftCap):
                        score = part.transform.cap * torch.tanh(score / part.transform.cap)
                    scores.append(score + dense)
                    values.append(part.v[b, j, h // shared])
        out[b, i, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


ATTENTION_CASES = [
    {"sinks": sinks, "memory": memory, "bias": bias, "documents": documents}
    for sinks in (False, True)
    for memory in (False, True)
    for bias in ("no", "slopes", "dense")
    for documents in (False, True)
] + [
    {"sinks": True, "memory": True, "bias": "no", "documents": False, "own_queries": False},
    {"sinks": True, "memory": True, "bias": "no", "documents": False, "window": True},
    {"sinks": True, "memory": True, "bias": "slopes", "documents": False, "window": True},
]
ALL = {"sinks": True, "memory": True, "documents": False}
ATTENTION_CASES += [
    ALL | {"bias": "no", "shared": 3},
    ALL | {"bias": "dense", "documents": True, "shared": 2},
    ALL | {"bias": "slopes", "own_queries": False, "shared": 2},
    ALL | {"bias": "difference"},
    ALL | {"bias": "difference", "shared": 2},
    ALL | {"bias": "no", "documents": True, "shared": 2},
    ALL | {"bias": "no", "cap": 1.5, "shared": 2},
    ALL | {"bias": "dense", "cap": 1.5},
    ALL | {"bias": "no", "selects": True},
    ALL | {"bias": "no", "selects": True, "documents": True, "shared": 2},
    ALL | {"bias": "slopes", "selects": True, "cap": 1.5},
]


@pytest.mark.parametrize(
    "case",
    ATTENTION_CASES,
    ids=lambda case: "-".join(f"{key}={value}" for key, value in case.items()),
)
@pytest.mark.parametrize("backend", [*BACKENDS, "flash"])
def test_backends_compute_one_softmax_over_all_parts(
    backend: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_parts.install(monkeypatch, 2)
    monkeypatch.setattr(lswt_flash, "WIDTH_MULTIPLE", 4)
    monkeypatch.setattr(lswt_blocked, "FEW_QUERIES", 0)
    has_bias, has_mask = case["bias"] != "no", case["documents"] or "window" in case
    capped, selects = "cap" in case, "selects" in case
    flash = backend == "flash"
    computer = Flash(DIMS) if flash else BACKENDS[backend](DIMS)
    need = AttentionRequirements(
        "cuda" if flash else "cpu",
        torch.bfloat16 if flash else torch.float64,
        4,
        has_bias,
        has_mask,
        queries_per_kv=case.get("shared", 1),
        transform=SoftCap if capped else None,
        has_selection=selects,
    )
    parts, leaves = attention_case(**case)
    refused = (
        ((has_bias or has_mask or selects) and backend in ("split", "flash"))
        or (has_bias and backend == "blocked")
        or (capped and backend not in ("eager", "flash"))
    )
    if refused:
        with pytest.raises(Unsupported):
            computer.require(need)
        if not (backend == "split" and not capped):  # which joins what it was not case about
            with pytest.raises(Unsupported):
                computer(parts)
        return
    computer.require(need)
    weights = torch.randn(
        parts[0].q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6)
    )
    actual, expected = computer(parts), one_by_one(parts)
    assert distance(actual, expected) < 1e-12
    gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (actual, expected)]
    assert max(distance(a, b) for a, b in zip(*gradients, strict=True)) < 1e-12


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device": "cpu"}, "CUDA"),
        ({"dtype": torch.float32}, "precision"),
        ({"d_head": 264}, "256"),
        ({"d_head": 36}, "multiples of 8"),
        ({"has_mask": True}, "window"),
        ({"has_selection": True}, "per query"),
        ({"transform": ScoreTransform}, "SoftCap alone"),
        ({"double_backward": True}, "second"),
    ],
)
def test_flash_says_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    need = AttentionRequirements("cuda", torch.bfloat16, 64)._replace(**change)
    with pytest.raises(Unsupported, match=reason):
        Flash(DIMS).require(need)


def test_the_newest_sound_generation_of_flash_attn_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need = AttentionRequirements("cuda", torch.bfloat16, 64)
    with pytest.raises(Unsupported, match=r"pip install.*version 4: .*version 3: .*version 2: "):
        Flash(DIMS).require(need)
    for versions in ((2,), (3, 2), (4, 3, 2)):
        flash_parts.install(monkeypatch, *versions)
        assert Flash(DIMS).require(need).startswith(f"flash-attn version {versions[0]}")
    monkeypatch.setitem(
        flash_parts.PACKAGES,
        3,
        SimpleNamespace(**vars(flash_parts.PACKAGES[3]) | {"_flash_attn_backward": wrong}),
    )
    flash_parts.install(monkeypatch, 3, 2)
    version = Flash(DIMS).require(need)
    assert version.startswith("flash-attn version 2; not version 4: ")
    assert "not version 3: its gradient of queries is off by" in version


def wrong(*_: Any, dq: Tensor, dk: Tensor, dv: Tensor, **options: Any) -> Tensor:
    """A backward pass of zeros."""
    return dq.zero_()


@pytest.mark.parametrize("generation", [2, 3, 4])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_generation_of_flash_attn_is_called_as_it_wants_to_be(
    generation: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_parts.install(monkeypatch, generation)
    case = ALL | ({"shared": 2, "cap": 1.5} if deterministic else {})
    parts, leaves = attention_case(bias="no", **case)
    actual, expected = Flash(DIMS, deterministic=deterministic)(parts), one_by_one(parts)
    assert distance(actual, expected) < 1e-12
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected)]
    assert max(distance(a, b) for a, b in zip(*gradients, strict=True)) < 1e-12


def test_flash_refuses_to_ignore_what_hides_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_parts.install(monkeypatch, 2)
    for case in ({"bias": "no", "documents": True}, {"bias": "slopes", "documents": False}):
        with pytest.raises(Unsupported, match="'sdpa'"):
            Flash(DIMS)(attention_case(sinks=True, memory=True, **case)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "memory-efficient"])
@pytest.mark.parametrize(("tokens", "keys"), [(33, 33), (64, 129)])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_torch_kernels_for_cuda_are_called_as_they_want_to_be(
    kernel: str, tokens: int, keys: int, kv_heads: int
) -> None:
    q, k, v = (
        torch.empty(2, size, heads, 64, dtype=torch.bfloat16, device="meta")
        for size, heads in ((tokens, 3), (keys, kv_heads), (keys, kv_heads))
    )
    # torch checks types and shapes, and computes nothing
    out, total = KERNELS[kernel].forward(q, k, v, tokens == keys)
    assert out.shape == q.shape and total.shape == (2, 3, tokens) and total.dtype == torch.float32
    inputs = BackwardInputs(torch.empty_like(out), q, k, v, out, total, tokens == keys)
    gradients = KERNELS[kernel].backward(inputs)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("wanted", ["cudnn", "flash", "memory-efficient"])
def test_a_kernel_of_torch_can_be_asked_for(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    need = AttentionRequirements("cuda", torch.bfloat16, 64)
    tried: list[str] = []

    def first(kernels: dict[str, Any], _: Any) -> tuple[str | None, list[str]]:
        tried.extend(kernels)
        return next(iter(kernels)), []

    monkeypatch.setattr(selection, "selected", {})
    monkeypatch.setattr(selection, "first_verified", first)
    asked = Sdpa(DIMS, kernel=wanted)
    assert wanted in str(asked.require(need))
    assert tried == [f"{wanted} with Triton's dQ", wanted]
    monkeypatch.setattr(selection, "first_verified", lambda kernels, _: (None, ["it is off"]))
    monkeypatch.setattr(selection, "selected", {})
    for refused in (need, need._replace(device="cpu"), need._replace(has_mask=True)):
        with pytest.raises(Unsupported, match=f"kernel = '{wanted}'"):
            asked.require(refused)
    with pytest.raises(Unsupported, match="joint"):
        Sdpa(DIMS, method="joint", kernel=wanted)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("own_queries", [False, True])
def test_a_kernel_leaves_sinks_to_plain_products(
    shared: int, own_queries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"sinks": True, "memory": True, "bias": "no", "documents": False, "shared": shared}
    parts, leaves = attention_case(**case, own_queries=own_queries)  # type: ignore[arg-type]
    inner = KERNELS["cpu"]
    taken: list[Any] = []
    forward = type(inner).forward

    def note(self: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        taken.append((k.shape[1], causal))
        return forward(self, q, k, v, causal)

    monkeypatch.setattr(type(inner), "forward", note)
    monkeypatch.setattr(short_blocks, "SHORT", parts[0].k.shape[1])
    actual, expected = merged_attention(ShortBlocks(inner), parts), one_by_one(parts)
    assert distance(actual, expected) < 1e-12
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected)]
    assert max(distance(a, b) for a, b in zip(*gradients, strict=True)) < 1e-12
    assert (parts[0].k.shape[1], False) not in taken and taken[-1][1]


def test_sinks_in_half_precision_are_rounded_as_eager_attention_rounds() -> None:
    """A bfloat16 product is off by half a unit in its last place, 2^-9 of it, and so are output
    and gradients of a softmax of scores of size 1.
    """
    need = AttentionRequirements("cpu", torch.float64, 64)
    exact, rounded = (
        run_probe(
            need._replace(dtype=dtype),
            ProbeSize(48, 80, 16),
            partial(merged_attention, ShortBlocks(KERNELS["cpu"])),
        )
        for dtype in (torch.float64, torch.bfloat16)
    )
    for name, tensor in exact.items():
        assert distance(rounded[name].double(), tensor) < 8 * 2**-9, name


def test_kernels_are_tried_before_they_are_used() -> None:
    need = AttentionRequirements("cpu", torch.float32, 32)
    assert find_fault(KERNELS["cpu"], need) is None
    grouped = need._replace(queries_per_kv=3)
    assert find_fault(KERNELS["cpu"], grouped) is None
    assert find_fault(EachQueryOfGroup(KERNELS["cpu"]), grouped) is None
    # wherever it is first asked for
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert find_fault(KERNELS["cpu"], need) is None

    class Deaf(type(KERNELS["cpu"])):  # type: ignore[misc]
        """Looks at its own part alone."""

        def backward(self, inputs: BackwardInputs) -> Any:
            out, total = self.forward(inputs.q, inputs.k, inputs.v, inputs.causal)
            return super().backward(inputs._replace(out=out, logsumexp=total))

    assert "off by" in str(find_fault(Deaf(), need))
    assert find_fault(KERNELS["cudnn"], need)  # it does not run here, and says so
    assert first_verified({"deaf": Deaf(), "sound": KERNELS["cpu"]}, need)[0] == "sound"
    assert first_verified({"deaf": Deaf()}, need)[0] is None


OnCpu: type[Any] = type(KERNELS["cpu"])


class NotFinite(OnCpu):
    """One of the gradients it finds is not a number."""

    def __init__(self, which: int) -> None:
        self.which = which

    def backward(self, inputs: BackwardInputs) -> Any:
        gradients = list(super().backward(inputs))
        gradients[self.which] = gradients[self.which].index_fill(1, torch.tensor([0]), torch.nan)
        return tuple(gradients)


class TakesForDense(OnCpu):
    """Reads values as if they lay side by side in memory."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        return super().forward(
            q, k, v.as_strided(v.shape, torch.empty(v.shape).stride()) if v.stride(0) else v, causal
        )


class Shared(OnCpu):
    """Gives every row the first one's gradient where all rows share their keys."""

    def backward(self, inputs: BackwardInputs) -> Any:
        dq, dk, dv = super().backward(inputs)
        return (dq, dk[:1].expand_as(dk), dv) if inputs.k.stride(0) == 0 else (dq, dk, dv)


class Refuses(OnCpu):
    """Raises what no one has heard of."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def forward(self, *_: Any) -> Any:
        raise self.error


class DslError(Exception):
    """As a package's own compiler raises."""


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        *(
            (NotFinite(which), f"gradient of {name} is off by nan")
            for which, name in enumerate(("queries", "keys", "values"))
        ),
        (TakesForDense(), "output is off"),
        (Shared(), "gradient of sinks' keys is off"),
        (Refuses(ValueError("no such tile\nand more")), "no such tile"),
        (Refuses(DslError()), "DslError"),
    ],
)
def test_a_kernel_that_fails_where_models_would_use_it_is_not_used(
    kernel: Any, reason: str
) -> None:
    need = AttentionRequirements("cpu", torch.float32, 32)
    assert reason in str(find_fault(kernel, need))
    assert first_verified({"planted": kernel, "sound": KERNELS["cpu"]}, need)[0] == "sound"


def test_fused_kernels_say_that_they_have_no_second_derivative() -> None:
    with pytest.raises(Unsupported, match="second derivative"):
        Sdpa(DIMS).require(AttentionRequirements("cpu", torch.float32, 8, double_backward=True))


def test_rotation_needs_pairs() -> None:
    with pytest.raises(Unsupported, match="odd"):
        Rope(Dims(9, 3, 4, 1))


# ---------- parameters


@pytest.mark.parametrize(
    "arm", [{"memories": XL | REGISTERS}, {"ffn": Gelu}, {"positional": NoPosition, "memories": XL}]
)
def test_an_exchanged_component_moves_no_other_parameter(arm: dict[str, Any]) -> None:
    control, other = tiny(memories=XL).state_dict(), tiny(**({"memories": XL} | arm)).state_dict()
    shared = [
        name for name in control if name in other and control[name].shape == other[name].shape
    ]
    assert len(shared) > len(control) / 2
    assert {name for name in control if ".ffn." not in name} <= set(shared)
    assert all(torch.equal(control[name], other[name]) for name in shared)
    assert not torch.equal(
        control["blocks.0.attention.query.weight"],
        tiny(seed=1).state_dict()["blocks.0.attention.query.weight"],
    )


class Unfilled(LayerNorm):
    """Owns a parameter and does not say how it starts."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = torch.nn.Parameter(torch.empty(1))


def test_a_parameter_that_nobody_fills_is_told() -> None:
    with pytest.raises(PluginError, match=r"Unfilled at 'input_norm'.*reset_parameters"):
        tiny(norm=Unfilled)


def test_registers_may_be_exempt_from_decay() -> None:
    for decays in (True, False):
        groups = build_parameter_groups(
            build(memories={"registers": partial(Registers, weight_decay=decays)})
        )
        decayed, undecayed = (set(group["names"]) for group in groups)
        assert groups[1]["weight_decay"] == 0
        assert ("blocks.0.attention.memory.registers.keys" in decayed) is decays
        assert ("blocks.1.attention.memory.registers.values" in undecayed) is not decays


VARIANTS: dict[str, Callable[[Dims], dict[str, Any]]] = {
    "default_reg16_frozen": lambda dims: {"dims": dims, "memories": {"registers": Registers}},
    "reg16_trainable": lambda dims: {"dims": dims, "memories": {"registers": Registers}},
    "reg0_trainable": lambda dims: {"dims": dims},
    "reg16_nobias_trainable": lambda dims: {
        "dims": dims._replace(bias=False),
        "memories": {"registers": Registers},
    },
    "reg16_gelu_trainable": lambda dims: {
        "dims": dims,
        "memories": {"registers": Registers},
        "ffn": Gelu,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", COUNTS)
def test_parameters_are_as_many_as_the_originals(size: str, variant: str) -> None:
    golden = COUNTS[size]
    dims = Dims(golden["d_model"], golden["n_heads"], golden["d_ffn"], golden["n_layers"])
    decoder = build(
        **VARIANTS[variant](dims), vocab_size=golden["vocab_size"], d_vocab=golden["d_vocab"]
    )
    decoder.vocabulary.table.requires_grad_(not variant.endswith("frozen"))
    expected = golden["variants"][variant]
    decayed, undecayed = (
        sum(p.numel() for p in group["params"])
        for group in build_parameter_groups(TrainModule(decoder, {}))
    )
    assert (decayed, undecayed) == (expected["decayed"], expected["not_decayed"])
    assert sum(p.numel() for p in decoder.parameters()) == expected["total"]
    assert len(list(decoder.parameters())) == expected["n_tensors"]
