"""An optimizer's nested state in the files of a checkpoint, and what no checkpoint can hold."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_parts import drive, small_model
from torch import Tensor

from lswt_core.budget.memory import optimizer_bytes
from lswt_core.checkpoint import Store, verify
from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.conformance import checks
from lswt_core.errors import CheckpointError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer


class Nested(Optimizer):
    """Momentum, kept as optimizers of libraries keep theirs."""

    name = "nested"
    citation = "@misc{nested, title={Nested}}"

    def __init__(self, groups: Any, *, lr: float = 0.02) -> None:
        super().__init__(groups, {"lr": lr})

    def first(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter."""
        return {
            "Q": [torch.zeros_like(p), None, [torch.ones(2, dtype=torch.float64), torch.arange(3)]],
            "by": {
                "half": torch.zeros_like(p, dtype=torch.bfloat16),
                7: {"a/b": torch.tensor(True)},
                "none": {},
            },
            "pair": (torch.zeros(()), 3),
            "a~/b": torch.zeros_like(p),
            "best": math.inf,
            "mode": "warm",
            "ready": False,
            "empty": [],
            "count": 0,
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"] = group.get("seen", torch.zeros(())) + 1
            group["past"] = [*group.get("past", []), int(group["seen"])]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(self.first(p))
                self.move(group, p, self.state[p])

    def move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """One update, with all that is kept."""
        momentum, half = state["Q"][0], state["by"]["half"]
        momentum.lerp_(p.grad, 0.3)
        half.add_(momentum)
        state["a~/b"].add_(half)
        state["Q"][2][1].add_(1)
        state["count"] += 1
        state["best"] = min(state["best"], float(momentum.norm()))
        state["ready"] = state["mode"] == "warm"
        scale = state["best"] / (
            state["count"] + len(group["past"]) + int(state["Q"][2][1].sum()) + float(group["seen"])
        )
        p.sub_(momentum + state["a~/b"], alpha=group["lr"] * scale)


class Unsaveable(Nested, Optimizer):
    """Keeps what is no number."""

    name = "unsaveable"

    def first(self, p: Tensor) -> dict[str, Any]:
        return super().first(p) | {"past": deque([1.0])}


@hookimpl
def lswt_components() -> list[type]:
    return [Nested, Unsaveable]


def built(params: list[Tensor], kind: type[Nested] = Nested) -> Nested:
    return kind([{"name": "all", "params": params, "names": ["a", "b"]}], lr=0.1)


def same(one: Any, other: Any) -> bool:
    """Equal in structure, types and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_nested_state_is_saved_and_restored_to_the_bit(tmp_path: Path) -> None:
    params = small_model()
    optimizer = built(params)
    drive(optimizer, params, range(7))
    tensors, document = optimizer_state(optimizer)
    saved = verify(
        Store(tmp_path / "checkpoints").save(7, {"optimizer": tensors}, {"optimizer": document})
    )
    twins = [p.detach().clone().requires_grad_() for p in params]
    resumed = built(twins)
    restore_optimizer(resumed, saved.tensors("optimizer"), saved.document("optimizer"))
    assert all(
        same(dict(optimizer.state[p]), dict(resumed.state[q]))
        for p, q in zip(params, twins, strict=True)
    )
    assert same(optimizer.param_groups[0]["past"], resumed.param_groups[0]["past"])
    assert same(optimizer.param_groups[0]["seen"], resumed.param_groups[0]["seen"])
    drive(optimizer, params, range(7, 12))
    drive(resumed, twins, range(7, 12))
    assert all(a.equal(b) for a, b in zip(params, twins, strict=True))


def test_a_rank_with_some_of_the_parameters_restores_those_by_name() -> None:
    """As ranks do that take turns with whole matrices: not every one has some of each group."""
    params = small_model()
    halves = [params[:1], params[1:]]
    names = [[f"p{i}" for i in range(1)], [f"p{i}" for i in range(1, len(params))]]
    groups = [
        {"name": name, "params": half, "names": own}
        for name, half, own in zip(("first", "rest"), halves, names, strict=True)
    ]
    optimizer = Nested(groups)
    drive(optimizer, params, range(3))
    optimizer.param_groups[0]["past"] = ["first"]
    tensors, document = optimizer_state(optimizer)
    twins = [p.detach().clone().requires_grad_() for p in halves[1]]
    part = Nested([{"name": "rest", "params": twins, "names": names[1]}])
    own = {name: t for name, t in tensors.items() if not name.startswith("p0/")}
    restore_optimizer(part, own, document)
    assert part.param_groups[0]["past"] == optimizer.param_groups[1]["past"]
    assert all(
        same(dict(optimizer.state[p]), dict(part.state[q]))
        for p, q in zip(halves[1], twins, strict=True)
    )
    stranger = Nested([{"name": "other", "params": twins, "names": names[1]}])
    with pytest.raises(CheckpointError, match="'other'"):
        restore_optimizer(stranger, own, document)


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    params = small_model()
    optimizer = built(params, Unsaveable)
    drive(optimizer, params, range(1))
    with pytest.raises(CheckpointError, match=r"a/past.*deque"):
        optimizer_state(optimizer)
    other = built(params)
    other.state["all"] = {"count": torch.zeros(())}  # type: ignore[index]
    with pytest.raises(CheckpointError, match="'all'"):
        optimizer_state(other)


def test_a_plan_counts_nested_tensors_and_refuses_what_no_checkpoint_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Nested, "move", lambda *_: None)  # which looks at numbers
    params = small_model(device="meta")
    numbers = sum(p.numel() for p in params)
    assert optimizer_bytes(built(params)) == numbers * (4 + 4 + 2) + 2 * (2 * 8 + 3 * 8 + 1 + 4)
    with pytest.raises(CheckpointError, match="past"):
        optimizer_bytes(built(params, Unsaveable))


def test_the_kit_asks_the_files_themselves() -> None:
    results = {str(one): one.result() for one in checks(__name__) if one.rule.name == "resume"}
    assert results["optimizer/nested: resume"].outcome == "ok"
    assert results["optimizer/unsaveable: resume"].outcome == "FAILED"
    assert "past" in results["optimizer/unsaveable: resume"].message
