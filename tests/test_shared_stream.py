"""A stream that is read once a machine: the rows are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from stream_ranks import ROWS, read_twice, stream_of
from test_rows import MANY, Counting, read
from torch import Tensor

from lswt_core.data import PrefetchedRows, Rows
from lswt_core.data.shared_stream import SharedStream
from lswt_core.errors import DataError

HERE = Path(__file__).parent


def alone(source: Counting) -> Rows:
    """What one process reads with."""
    return PrefetchedRows(stream_of(source, range(ROWS)), pin_memory=False)


class TwoRanks:
    """In place of a Node: the parts are laid down where the other rank finds them."""

    def __init__(self, rank: int, table: list[Tensor]) -> None:
        self.is_leader, self.rank, self.table = rank == 0, rank, table

    def deal(self, read: Callable[[], Sequence[Tensor]], like: Tensor) -> Tensor:
        if self.is_leader:
            self.table[:] = read()
        part = self.table[self.rank]
        assert part.shape == like.shape and part.dtype == like.dtype
        return part.clone()


def test_two_ranks_of_a_machine_read_what_one_process_reads() -> None:
    table: list[Tensor] = []
    halves, sources = (range(ROWS // 2), range(ROWS // 2, ROWS)), (Counting(MANY), Counting(MANY))
    ranks = [
        SharedStream(stream_of(sources[rank], halves[rank]), TwoRanks(rank, table), halves)  # type: ignore[arg-type]
        for rank in range(2)
    ]
    whole = stream_of(Counting(MANY), range(ROWS))
    for _ in range(3):
        parts = [read(rank, 1) for rank in ranks]
        joined = [[*first, *second] for first, second in zip(*parts, strict=True)]
        assert joined == [*read(whole, 1)]
    assert ranks[0].state() == whole.state()
    assert sources[0].reads and not sources[1].reads
    with pytest.raises(DataError, match="seed"):
        ranks[1].restore({**whole.state(), "seed": 4})


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_the_rows_of_one_process_and_every_machine_reads_once(
    tmp_path: Path, size: int
) -> None:
    source = Counting(MANY)
    expected: Any = json.loads(json.dumps(read_twice(lambda: alone(source))))
    done = run_ranks([("stream_ranks", tmp_path)] * size, HERE)
    assert not any(one.returncode for one in done), done[0].stderr
    found = [json.loads(tmp_path.joinpath(f"{rank}.json").read_text()) for rank in range(size)]
    for machines in (1, 2):
        parts, reads, faults = zip(*(one[str(machines)] for one in found), strict=True)
        for run in range(2):  # before and after it is resumed
            for field in range(3):  # inputs, labels, first_visible
                rows = [row for part in parts for row in part[run][field]]
                assert rows == expected[run][field]
        leaders = [rank for rank in range(size) if rank % (size // machines) == 0]
        assert [rank for rank in range(size) if reads[rank]] == leaders
        assert {reads[rank] for rank in leaders} == {source.reads}
        assert all("no text" in fault for fault in faults)
