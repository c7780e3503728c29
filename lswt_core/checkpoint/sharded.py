"""Checkpoints that several ranks write and read together: torch.distributed.checkpoint plans which
rank writes or reads which piece, the files and their protocol are those of ``checkpoint.store``.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lswt_core.checkpoint.files import Written
from lswt_core.checkpoint.pieces import Piece
from lswt_core.checkpoint.saved import Saved, StoredPiece
from lswt_core.checkpoint.store import Store, check_tensors, encode
from lswt_core.distributed.world import World
from lswt_core.errors import CheckpointError

MOST_FILES = 1 << 20  # of a checkpoint
# The piece of a tensor of a checkpoint that this rank wants, from its name, shape and dtype, with
# memory to read it into; None: nothing of it.
Wanted = Callable[[str, torch.Size, torch.dtype], Piece | None]


def save_together(
    store: Store,
    step: int,
    groups: Mapping[str, Mapping[str, Piece]],
    documents: Mapping[str, Any],
    world: World,
) -> Path:
    """``Store.save`` by all ranks: each writes and hashes a file of its pieces of every group, of a
    piece that several hold one; the first writes documents and manifest, and publishes. All raise
    what one of them raises.
    """
    check_tensors(groups)
    encoded = encode(documents)
    if any(world.gather_texts("yes" if world.rank == 0 and store.is_intact(step) else "")):
        return store.path(step)
    writer = PieceWriter(store, step, encoded)
    flat = {
        f"{group}/{name}": piece
        for group, members in groups.items()
        for name, piece in members.items()
    }
    planner = PieceSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(flat, storage_writer=writer, planner=planner, process_group=world.patient)
    except CheckpointException as error:
        store.abandon(writer.temporary)
        needed = sum(piece.whole_bytes for piece in flat.values())
        raise store.explain(first_failure(error), step, needed) from error
    return store.path(step)


def newest_together(store: Store, world: World, notice: Callable[[str], None]) -> Saved | None:
    """``Store.newest`` by all ranks: the first says which checkpoints there are, and each reads and
    hashes its share of the files.
    """
    steps: list[int] = json.loads(world.gather_texts(json.dumps(store.steps()))[0])
    for step in reversed(steps):
        faults = world.gather_texts(store.fault(step, range(world.rank, MOST_FILES, world.size)))
        if not any(faults):
            return store.open(step)
        notice(f"checkpoint skipped: {next(filter(None, faults))}")
    return None


def load_together(saved: Saved, group: str, wanted: Wanted, world: World) -> dict[str, Piece]:
    """What this rank wants of a group of a checkpoint, whoever wrote it; all ranks call this."""
    reader = PieceReader(saved, group)
    pieces: dict[str, Piece] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        piece = wanted(name, stored.size, stored.properties.dtype)
        if piece is not None:
            pieces[name] = piece
    planner = PieceLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(pieces, storage_reader=reader, planner=planner, process_group=world.patient)
    except CheckpointException as error:
        raise CheckpointError(f"{saved.path}: {first_failure(error)}") from error
    return pieces


def first_failure(error: CheckpointException) -> BaseException:
    """What the first rank that failed raised."""
    failure: BaseException = error.failures[min(error.failures)][0]
    return failure


class PieceSavePlanner(DefaultSavePlanner):
    """Plans a save of ``Piece`` values."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The piece to write."""
        piece: Piece = self.state_dict[index.fqn]
        return piece.tensor.detach()


class PieceLoadPlanner(DefaultLoadPlanner):
    """Plans a load into ``Piece`` values."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        """What to load, and what is stored; torch's would take tensors alone."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The piece to read into."""
        piece: Piece = self.state_dict[index.fqn]
        return piece.tensor.detach()


class PieceWriter(StorageWriter):
    """Writes a store's files: every rank those of its pieces, the coordinator all else."""

    def __init__(self, store: Store, step: int, documents: Mapping[str, bytes]) -> None:
        self.store, self.step, self.documents = store, step, documents
        self.temporary: Path | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before any rank writes: make the directory, and tell ranks of it."""
        self.temporary = self.store.begin(self.step)
        return [
            dataclasses.replace(plan, storage_data=(str(self.temporary), rank, len(plans)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """Write this rank's file of every group."""
        directory, rank, size = plan.storage_data
        groups: dict[str, dict[str, Piece]] = defaultdict(dict)
        for item in plan.items:
            group, name = item.index.fqn.split("/", 1)
            data = item.tensor_data
            assert data is not None
            groups[group][name] = Piece(
                planner.resolve_data(item), tuple(data.chunk.offsets), tuple(data.size)
            )
        results = []
        for group, pieces in groups.items():
            file = f"{group}-{rank + 1:05d}-of-{size:05d}.safetensors"
            for written in self.store.write_group(Path(directory), file, pieces).values():
                index = MetadataIndex(file)
                results.append(WriteResult(index, written.bytes, storage_data=tuple(written)))
        return completed(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after all ranks have written: seal and publish."""
        assert self.temporary is not None
        written = {
            result.index.fqn: Written(*result.storage_data)
            for of_rank in results
            for result in of_rank
        }
        self.store.seal(self.temporary, self.step, written, self.documents)
        self.store.publish(self.temporary, self.step)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any: it is not used."""
        return True


class PieceReader(StorageReader):
    """Reads a group of a checkpoint."""

    def __init__(self, saved: Saved, group: str) -> None:
        self.pieces = saved.lazily(group).pieces
        self.stored: dict[MetadataIndex, StoredPiece] = {}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                self.stored[MetadataIndex(name, torch.Size(piece.offsets))] = piece

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a reader reads once."""

    def read_metadata(self) -> Metadata:
        """Every tensor and its pieces."""
        return Metadata(
            {name: describe(pieces) for name, pieces in self.pieces.items()},
            storage_data=self.stored,
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Read every planned part of a piece into its place."""
        for item in plan.items:
            source = self.stored[item.storage_index]
            planner.resolve_tensor(item).copy_(source.read(*part_of(item)))
        return completed(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any: it is not used."""
        return True


def describe(pieces: Sequence[StoredPiece]) -> TensorStorageMetadata:
    """A tensor of a checkpoint and its pieces."""
    chunks = [
        ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in pieces
    ]
    properties = TensorProperties(dtype=pieces[0].dtype)
    return TensorStorageMetadata(properties, torch.Size(pieces[0].shape), chunks)


def part_of(item: ReadItem) -> tuple[slice, ...]:
    """The part of a stored piece that an item of a plan reads."""
    offsets = zip(item.storage_offsets, item.lengths, strict=True)
    return tuple(slice(offset, offset + length) for offset, length in offsets)


def completed(value: Any) -> Future[Any]:
    """A future that is done."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future
