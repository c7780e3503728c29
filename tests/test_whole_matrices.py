"""Optimizers that update whole matrices, on parameters that are cut over two processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import tiny
from lswt_muon import Muon
from ranks import shard_model
from torch import Tensor, nn

from lswt_core.distributed.whole_matrices import WholeMatrices, share_out
from lswt_core.distributed.world import World
from lswt_core.model.parameters import build_parameter_groups
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.sharded_tensor import full_tensor, local_tensor


class Negated(Muon):
    """Evaluates the negatives of its weights."""

    name = "negated"

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        self.negate()
        yield
        self.negate()

    @torch.no_grad()
    def negate(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.neg_()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p).clone() for name, p in model.named_parameters()}


@torch.no_grad()
def restore_others(model: nn.Module) -> dict[str, Tensor]:
    """Other values, as a checkpoint gives them."""
    for p in model.parameters():
        local_tensor(p).add_(1)
    return values(model)


def check_evaluation(model: TrainModule, optimizer: type[Muon], sign: int) -> None:
    """What was restored is what is evaluated, and what is there afterwards."""
    whole = WholeMatrices(build_parameter_groups(model), optimizer)
    restored = restore_others(model)
    with whole.eval_parameters():
        for name, value in values(model).items():
            assert value.equal(sign * restored[name]), name
    for name, value in values(model).items():
        assert value.equal(restored[name]), name


def check_step(model: TrainModule) -> None:
    """A step begins at what was restored."""
    plain = TrainModule(tiny(), {})
    whole = WholeMatrices(build_parameter_groups(model), Muon)
    restored = restore_others(model)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(restored[name])
    alone = Muon(build_parameter_groups(plain))
    for one in (model, plain):
        for p in one.parameters():
            p.grad = torch.full_like(p, 0.5)
    whole.step()
    alone.step()
    after = values(plain)
    for name, value in values(model).items():
        assert value.equal(after[name]) and not value.equal(restored[name]), name


def process(rank: int, directory: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = TrainModule(tiny(), {})
    shard_model(model, World(rank, 2).with_mesh("all"))
    check_evaluation(model, Muon, 1)
    check_evaluation(model, Negated, -1)
    check_step(model)
    directory.joinpath(f"{rank} passed").touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_whole_matrices_follow_the_model(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("* passed")) == ["0 passed", "1 passed"]


def test_every_rank_has_about_as_much_to_do() -> None:
    owners = share_out([9, 1, 4, 4, 3, 2], 2)
    loads = [
        sum(n for n, owner in zip([9, 1, 4, 4, 3, 2], owners, strict=True) if owner == rank)
        for rank in range(2)
    ]
    assert sorted(loads) == [11, 12]
