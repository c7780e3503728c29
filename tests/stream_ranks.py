"""``python -m stream_ranks OUT``, run by every rank: reads a stream on one machine and on two, and
leaves what it read.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from lswt_bytes import Bytes
from test_rows import MANY, Counting, read

from lswt_core.data import PrefetchedRows, Rows, StreamingRows
from lswt_core.data.shared_stream import SharedStream
from lswt_core.distributed.node import Node
from lswt_core.distributed.world import World
from lswt_core.errors import DataError

ROWS, LENGTH, COUNT = 8, 64, 12
OPTIONS: dict[str, Any] = {"document_masking": True, "lookahead": 2}


def stream_of(source: Counting, rows: range) -> StreamingRows:
    return StreamingRows(
        source, Bytes(), global_batch_size=ROWS, rows=rows, seq_len=LENGTH, seed=3, **OPTIONS
    )


def read_twice(open_rows: Any) -> tuple[Any, Any]:
    """Segments, and those after them; the latter by rows that were resumed."""
    rows: Rows = open_rows()
    first = read(rows, COUNT)
    state = json.loads(json.dumps(rows.state()))
    rows.close()
    again: Rows = open_rows()
    again.restore(state)
    second = read(again, COUNT)
    again.close()
    return first, second


def fault_of(world: World, node: Node) -> str:
    """What a rank is told of a source without text."""
    rows = SharedStream(
        stream_of(Counting([]), world.rows(ROWS)), node, [world.rows(ROWS)] * len(node.ranks)
    )
    try:
        rows.segment()
    except DataError as error:
        return str(error)
    return ""


def main(directory: str) -> None:
    found: dict[str, Any] = {}
    with World.read().connected() as world:
        for machines in (1, 2):
            name = f"machine {world.rank * machines // world.size}"
            socket.gethostname = lambda name=name: name  # type: ignore[misc]
            node = Node.find(world)
            parts = [world._replace(rank=rank).rows(ROWS) for rank in node.ranks]
            source = Counting(MANY)

            def open_rows() -> Rows:
                inner = stream_of(source, world.rows(ROWS))  # noqa: B023
                return PrefetchedRows(SharedStream(inner, node, parts), pin_memory=False)  # noqa: B023

            read = read_twice(open_rows)
            found[f"{machines}"] = [read, source.reads, fault_of(world, node)]
        Path(directory, f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
