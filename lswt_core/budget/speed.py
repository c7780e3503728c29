"""How long a run takes: work over rates, the rates measured here in a second or taken from a data
sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from lswt_core.budget.flops import Flops
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_optimizer
from lswt_core.plugin_api.pytree import detach_state
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

ROWS, ROWS_OF_ACCELERATOR = 512, 8192  # of the matrices that are multiplied to calibrate
CALLS = 50  # between two waits for an accelerator, whose products take less than a wait
COPIED = 1 << 26  # bytes copied to calibrate: more than a cache holds
SPENT = 0.3  # seconds a measurement takes, unless FEWEST calls take longer
FEWEST = 3
# bytes moved per token, layer and unit of width, forward and backward, by operations other than
# matrix products
ELEMENTWISE = 170
OPTIMIZER = 34  # bytes moved per parameter and step by gradients and a second-order optimizer


class Accelerator(NamedTuple):
    """A machine's rates."""

    name: str
    flops: float  # dense matrix products in 16 bits, per second
    bandwidth: float  # bytes of memory per second
    memory: int  # bytes
    efficiency: float  # the share of ``flops`` that training reaches in matrix products
    source: str
    called: tuple[str, ...] = ()  # what such devices call themselves


GIB = 1 << 30
A100 = "NVIDIA A100 data sheet, 2021"
ACCELERATORS = {  # dense bf16 figures of the vendors' data sheets
    one.name: one
    for one in (
        Accelerator(
            "a100-40gb",
            312e12,
            1.555e12,
            40 * GIB,
            0.6,
            A100,
            ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        ),
        Accelerator(
            "a100-80gb",
            312e12,
            2.039e12,
            80 * GIB,
            0.6,
            A100,
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        ),
        Accelerator(
            "h100",
            989.4e12,
            3.35e12,
            80 * GIB,
            0.6,
            "NVIDIA H100 SXM data sheet, 2023",
            ("NVIDIA H100 80GB HBM3",),
        ),
        Accelerator(
            "h200",
            989.4e12,
            4.8e12,
            141 * 10**9,
            0.6,
            "NVIDIA H200 data sheet, 2024",
            ("NVIDIA H200",),
        ),
        Accelerator(
            "b200",
            2250e12,
            8e12,
            180 * GIB,
            0.6,
            "NVIDIA DGX B200 data sheet, 2024",
            ("NVIDIA B200",),
        ),
        Accelerator(
            "mi300x",
            1307e12,
            5.3e12,
            192 * GIB,
            0.5,
            "AMD Instinct MI300X data sheet, 2023",
            ("AMD Instinct MI300X",),
        ),
    )
}


def accelerator_called(name: str) -> Accelerator | None:
    """The accelerator that calls itself so; others of its family have other rates."""
    return next((one for one in ACCELERATORS.values() if name in one.called), None)


def here(recipe: Recipe, device: torch.device, memory: int) -> Accelerator:
    """Rates of this machine: matrix products at the model's width in the run's precision, and
    copies.
    """
    dtype = Precision.choose(recipe.train.precision, device).dtype
    width, rows = recipe.model.d_model, ROWS if device.type == "cpu" else ROWS_OF_ACCELERATOR
    a, b = (
        torch.randn(rows, width, device=device, dtype=dtype),
        torch.randn(width, 4 * width, device=device, dtype=dtype),
    )
    source, target = (
        torch.empty(COPIED, dtype=torch.uint8, device=device).fill_(1) for _ in range(2)
    )
    calls = 1 if device.type == "cpu" else CALLS
    product = timed(lambda: a @ b, device, calls=calls)
    copy = timed(lambda: target.copy_(source), device, calls=calls)
    return Accelerator(
        str(device),
        2 * rows * width * 4 * width / product,
        2 * COPIED / copy,
        memory,
        1.0,
        "measured just now",
    )


def timed(
    function: Callable[[], object], device: torch.device, times: int = 0, calls: int = 1
) -> float:
    """The median of a function's time in seconds: measured some times, or as often as a moment
    allows, each time over ``calls`` calls that the device is waited for after.
    """
    taken: list[float] = []
    began = time.perf_counter()
    while (
        len(taken) < times if times else len(taken) < FEWEST or time.perf_counter() - began < SPENT
    ):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append((time.perf_counter() - start) / calls)
    return median(taken[1:] or taken)


def measured_tokens_per_second(
    recipe: Recipe, registry: Registry, world: World, flops: Flops, micro: int
) -> float:
    """What a warm step of the model reaches on this machine: a micro-batch forward and backward,
    and an update.
    """
    precision = Precision.choose(recipe.train.precision, world.device)
    loss = build_model(recipe, registry, device=world.device, dtype=precision.dtype).loss
    materialise(loss, recipe, world.device)
    optimizer = build_optimizer(recipe, registry, loss)
    ids = torch.randint(
        recipe.embedding.vocab_size, (micro, recipe.train.seq_len), device=world.device
    )
    batch, state = Batch(ids, ids), None
    for _ in range(2):  # until the memories are full, or nearly
        state = detach_state(loss(batch, state).state)

    def step() -> None:
        with precision.autocast(world.device):
            result = loss(batch, state)
        result.loss.backward()

    once = timed(step, world.device)
    update = timed(
        optimizer.step, world.device, times=min(optimizer.hessian_update_interval or FEWEST, FEWEST)
    )  # more would ask for a refresh
    return 1 / (
        once * (1 + flops.update_curvature / flops.train) / ids.numel()
        + update / recipe.train.tokens_per_step
    )


def tokens_per_second(
    recipe: Recipe, flops_per_token: int, parameters: int, machine: Accelerator
) -> float:
    """An estimate for one process from a machine's rates: matrix products, elementwise passes and
    the optimizer's, one after another.
    """
    width, layers = recipe.model.d_model, recipe.model.n_layers
    products = flops_per_token / (machine.flops * machine.efficiency)
    passes = ELEMENTWISE * width * layers / machine.bandwidth
    update = OPTIMIZER * parameters / machine.bandwidth / recipe.train.tokens_per_step
    return 1 / (products + passes + update)
