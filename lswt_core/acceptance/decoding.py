"""Check of recorded decoding: a replayed step against one that is computed anew."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lswt_core.acceptance.training import Training, require_close, small_recipe
from lswt_core.benchmark.step_profile import profile_step
from lswt_core.decode import InferenceEngine
from lswt_core.decode.cuda_graph import DecodeStep, fixed_shapes
from lswt_core.device import Precision, pick_device
from lswt_core.distributed.world import World
from lswt_core.registry import Registry

PROMPT, TOKENS = 40, 64  # the memory of 64 fills up, and its oldest keys are overwritten
ROUNDING = 1e-4  # of float32, through two layers: another kernel, and the ring buffer's order


class UnrecordedStep:
    """The step that would be recorded, for devices without CUDA graphs: run for every token, with
    the position as a tensor.
    """

    def __init__(self, step: DecodeStep, ids: Tensor, position: int) -> None:
        self.step, self.sequence = step, step.__self__  # type: ignore[attr-defined]

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Hidden states [B, 1, M] of ids [B, 1] at a position."""
        with fixed_shapes(self.sequence.decoder, self.sequence.cache_state):
            return self.step(ids, torch.tensor(position, device=ids.device))


def check_recorded() -> dict[str, Any]:
    """Hidden states of recorded decoding are those of the engine's slow path, token by token, after
    a prompt and beyond the memory's length; host waits of a token.
    """
    device, registry = pick_device(0), Registry()
    training = Training.of(small_recipe(registry), World(device=device))
    training.advance(2)
    engine = InferenceEngine(training.loss.decoder, Precision(torch.float32, "exact"), 64)
    if engine.capture is None:
        engine.capture = UnrecordedStep
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (1, PROMPT + TOKENS), generator=generator).to(device)
    cuts = [0, *range(PROMPT, PROMPT + TOKENS + 1)]
    slow, cache, sequence = [], None, engine.start()
    fast = []
    for start, end in pairwise(cuts):
        states, cache = engine(ids[:, start:end], cache)
        slow.append(states[:, -1])
        fast.append(sequence(ids[:, start:end])[:, -1])
    error = require_close("hidden states", torch.stack(fast), torch.stack(slow), ROUNDING)
    last = ids[:, -1:]
    profile = profile_step(lambda: sequence.logits(sequence(last)[:, -1]).argmax(-1), device)
    recorded = type(sequence.captured).__name__
    return {"error": error, "recorded": recorded, "waits_per_token": profile.syncs}
