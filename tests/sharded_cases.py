"""Two steps of small models by one process or by several ranks, in float64: what must come out
alike whatever the mesh. Run as a module by every rank of ``run_ranks``, it leaves a file.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import mistakes
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.interfaces import IGNORE, Batch
from lswt_core.model.build import build_model, materialise
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.sharded_tensor import full_tensor, local_tensor
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.train import update
from lswt_core.train.start import choose_sharding
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext

ROWS, LENGTH, VOCABULARY = 8, 6, 29
Tensors = dict[str, Tensor]
BASE: dict[str, dict[str, Any]] = {
    "model": {"d_model": 16, "n_heads": 2, "n_layers": 2, "init_std": 0.2},
    "embedding": {"vocab_size": VOCABULARY, "d_vocab": 8},
    "memory": {"registers": {"count": 2}, "xl": {"use": "xl-cache", "length": 4}},
    "loss": {"simctg": {"weight": 0.7, "margin": 0.9}},
    "optimizer": {"use": "adamw"},
    "train": {"steps": 2, "batch_size": ROWS, "seq_len": LENGTH, "micro_batch_size": 1},
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "xl-hidden": {"memory": {"xl": {"use": "xl-hidden", "length": 4}}},
    "compressed": {"memory": {"xl": {"use": "compressed", "length": 1, "slots": 2, "rate": 2}}},
    "t5": {"positional": {"use": "t5"}},
    "rmsnorm": {
        "norm": {"use": "rmsnorm"},
        "qk_norm": {"use": "rms"},
        "ffn": {"use": "gelu"},
        "cross_entropy": {"use": "dense"},
    },
    "moe": {"ffn": {"use": "moe"}},
    "hyper-connections": {"block": {"use": "hyper-connections"}},
    "gated-delta-net": {
        "mixer": {"use": "gated-delta-net"},
        "memory": {},
        "positional": {"use": "none"},
    },
    "multi-token": {"loss": {"multi-token": {"weight": 0.3}}},
    "mup": {"head": {"use": "untied"}, "parametrisation": {"use": "mup"}},
    "frozen": {"embedding": {**BASE["embedding"], "trainable": False}},
    "checkpointing": {"train": {**BASE["train"], "activation_checkpointing": "block"}},
    "two rows": {"train": {**BASE["train"], "micro_batch_size": 2}},
    "compiled": {"train": {**BASE["train"], "compile": "blocks"}},
    "bfloat16": {},
    "float32": {},
    "deep": {"model": {**BASE["model"], "n_layers": 4}},
}
EVERY = [name for name in CASES if name not in ("compiled", "bfloat16", "float32", "deep")]
PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, "as on an accelerator"),
    "float32": Precision(torch.float32, "as it is"),
}
DOUBLE = Precision(torch.float32, "nothing is cast: parameters are float64")


def build(case: str, world: World) -> TrainModule:
    """A model with its initial values, cut over the ranks."""
    recipe, registry = Recipe.from_dict({**BASE, **CASES[case]}), Registry()
    precision = PRECISIONS.get(case, DOUBLE)
    loss = build_model(recipe, registry, device=world.device, dtype=precision.dtype).loss
    if case not in PRECISIONS:
        loss._apply(lambda tensor: tensor.double() if tensor.dtype == torch.float32 else tensor)
    materialise(loss, recipe, world.device, choose_sharding(world, recipe, registry, precision))
    return loss


def batch_of(number: int) -> Batch:
    """Random tokens with scattered padding and ignored labels, unevenly many a row."""
    draws = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 2), generator=draws)
    share = torch.linspace(0.1, 0.7, ROWS)[:, None]
    valid, ignored = (torch.rand(ROWS, LENGTH, generator=draws) > share for _ in range(2))
    labels = ids[:, 1 : LENGTH + 1].masked_fill(~ignored, IGNORE)
    return Batch(ids[:, :LENGTH], labels, valid, labels_ahead=ids[:, LENGTH + 1 :])


class Steps:
    """Steps of one model, memories carried along, and what came out of them."""

    def __init__(self, case: str, world: World) -> None:
        self.loss, self.world = build(case, world), world
        wanted = CASES[case].get("train", BASE["train"])["micro_batch_size"]
        rows = world.rows(ROWS)
        size = min(wanted, len(rows))
        precision = PRECISIONS.get(case, DOUBLE)
        self.context = StepContext(self.loss, world, precision, 1, rows, size)
        self.memory: list[Any] = [None] * (len(rows) // size)
        self.tensors: Tensors = {}

    def step(self, number: int, sampling: float = 0.0) -> Step:
        """Step ``number``, from 0."""
        rows = self.context.rows
        batch = batch_of(number).map(lambda tensor: tensor[rows.start : rows.stop])
        if not self.loss.lookahead:
            batch = batch._replace(labels_ahead=None)
        return Step(self.context, batch, self.memory, number, sampling=sampling)

    def train(self, number: int) -> None:
        """One clipped update by gradient descent."""
        step = self.step(number)
        step.backward("data")
        self.memory = step.next_memory
        params = trainable_parameters(self.loss)
        norm = update.gradient_norm(params)
        self.keep(f"{number}", self.gradients() | {"norm": norm.reshape(1)})
        self.keep(f"{number}.loss", {"": self.world.sum(torch.stack(step.local_totals()))})
        update.clip_gradients(params, norm, float(norm), float(norm) / 2)
        with torch.no_grad():
            for p in params:
                local_tensor(p).sub_(local_tensor(p.grad), alpha=0.3)  # type: ignore[arg-type]
        self.keep(f"{number}.after", dict(self.loss.named_parameters()))
        self.loss.zero_grad()

    def gradients(self) -> Tensors:
        """Every gradient, by name."""
        return {name: p.grad for name, p in self.loss.named_parameters() if p.grad is not None}

    def keep(self, prefix: str, tensors: Tensors) -> None:
        """Remember tensors, whole."""
        for name, tensor in tensors.items():
            self.tensors[f"{prefix}.{name}"] = full_tensor(tensor.detach()).clone()

    def evaluate(self) -> None:
        """A pass with other weights, as those of an average, which leave again after it."""
        with torch.no_grad():
            pieces = [local_tensor(p) for p in self.loss.parameters()]
            trained = [piece.clone() for piece in pieces]
            torch._foreach_mul_(pieces, 0.5)
            states, _ = self.loss.hidden_states(batch_of(9).inputs)
            torch._foreach_copy_(pieces, trained)
        self.keep("evaluated", {"states": states})


def run_case(case: str, world: World) -> Tensors:
    """Two updates with an evaluation between them."""
    torch.manual_seed(0)
    steps = Steps(case, world)
    steps.train(0)
    steps.evaluate()
    steps.train(1)
    return steps.tensors


def run_curvature(world: World) -> Tensors:
    """Sampled gradients that share a forward pass, and a Hessian-vector product."""
    steps = Steps("plain", world)
    step = steps.step(0, sampling=0.5)
    step.backward("data")
    assert step.sampled is not None
    steps.loss.zero_grad()
    step.sampled.backward("sampled")
    steps.keep("sampled", steps.gradients())
    params = list(steps.loss.parameters())
    products = step.hessian_vector_product(params, [torch.ones_like(p) for p in params])
    steps.keep("hessian", {str(i): product for i, product in enumerate(products)})
    return steps.tensors


def run_abandoned(world: World, abandon: bool = False) -> Tensors:
    """A step after one that, with ``abandon``, ended after its first micro-batch."""
    steps = Steps("plain", world)
    if abandon:
        mistakes.abandon(steps.step(1))
        steps.loss.zero_grad()
    steps.train(0)
    return steps.tensors


COLLECTIVES = {  # by the names that they have in some version of torch
    "all-gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all-reduce": ("all_reduce",),
}


def run_counted(world: World) -> Tensors:
    """How many collectives of each kind one step makes, for models of 2 and 4 blocks."""
    found = {}
    for n_layers in (2, 4):
        steps = Steps("plain" if n_layers == 2 else "deep", world)
        step = steps.step(0)
        calls = Counter[str]()
        with planted(partial(mistakes.count_calls, calls, COLLECTIVES)):
            step.backward("data")
        found |= {f"{n_layers} {kind}": torch.tensor(calls[kind]) for kind in COLLECTIVES}
    return found


def run_compiled(world: World) -> Tensors:
    """One update with compiled blocks, for which no code is generated."""
    with planted(mistakes.compile_without_code):
        steps = Steps("compiled", world)
        steps.train(0)
    return steps.tensors


@contextmanager
def planted(plant: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    """Make a mistake within the block."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        yield


@cache
def alone(what: str) -> Tensors:
    """What one process finds."""
    return run(what, World())


def run(what: str, world: World) -> Tensors:
    """A case by its name; "mistake NAME": with a planted mistake."""
    other: dict[str, Callable[[World], Tensors]] = {
        "curvature": run_curvature,
        "abandoned": run_abandoned,
        "compiled": run_compiled,
        "counted": run_counted,
    }
    kind, _, name = what.partition(" ")
    if kind == "mistake":
        mistake = mistakes.MISTAKES[name]
        with planted(mistake.plant):
            if mistake.case == "abandoned":
                return run_abandoned(world, abandon=True)
            return run(mistake.case, world)
    return other[what](world) if what in other else run_case(what, world)


def main(directory: str, shards: str, *names: str) -> None:
    """What a rank finds of some cases; the first leaves it in a file."""
    torch.set_num_threads(1)
    with World.read().connected() as connected:
        world = connected.with_mesh(int(shards))
        found = {f"{name}/{key}": t for name in names for key, t in run(name, world).items()}
        if world.rank == 0:
            save_file(found, Path(directory) / "found.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
