"""Throughput and duration of a run: FLOPs and bytes over rates that are measured here within a
second, or taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from lswt_core.budget.flops import Flops
from lswt_core.device import Precision, device_name
from lswt_core.distributed.world import World
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_optimizer
from lswt_core.plugin_api.pytree import detach_state
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

CPU_ROWS, ACCELERATOR_ROWS = 512, 8192  # of the matrix product that is measured
ACCELERATOR_CALLS = 50  # between synchronisations, which take longer than one product
COPY_BYTES = 1 << 26  # more than a cache holds
MEASURE_SECONDS = 0.3  # per measurement, at least MIN_REPEATS times
MIN_REPEATS = 3
# bytes moved per token, layer and unit of width, forward and backward, by elementwise operations
ELEMENTWISE_BYTES = 170
OPTIMIZER_BYTES = 34  # moved per parameter and step by gradients and a second-order optimizer


class Accelerator(NamedTuple):
    """A machine's rates (a roofline)."""

    name: str
    flops: float  # dense 16-bit matrix products, per second
    bandwidth: float  # bytes of memory per second
    memory: int  # bytes
    efficiency: float  # share of ``flops`` that training reaches in matrix products
    source: str
    device_names: tuple[str, ...] = ()  # what torch calls such devices
    # bytes per second and direction: to the other devices of its machine, and to its host
    link: float = 25e9
    host_link: float = 25e9


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
            link=300e9,
            host_link=25e9,
        ),
        Accelerator(
            "a100-80gb",
            312e12,
            2.039e12,
            80 * GIB,
            0.6,
            A100,
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
            link=300e9,
            host_link=25e9,
        ),
        Accelerator(
            "h100",
            989.4e12,
            3.35e12,
            80 * GIB,
            0.6,
            "NVIDIA H100 SXM data sheet, 2023",
            ("NVIDIA H100 80GB HBM3",),
            link=450e9,
            host_link=50e9,
        ),
        Accelerator(
            "h200",
            989.4e12,
            4.8e12,
            141 * 10**9,
            0.6,
            "NVIDIA H200 data sheet, 2024",
            ("NVIDIA H200",),
            link=450e9,
            host_link=50e9,
        ),
        Accelerator(
            "b200",
            2250e12,
            8e12,
            180 * GIB,
            0.6,
            "NVIDIA DGX B200 data sheet, 2024",
            ("NVIDIA B200",),
            link=900e9,
            host_link=50e9,
        ),
        Accelerator(
            "mi300x",
            1307e12,
            5.3e12,
            192 * GIB,
            0.5,
            "AMD Instinct MI300X data sheet, 2023",
            ("AMD Instinct MI300X",),
            link=448e9,
            host_link=50e9,
        ),
    )
}


def find_accelerator(device_name: str) -> Accelerator | None:
    """Return the accelerator with this exact device name; variants of it have other rates."""
    for accelerator in ACCELERATORS.values():
        if device_name in accelerator.device_names:
            return accelerator
    return None


def measure_machine(recipe: Recipe, device: torch.device, memory: int) -> Accelerator:
    """Measure this machine: matrix products at the model's width in the run's precision, and
    copies.
    """
    dtype = Precision.choose(recipe.train.precision, device).dtype
    width, rows, calls = recipe.model.d_model, CPU_ROWS, 1
    if device.type != "cpu":
        rows, calls = ACCELERATOR_ROWS, ACCELERATOR_CALLS
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    product_seconds = median_seconds(lambda: a @ b, device, calls=calls)
    copy_seconds = median_seconds(lambda: target.copy_(source), device, calls=calls)
    copied = 2 * COPY_BYTES / copy_seconds
    machine = Accelerator(
        str(device),
        2 * rows * width * 4 * width / product_seconds,
        copied,
        memory,
        1.0,
        "measured just now",
    )
    if device.type == "cpu":  # processes send each other what they copy in memory
        return machine._replace(link=copied / 2, host_link=copied / 2)
    known = find_accelerator(device_name(device)) or machine
    return machine._replace(link=known.link, host_link=known.host_link)


def median_seconds(
    function: Callable[[], object], device: torch.device, repeats: int = 0, calls: int = 1
) -> float:
    """Return the median seconds of a call. It is measured ``repeats`` times, or (0) for
    MEASURE_SECONDS, each time over ``calls`` calls and a synchronisation; the first is a warm-up.
    """
    taken: list[float] = []
    began = time.perf_counter()

    def is_done() -> bool:
        if repeats:
            return len(taken) >= repeats
        return len(taken) >= MIN_REPEATS and time.perf_counter() - began >= MEASURE_SECONDS

    while not is_done():
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
    """Measure training throughput on this machine: forward and backward of a micro-batch with
    memories, and an optimizer step.
    """
    precision = Precision.choose(recipe.train.precision, world.device)
    loss = build_model(recipe, registry, device=world.device, dtype=precision.dtype).loss
    materialise(loss, recipe, world.device)
    optimizer = build_optimizer(recipe, registry, loss)
    shape = (micro, recipe.train.seq_len)
    ids = torch.randint(recipe.embedding.vocab_size, shape, device=world.device)
    batch, state = Batch(ids, ids), None
    for _ in range(2):  # until the memories are full, or nearly
        state = detach_state(loss(batch, state).state)

    def run_micro_batch() -> None:
        with precision.autocast(world.device):
            result = loss(batch, state)
        result.loss.backward()

    passes = median_seconds(run_micro_batch, world.device)
    # a further step would expect a new Hessian estimate
    repeats = min(optimizer.hessian_update_interval or MIN_REPEATS, MIN_REPEATS)
    update = median_seconds(optimizer.step, world.device, repeats=repeats)
    passes_per_token = passes * (1 + flops.update_curvature / flops.train) / ids.numel()
    return 1 / (passes_per_token + update / recipe.train.tokens_per_step)


def tokens_per_second(
    recipe: Recipe, flops_per_token: int, parameters: int, machine: Accelerator
) -> float:
    """Estimate the throughput of one process from a machine's rates: matrix products, elementwise
    operations and optimizer step, one after another.
    """
    width, layers = recipe.model.d_model, recipe.model.n_layers
    products = flops_per_token / (machine.flops * machine.efficiency)
    elementwise = ELEMENTWISE_BYTES * width * layers / machine.bandwidth
    update = OPTIMIZER_BYTES * parameters / machine.bandwidth / recipe.train.tokens_per_step
    return 1 / (products + elementwise + update)
