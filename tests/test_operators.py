"""Custom operators of a module that is loaded more than once, as an exported model's code is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Operation = Callable[[Any], Tensor]


def draw(*shape: int) -> Tensor:
    """A tensor without numbers, for the shapes of results."""
    return torch.empty(*shape, device="meta")


ROWS, KEYS, SUMS = draw(2, 5, 3, 8), draw(2, 7, 3, 8), draw(2, 3, 5)
GATES, STATE, FIRST = draw(2, 5, 3), draw(2, 3, 8, 8), draw(2, 5)
EXPERTS = draw(4, 6, 8), draw(5)
LINEAR = (ROWS, ROWS, ROWS, GATES, None, STATE, FIRST)
OPERATIONS: list[tuple[str, Operation, tuple[int, ...]]] = [
    (
        "lswt_core.plugin_api.query_gradient",
        lambda module: module.differentiate_queries(ROWS, ROWS, KEYS, KEYS, ROWS, SUMS, 0.0),
        (2, 5, 3, 8),
    ),
    (
        "lswt_core.plugin_api.fla_kernels",
        lambda module: module.forward_operator(*LINEAR)[0],
        (2, 5, 3, 8),
    ),
    (
        "lswt_core.plugin_api.fla_kernels",
        lambda module: module.backward_operator(ROWS, STATE, *LINEAR)[3],
        (2, 5, 3),
    ),
    (
        "lswt_flash.versions",
        lambda module: module.flash_attend(ROWS, KEYS, KEYS, False, 0.0, 2)[1],
        (2, 3, 5),
    ),
    (
        "lswt_flash.versions",
        lambda module: module.flash_differentiate(
            ROWS, ROWS, KEYS, KEYS, ROWS, SUMS, False, 0.0, 2, False
        )[1],
        (2, 7, 3, 8),
    ),
    ("lswt_moe.grouped", lambda module: module.grouped_linear(draw(5, 8), *EXPERTS), (5, 6)),
    (
        "lswt_moe.grouped",
        lambda module: module.grouped_outer(draw(5, 6), draw(5, 8), EXPERTS[1], 4),
        (4, 6, 8),
    ),
]


def load_again(module: ModuleType, name: str) -> ModuleType:
    """The module's file, loaded as a module of another or of the same name."""
    assert module.__file__ is not None
    spec = spec_from_file_location(name, module.__file__)
    assert spec is not None and spec.loader is not None
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize("name", [None, "transformers_modules.out.modeling_lswt"])
@pytest.mark.parametrize(("module", "call", "shape"), OPERATIONS)
def test_every_copy_of_a_module_keeps_its_operators(
    module: str, call: Operation, shape: tuple[int, ...], name: str | None
) -> None:
    first = importlib.import_module(module)
    copies = [load_again(first, name or module) for _ in range(2)]
    assert sys.modules[module] is first
    assert [tuple(call(each).shape) for each in (first, *copies)] == [shape] * 3


def test_a_copy_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a copy of the same name, as an export's that was written again."""
    first = importlib.import_module("lswt_moe.grouped")
    copy = load_again(first, first.__name__)
    monkeypatch.setattr(copy, "has_fused_kernel", lambda *_: pytest.fail("the copy's"))
    x, weight, expert = torch.ones(2, 3), torch.ones(1, 4, 3), torch.zeros(2, dtype=torch.int64)
    assert first.grouped_linear(x, weight, expert).tolist() == [[3.0] * 4] * 2
    with pytest.raises(pytest.fail.Exception, match="the copy's"):
        copy.grouped_linear(x, weight, expert)
