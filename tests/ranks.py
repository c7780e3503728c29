"""Several processes of one run, as a launcher starts them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import Done, run

from lswt_core.distributed.sharding import Sharding
from lswt_core.distributed.world import World
from lswt_core.model.train_module import TrainModule


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port: int = taken.getsockname()[1]
    return port


def run_ranks(commands: Sequence[Sequence[object]], cwd: Path, **settings: object) -> list[Done]:
    """As many ranks as there are commands, each "module word ...", with more environment
    variables.
    """
    port, size = free_port(), len(commands)

    def rank(number: int) -> Done:
        launcher = {
            "WORLD_SIZE": size,
            "RANK": number,
            "LOCAL_RANK": number,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        module, *words = commands[number]
        return run(
            str(module), *words, cwd=cwd, timeout=200, pictures=False, **launcher, **settings
        )

    with ThreadPoolExecutor(size) as all_ranks:
        return list(all_ranks.map(rank, range(size)))


def shard_model(loss: TrainModule, world: World) -> None:
    """Cut a model that has its values over the ranks of a mesh."""
    assert world.mesh is not None
    sharding = Sharding(world.mesh)
    for block in loss.decoder.blocks:
        sharding.shard(block)
    sharding.shard(loss)
