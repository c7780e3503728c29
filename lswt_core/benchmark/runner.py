"""Run a benchmark: contenders in, plain data out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.benchmark.breakdown import measure_breakdown
from lswt_core.benchmark.ceilings import measure_ceilings
from lswt_core.benchmark.interleave import (
    Call,
    Spread,
    time_call,
    time_interleaved,
    time_ratio,
)
from lswt_core.benchmark.ours import Ours
from lswt_core.benchmark.step_profile import (
    CompileCounts,
    StepProfile,
    profile_step,
    storage_bytes,
)
from lswt_core.benchmark.work import Contender, Work
from lswt_core.budget import Budget
from lswt_core.budget.flops import Flops
from lswt_core.budget.speed import find_accelerator
from lswt_core.device import device_name

WARM_UP = 3  # steps that are not timed: one without memory, two with
COMPARED_STEPS = 3  # whose mean loss is reported


class Rounds(NamedTuple):
    """Number of timed rounds."""

    training: int
    evaluation: int
    decoding: int  # tokens


class Benchmark:
    """Contenders that do the same work in interleaved rounds."""

    def __init__(
        self,
        work: Work,
        contenders: Mapping[str, Contender],
        rounds: Rounds,
        report: Callable[[str], None],
    ) -> None:
        self.work, self.contenders, self.rounds, self.report = work, contenders, rounds, report
        self.batches = {name: work.batches() for name in contenders}  # the same for all
        self.losses: dict[str, list[float]] = {name: [] for name in contenders}

    def run(self) -> dict[str, Any]:
        """Return all measurements by contender."""
        warm_ups = {name: self.warm_up(name) for name in self.contenders}
        self.report("training")
        steps = {name: partial(self.prepare_step, name) for name in self.contenders}
        training = time_interleaved(steps, self.rounds.training, self.work.device)
        recompiled = CompileCounts.now().graphs - sum(
            counts.graphs for _, counts in warm_ups.values()
        )
        profiles = self.profile_steps()
        self.report("evaluation")
        evaluation = self.time_evaluation()
        self.report("decoding")
        taken = {"training": training, "evaluation": evaluation, "decoding": self.time_decoding()}
        return {
            name: {
                **self.describe(name),
                **self.throughput(name, taken),
                "first_step_seconds": warm_ups[name][0],
                "step_peak_bytes": profiles[name].peak_bytes,
                "syncs_per_step": profiles[name].syncs,
                "compiled_graphs": warm_ups[name][1].graphs,
                "graph_breaks": warm_ups[name][1].breaks,
                "recompiled_later": recompiled,
            }
            for name in self.contenders
        }

    def warm_up(self, name: str) -> tuple[float, CompileCounts]:
        """Run a contender's first steps; return the seconds of the very first, and what was
        compiled.
        """
        self.report(f"warming up {name}")
        before = CompileCounts.now()
        first = time_call(self.prepare_step(name), self.work.device)
        for _ in range(WARM_UP - 1):
            self.prepare_step(name)()
        now = CompileCounts.now()
        return first, CompileCounts(now.graphs - before.graphs, now.breaks - before.breaks)

    def prepare_step(self, name: str) -> Call:
        """Return a contender's next training step, with its batch already on the device."""
        contender, (inputs, labels) = self.contenders[name], next(self.batches[name])

        def step() -> None:
            with contender.allocator_settings():
                self.losses[name].append(float(contender.train(inputs, labels)))

        return step

    def profile_steps(self) -> dict[str, StepProfile]:
        """Return peak memory and synchronisations of a training step by contender."""
        return {
            name: profile_step(self.prepare_step(name), self.work.device)
            for name in self.contenders
        }

    def time_evaluation(self) -> dict[str, list[float]]:
        """Return the seconds per held-out segment, with memory."""
        batches = {name: self.work.batches(seed=1) for name in self.contenders}

        def prepare(name: str) -> Call:
            contender, (inputs, labels) = self.contenders[name], next(batches[name])

            def evaluate() -> None:
                with contender.allocator_settings():
                    contender.evaluate(inputs, labels)

            return evaluate

        calls = {name: partial(prepare, name) for name in self.contenders}
        time_interleaved(calls, WARM_UP, self.work.device)
        return time_interleaved(calls, self.rounds.evaluation, self.work.device)

    def time_decoding(self) -> dict[str, list[float]]:
        """Return the seconds per token of one sequence after a prompt as long as the memory (or the
        sequence length), of contenders that decode.
        """
        prompt = self.decoding_prompt()
        ids: dict[str, Tensor] = {}
        for name, contender in self.contenders.items():
            first = contender.prefill(prompt)
            if first is not None:
                ids[name] = first

        def prepare(name: str) -> Call:
            def decode() -> None:
                with self.contenders[name].allocator_settings():
                    ids[name] = self.contenders[name].decode(ids[name])

            return decode

        calls = {name: partial(prepare, name) for name in ids}
        time_interleaved(calls, WARM_UP, self.work.device)
        return time_interleaved(calls, self.rounds.decoding, self.work.device)

    def decoding_prompt(self) -> Tensor:
        """Return a prompt [1, memory_length or seq_len]."""
        length = self.work.memory_length or self.work.seq_len
        batches = self.work.batches(seed=2)
        n_segments = -(-length // self.work.seq_len)
        segments = [next(batches)[0][:1] for _ in range(n_segments)]
        return torch.cat(segments, dim=1)[:, :length]

    def describe(self, name: str) -> dict[str, Any]:
        """Return what a contender is, what it keeps, and its loss."""
        contender = self.contenders[name]
        parameters = list(contender.model.parameters())
        return {
            "note": contender.note,
            "has_memory": contender.has_memory,
            "baseline": baseline_of(name, self.contenders),
            "parameters": sum(p.numel() for p in parameters),
            "held_bytes": storage_bytes([*parameters, *contender.state_tensors()]),
            "loss": mean(self.losses[name][-COMPARED_STEPS:]),
            "steps": len(self.losses[name]),
        }

    def throughput(
        self, name: str, taken: Mapping[str, Mapping[str, Sequence[float]]]
    ) -> dict[str, Any]:
        """Return tokens per second and the time relative to the baseline, by kind of work; None
        for work that the contender does not do.
        """
        baseline = baseline_of(name, self.contenders)
        rates: dict[str, Any] = {}
        for kind, seconds in taken.items():
            if name not in seconds:
                rates[kind] = None
                continue
            spread = Spread.of(seconds[name])
            tokens = 1 if kind == "decoding" else self.work.tokens
            relative = None
            if baseline != name and baseline in seconds:
                relative = time_ratio(seconds, name, baseline)._asdict()
            rates[kind] = {
                "seconds": spread._asdict(),
                "tokens_per_second": tokens / spread.median,
                "times_as_long": relative,
            }
        return rates


def baseline_of(name: str, contenders: Mapping[str, Contender]) -> str:
    """Return which of our contenders another is compared with: one that does the same work, with or
    without memory. Ours are compared with the first.
    """
    ours = [other for other, contender in contenders.items() if isinstance(contender, Ours)]
    if name in ours:
        return ours[0]
    has_memory = contenders[name].has_memory
    alike = [other for other in ours if contenders[other].has_memory == has_memory]
    return (alike or ours)[-1]


def utilisation(work: Work, seconds: float, flops: Flops | None, peak: float) -> dict[str, float]:
    """Return the share of a peak rate in FLOP/s that a step reaches, by counting convention; {} if
    its FLOPs are unknown.
    """
    if flops is None:
        return {}
    rate = work.tokens / seconds
    counts = {"necessary": flops.train, "conventional": flops.conventional, "six_n": flops.six_n}
    return {name: count * rate / peak for name, count in counts.items()}


def data_sheet_utilisation(
    work: Work, seconds: float, flops: Flops | None
) -> dict[str, Any] | None:
    """Return the utilisation of the accelerator's data-sheet rate (MFU); None if there is none for
    it in this precision.
    """
    if work.precision.dtype not in (torch.bfloat16, torch.float16):
        return None
    accelerator = find_accelerator(device_name(work.device))
    if accelerator is None:
        return None
    rate = {"flops_per_second": accelerator.flops, "source": accelerator.source}
    return rate | utilisation(work, seconds, flops, accelerator.flops)


def analyse_step(ours: Ours, budget: Budget, seconds: float) -> dict[str, Any]:
    """Return ceilings, utilisation and breakdown of one of our training steps of ``seconds``."""
    with ours.allocator_settings():
        rates = measure_ceilings(ours.work)
        parts = measure_breakdown(ours, budget, rates)
    return {
        "ceilings": {
            "block_flops_per_second": rates.block,
            "head_flops_per_second": rates.head,
            "copy_bytes_per_second": rates.copy,
        },
        "utilisation": utilisation(ours.work, seconds, budget.flops, rates.block),
        "data_sheet": data_sheet_utilisation(ours.work, seconds, budget.flops),
        "breakdown": [part._asdict() | {"of_ceiling": part.of_ceiling} for part in parts],
    }
