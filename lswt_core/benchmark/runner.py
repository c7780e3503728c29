"""A benchmark from its subjects to plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch

from lswt_core.benchmark import ceilings, pieces
from lswt_core.benchmark.interleave import Span, Turn, in_turn, ratio, seconds
from lswt_core.benchmark.ours import Ours
from lswt_core.benchmark.probe import Graphs, bytes_of, look
from lswt_core.benchmark.work import Contender, Work
from lswt_core.budget import Budget
from lswt_core.budget.flops import Flops
from lswt_core.budget.speed import accelerator_called
from lswt_core.device import device_name

WARM_UP = 3  # steps before anything is timed: a cold one, two with memory
LAST = 3  # steps whose mean loss is compared


class Rounds(NamedTuple):
    """How often each thing is timed."""

    training: int
    evaluation: int
    decoding: int  # tokens


class Benchmark:
    """Subjects that do the same work in turn."""

    def __init__(
        self,
        work: Work,
        subjects: Mapping[str, Contender],
        rounds: Rounds,
        say: Callable[[str], None],
    ) -> None:
        self.work, self.subjects, self.rounds, self.say = work, subjects, rounds, say
        self.texts = {name: work.text() for name in subjects}  # the same for all
        self.losses: dict[str, list[float]] = {name: [] for name in subjects}

    def run(self) -> dict[str, Any]:
        """Everything, by subject."""
        started = {name: self.warm_up(name) for name in self.subjects}
        before = {name: graphs for name, (_, graphs) in started.items()}
        self.say("training")
        training = in_turn(
            {name: partial(self.turn, name) for name in self.subjects},
            self.rounds.training,
            self.work.device,
        )
        after = Graphs.now()
        seen = {name: look(self.turn(name), self.work.device) for name in self.subjects}
        self.say("evaluation")
        evaluation = self.evaluate()
        self.say("decoding")
        decoding = self.decode()
        return {
            name: self.row(name, training, evaluation, decoding)
            | {
                "first_step_seconds": started[name][0],
                "step_peak_bytes": seen[name].peak,
                "waits_per_step": seen[name].waits,
                "compiled_graphs": before[name].graphs,
                "graph_breaks": before[name].breaks,
                "recompiled_later": after.graphs - sum(graphs.graphs for graphs in before.values()),
            }
            for name in self.subjects
        }

    def warm_up(self, name: str) -> tuple[float, Graphs]:
        """The first steps of a subject: seconds of the very first, and what was compiled."""
        self.say(f"warming up {name}")
        before = Graphs.now()
        first = seconds(self.turn(name), self.work.device)
        for _ in range(WARM_UP - 1):
            self.turn(name)()
        now = Graphs.now()
        return first, Graphs(now.graphs - before.graphs, now.breaks - before.breaks)

    def turn(self, name: str) -> Turn:
        """A subject's next training step, on its own copy of the text, which is there before the
        turn begins.
        """
        subject, (inputs, labels) = self.subjects[name], next(self.texts[name])

        def step() -> None:
            with subject.as_its_users_run_it():
                self.losses[name].append(float(subject.train(inputs, labels)))

        return step

    def evaluate(self) -> dict[str, list[float]]:
        """Seconds of held-out segments, memory carried along."""
        texts = {name: self.work.text(seed=1) for name in self.subjects}

        def turn(name: str) -> Turn:
            inputs, labels = next(texts[name])

            def run() -> None:
                with self.subjects[name].as_its_users_run_it():
                    self.subjects[name].evaluate(inputs, labels)

            return run

        turns = {name: partial(turn, name) for name in self.subjects}
        in_turn(turns, WARM_UP, self.work.device)
        return in_turn(turns, self.rounds.evaluation, self.work.device)

    def decode(self) -> dict[str, list[float]]:
        """Seconds of a token of one row after a prompt as long as what is remembered (or a
        context), by those who decode.
        """
        length = self.work.remembered or self.work.seq_len
        prompt = torch.cat(
            [
                next(text)[0][:1]
                for text in [self.work.text(seed=2)]
                for _ in range(-(-length // self.work.seq_len))
            ],
            dim=1,
        )
        now: dict[str, Any] = {}
        for name, subject in self.subjects.items():
            first = subject.prompt(prompt[:, :length])
            if first is not None:
                now[name] = first

        def turn(name: str) -> Turn:
            def run() -> None:
                with self.subjects[name].as_its_users_run_it():
                    now[name] = self.subjects[name].decode(now[name])

            return run

        turns = {name: partial(turn, name) for name in now}
        in_turn(turns, WARM_UP, self.work.device)
        return in_turn(turns, self.rounds.decoding, self.work.device)

    def row(self, name: str, *measured: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Rates and ratios of a subject; a ratio is how many times as long it takes as the one it
        stands beside.
        """
        subject, tokens = self.subjects[name], (self.work.tokens, self.work.tokens, 1)
        baseline = beside_of(name, self.subjects)
        found: dict[str, Any] = {
            "note": subject.note,
            "remembers": subject.remembers,
            "beside": baseline,
        }
        for kind, taken, size in zip(
            ("training", "evaluation", "decoding"), measured, tokens, strict=True
        ):
            if name not in taken:
                found[kind] = None
                continue
            span = Span.of(taken[name])
            found[kind] = {"seconds": span._asdict(), "tokens_per_second": size / span.median}
            found[kind]["times_as_long"] = (
                ratio(taken, name, baseline)._asdict()
                if baseline != name and baseline in taken
                else None
            )
        parameters = list(subject.model.parameters())
        return found | {
            "parameters": sum(p.numel() for p in parameters),
            "held_bytes": bytes_of([*parameters, *subject.held()]),
            "loss": mean(self.losses[name][-LAST:]),
            "steps": len(self.losses[name]),
        }


def beside_of(name: str, subjects: Mapping[str, Contender]) -> str:
    """The subject of ours that does the work another one does: with memory or without; ours itself
    stands beside the first.
    """
    ours = [other for other, subject in subjects.items() if isinstance(subject, Ours)]
    if name in ours:
        return ours[0]
    alike = [other for other in ours if subjects[other].remembers == subjects[name].remembers]
    return (alike or ours)[-1]


def shares(work: Work, seconds: float, flops: Flops | None, peak: float) -> dict[str, float]:
    """What a step's time means in FLOPs, as a share of a rate; empty where they are unknown."""
    if flops is None:
        return {}
    rate = work.tokens / seconds
    found = {"necessary": flops.train, "conventional": flops.conventional, "six_n": flops.six_n}
    return {name: amount * rate / peak for name, amount in found.items()}


def beside_data_sheet(work: Work, seconds: float, flops: Flops | None) -> dict[str, Any] | None:
    """The same as a share of what the accelerator's data sheet promises; None where there is none
    for it in this precision.
    """
    found = (
        accelerator_called(device_name(work.device))
        if work.precision.dtype in (torch.bfloat16, torch.float16)
        else None
    )
    if found is None:
        return None
    return {"flops_per_second": found.flops, "source": found.source} | shares(
        work, seconds, flops, found.flops
    )


def ceilings_of(ours: Ours, budget: Budget, seconds: float) -> Iterator[tuple[str, Any]]:
    """Ceilings, utilisation and pieces of a subject of ours."""
    with ours.as_its_users_run_it():
        rates = ceilings.measure(ours.work)
        parts = pieces.measure(ours, budget, rates)
    yield (
        "ceilings",
        {
            "block_flops_per_second": rates.block,
            "head_flops_per_second": rates.head,
            "copy_bytes_per_second": rates.copy,
        },
    )
    yield "utilisation", shares(ours.work, seconds, budget.flops, rates.block)
    yield "data_sheet", beside_data_sheet(ours.work, seconds, budget.flops)
    yield "pieces", [part._asdict() | {"of_ceiling": part.of_ceiling} for part in parts]
