"""Memory states in the host's memory and in narrow types: each pass sees the state it is to see."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny, tokens
from lswt_registers import Registers
from lswt_xl_cache import XlCache
from runs import assert_same_bits, lines, run_inside, write_recipe

from lswt_core.plugin_api.pytree import tree_map
from lswt_core.train.loop import TrainingLoop
from lswt_core.train.memory_placement import (
    DeviceMemory,
    HostMemory,
    MemoryPlacement,
    Transfer,
    placement_on,
)
from lswt_core.train.narrow_memory import NarrowMemory, narrow, widen


class Rehearsed(HostMemory):
    """Host memory without an accelerator: transfers are copies, which are complete only when they
    are received; before that they hold nothing.
    """

    def __init__(self) -> None:
        self.ahead, self.sent = {}, []

    def send(self, source: Any) -> Transfer:
        self.sent.append(source)
        empty = tree_map(lambda t: torch.full_like(t, float("nan")), source)
        return Transfer(source, empty, None)  # type: ignore[arg-type]

    def receive(self, transfer: Transfer) -> Any:
        return tree_map(torch.clone, transfer.source)

    def keep(self, state: Any) -> Any:
        return tree_map(lambda t: t.detach().clone(), state)


def states(*numbers: float) -> list[Any]:
    return [({"xl": {"k": torch.full((2, 3), float(number))}},) for number in numbers]


def number_of(state: Any) -> float:
    return float(state[0]["xl"]["k"][0, 0])


def test_every_pass_gets_its_state_and_the_next_is_read_ahead() -> None:
    placement, memory = Rehearsed(), states(1, 2, 3)
    for i in range(3):
        assert number_of(placement.fetch(memory, i)) == i + 1
        assert len(placement.sent) == min(i + 2, 3)
    assert not placement.ahead


def test_what_a_step_that_was_given_up_read_ahead_is_not_used() -> None:
    placement = Rehearsed()
    placement.fetch(states(1, 2, 3), 0)
    after = states(4, 5, 6)
    assert number_of(placement.fetch(after, 1)) == 5
    placement.fetch(after, 0)
    assert number_of(placement.fetch(states(7, 8, 9), 1)) == 8


def test_a_cold_memory_stays_cold() -> None:
    placement: MemoryPlacement
    for placement in (Rehearsed(), DeviceMemory()):
        assert placement.fetch([None, None], 1) is None


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_cpu_has_one_memory(where: Any) -> None:
    assert isinstance(placement_on(where, torch.device("cpu")), DeviceMemory)


# ---------- narrow types

ROWS, KEYS, HEADS, WIDTH = 3, 5, 2, 4
# the largest error, as a share of the largest number of a row and head: half a step of 1/127; three
# bits behind the point of numbers up to 448 (half a step of 32); seven bits
ERRORS = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 16 / 448, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", ERRORS)
def test_a_narrow_tensor_is_off_by_the_rounding_of_its_type(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-3, 3, ROWS * HEADS).reshape(ROWS, 1, HEADS, 1)
    tensor = torch.randn(ROWS, KEYS, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))
    tensor = tensor * sizes
    tensor[0, :, 0] = 0
    kept = narrow(tensor, dtype)
    assert kept["values"].dtype == dtype and kept["scale"].shape == (ROWS, 1, HEADS, 1)
    left = widen({"k": kept, "v": kept})["k"]
    assert left.dtype == tensor.dtype
    largest = tensor.abs().amax(dim=(1, 3), keepdim=True)
    assert ((left - tensor).abs() <= ERRORS[dtype] * 1.001 * largest).all()
    assert not left[0, :, 0].any()


def test_only_keys_and_values_of_kv_caches_are_narrow() -> None:
    decoder = tiny(memories={"xl": partial(XlCache, length=4), "registers": Registers})
    placement = NarrowMemory(DeviceMemory(), decoder, torch.int8)
    with torch.no_grad():
        _, state = decoder(tokens(2, 6))
    kept = placement.keep((state[0] | {"ffn": torch.ones(2, 3)}, *state[1:]))
    assert kept[0]["xl"]["k"]["values"].dtype == torch.int8
    assert kept[0]["ffn"].equal(torch.ones(2, 3))
    left = placement.fetch([kept, None], 0)
    assert left[0]["xl"]["k"].shape == state[0]["xl"]["k"].shape
    assert placement.fetch([kept, None], 1) is None


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        pytest.param("int8", 2e-3, marks=pytest.mark.slow),
        pytest.param("float8", 1e-2, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2e-3, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_narrow_memory_learns_alike_and_resumes_bitwise(
    dtype: str,
    bound: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path)
    narrow_type = f"train.memory_dtype={dtype}"
    cases = {"wide": (), "narrow": (narrow_type,), "resumed": (narrow_type, "train.steps=12")}
    first = ("--out", tmp_path / "resumed", narrow_type)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "must_stop", lambda loop: loop.trainer.state.step == 7)
        assert run_inside(patched, capsys, recipe, *first).returncode == 75
    for name, more in cases.items():
        done = run_inside(monkeypatch, capsys, recipe, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "narrow", tmp_path / "resumed")
    wide, narrowed = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
        for name in ("wide", "narrow")
    )
    assert wide[:1] == narrowed[:1] and wide != narrowed
    assert max(abs(a - b) for a, b in zip(wide, narrowed, strict=True)) < bound
