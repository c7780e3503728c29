"""One of the two processes of the check "sharding": answers requests, a line of JSON each, until
its standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
import torch.distributed as dist

from lswt_core.conformance.check import describe
from lswt_core.conformance.sharded_training import (
    PROCESSES,
    compare_model,
    compare_optimizer,
)
from lswt_core.conformance.subject import Subject
from lswt_core.conformance.targets import find_offers
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible

COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def subject_of(request: dict[str, Any]) -> Subject:
    """The component that a request is about."""
    file = request["file"]
    target = import_module(request["module"]) if file is None else Path(file)
    registry, offers = find_offers(target)
    offer = next(one for one in offers if [one.kind, one.name] == request["component"])
    return Subject(offer, registry.load(offer), registry, request["options"])


def answer(request: dict[str, Any], world: World) -> dict[str, str]:
    """What differs between two processes and one ("found"), or why that is not known."""
    try:
        subject = subject_of(request)
    except (Exception, SystemExit) as error:
        return {"skipped": f"a process of its own cannot import it: {error}"}
    compare = compare_optimizer if subject.kind == "optimizer" else compare_model
    try:
        return {"found": compare(subject, world)}
    except (SkipTest, Incompatible) as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        notes = "".join(getattr(error, "__notes__", ()))
        return {"error": f"on two processes {describe(error, subject)}{notes}"}


def main(rank: int, store: str) -> None:
    """Join the other process and answer requests."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a plugin prints is no answer
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=COLLECTIVE_TIMEOUT,
    )
    world = World(rank, PROCESSES).with_mesh("all")
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), world)), file=answers)
