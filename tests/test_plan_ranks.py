"""What a plan says of several ranks: pieces, what is gathered and reduced, memories on the host,
traffic, and what would fit; against counts by hand and what ranks hold.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_plan import NANO, RECIPES, recipe_of

from lswt_core.__main__ import main
from lswt_core.budget import Budget, budget
from lswt_core.budget.fitting import find_remedies
from lswt_core.budget.rank_model import Weight
from lswt_core.budget.speed import ACCELERATORS
from lswt_core.budget.step_time import step_time, traffic_of
from lswt_core.distributed.sharding import Sharding
from lswt_core.distributed.world import World
from lswt_core.errors import ResourceError
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_optimizer
from lswt_core.plugin_api.sharded_tensor import local_tensor
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.reporting.units import format_bytes
from lswt_core.train import announce

GB = 10**9
MUON: dict[str, Any] = {"optimizer": {"use": "muon", "lr": 0.01}}


@cache
def planned(size: str) -> Budget:
    """A recipe of the family on accelerators that compute in bfloat16."""
    recipe = Recipe.load(RECIPES / f"{size}.toml", ["train.precision=bfloat16"])
    taken = budget(recipe, Registry(), World())
    return taken._replace(memory=taken.memory._replace(has_host=True))


def with_train(taken: Budget, **changes: Any) -> Budget:
    """The same with another [train] table."""
    return taken._replace(memory=taken.memory.with_train(**changes))


def by_hand(size: str, ranks: int, micro: int, device: str) -> dict[str, int]:
    """A rank's bytes from the dimensions: every parameter is cut over all ranks."""
    recipe = Recipe.load(RECIPES / f"{size}.toml")
    d, layers, length = recipe.model.d_model, recipe.model.n_layers, recipe.train.seq_len
    # projections with biases, a gated feed-forward, two norms, keys and values of 16 registers
    block = (4 * d * d + 4 * d) + (3 * d * 4 * d + 2 * 4 * d + d) + 2 * 2 * d + 2 * 16 * d
    root = 50_272 * 768 + 2 * 768 * d + 2 * 2 * d  # table, projections, first and last norm
    total = layers * block + root
    registers = 2 * d * layers  # the first rank has one row of 16 at least
    piece = (total - 16 * registers) // ranks + registers * max(1, 16 // ranks)
    row = layers * 2 * 2048 * d * 2  # bytes of keys and values in bfloat16
    return {
        "numbers": total,
        "weights": 4 * piece,
        "gradients": 4 * piece,
        "optimizer": 2 * 4 * piece,
        "gathered": 2 * (2 * block + root),
        "reduce": 2 * (block + root)
        + 4 * block
        + 4 * ((block - 32 * d) // ranks + 2 * d * max(1, 16 // ranks)),
        "memories": row * (3 * micro if device == "host" else 2 * 480 // ranks),
        "inputs": micro * layers * length * d * 4,  # of the blocks, in float32
    }


@pytest.mark.parametrize("size", ["xl", "xxl"])
@pytest.mark.parametrize(("ranks", "device"), [(8, "host"), (32, "device")])
def test_every_part_is_counted_as_by_hand(size: str, ranks: int, device: str) -> None:
    taken = with_train(planned(size), shard="all", memory_device=device)
    found = taken.memory.needed(World(0, ranks), 3)
    expected = by_hand(size, ranks, 3, device)
    inputs = expected.pop("inputs")
    assert taken.total == expected.pop("numbers")
    # and steps of the optimizer, a number each
    assert found.pop("optimizer") == pytest.approx(expected.pop("optimizer"), abs=1e5)
    activations, logits = found.pop("activations"), found.pop("logits")
    assert inputs < activations < 1.5 * inputs and logits < 0.3 * GB
    assert found == expected


@pytest.mark.parametrize(
    ("size", "ranks", "device", "micro", "gigabytes"),
    [
        ("large", 8, "device", 3, 82),
        ("xl", 8, "host", 3, 33),
        ("xl", 32, "device", 3, 47),
        ("xxl", 8, "device", 3, 230),
        ("xxl", 8, "host", 3, 52),
        ("xxl", 32, "device", 3, 66),
        ("xxl", 48, "device", 2, 46),
    ],
)
def test_totals_are_those_of_an_independent_estimate(
    size: str, ranks: int, device: str, micro: int, gigabytes: int
) -> None:
    taken = with_train(
        planned(size), shard="all", memory_device=device, activation_checkpointing="block"
    )
    total = sum(taken.memory.needed(World(0, ranks), micro).values())
    assert total == pytest.approx(gigabytes * GB, rel=0.1)


def test_the_host_keeps_memories_twice_and_the_copy_of_a_checkpoint() -> None:
    taken = with_train(planned("xxl"), shard="all", memory_device="host")
    host, expected = taken.memory.of_host(World(0, 8)), by_hand("xxl", 8, 3, "device")
    assert host["memories"] == expected["memories"]
    states = expected["weights"] + expected["optimizer"]  # memories are rebuilt from tokens
    assert host["checkpoint"] == pytest.approx(states, rel=1e-4)
    assert host["total"] == host["memories"] + host["checkpoint"]
    on_device = with_train(planned("xxl"), shard="all").memory
    assert on_device.of_host(World(0, 8))["memories"] == 0
    written = taken.memory.checkpoint_bytes()
    assert written == pytest.approx(8 * states, rel=1e-4)


def test_a_checkpoint_with_memories_is_larger_by_those_of_all_rows() -> None:
    exact, replayed = (
        budget(recipe_of(checkpoint={"memory": mode}), Registry(), World()).memory
        for mode in ("exact", "replay")
    )
    assert exact.checkpoint_bytes() - replayed.checkpoint_bytes() == 8 * exact.parts["memories"]


def test_replicas_hold_pieces_of_their_own_and_shards_must_divide() -> None:
    taken = with_train(planned("xl"), shard=4)
    found = taken.memory.needed(World(0, 8), 3)
    assert found["weights"] == 4 * taken.total // 4
    with pytest.raises(ResourceError, match=r"train\.shard = 3"):
        with_train(planned("xl"), shard=3).memory.needed(World(0, 8), 3)


@pytest.mark.parametrize("shape", [(7, 3), (8, 3), (1, 5), (3,)])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_first_rank_has_the_largest_piece(shape: tuple[int, ...], shards: int) -> None:
    piece = torch.empty(shape, device="meta").chunk(shards)[0]
    assert Weight(shape, 4, True).piece(shards) == piece.numel()


def test_short_parameters_are_gathered_where_gradients_are_not_compared() -> None:
    half = {"train": {**NANO["train"], "precision": "bfloat16"}}
    plain, probed = (
        budget(recipe_of(optimizer={"use": use}, **half), Registry(), World()).memory
        for use in ("sophia-g", "sophia-h")
    )
    short, long = (one.needed(World(0, 2), 1) for one in (plain, probed))
    assert long["gathered"] == 2 * short["gathered"]
    assert "cast_weights" not in short and long["cast_weights"] == plain.parts["cast_weights"]


# ---------- what ranks hold


def hold(rank: int, directory: Path, tables: dict[str, Any]) -> None:
    """One of two ranks: leaves the bytes that it holds in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    recipe, registry = recipe_of(**tables), Registry()
    world = World(rank, 2).with_mesh("all")
    assert world.mesh is not None
    loss = build_model(recipe, registry, device=world.device, dtype=torch.float32).loss
    materialise(loss, recipe, world.device, Sharding(world.mesh).shard)
    optimizer = build_optimizer(recipe, registry, loss)
    for p in loss.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    held = {
        "weights": sum(local_tensor(p).nbytes for p in loss.parameters()),
        "gradients": sum(
            local_tensor(p.grad).nbytes for p in loss.parameters() if p.grad is not None
        ),
        "optimizer": sum(local_tensor(t).nbytes for t in states if isinstance(t, torch.Tensor)),
    }
    (directory / f"{rank}.json").write_text(json.dumps(held))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tables", [{"optimizer": {"use": "adamw"}}, {}, MUON], ids=str)
def test_ranks_hold_what_is_counted(tables: dict[str, Any], tmp_path: Path) -> None:
    # a width and a vocabulary that two ranks share unevenly
    tables = {"embedding": {"vocab_size": 65, "d_vocab": 8}} | tables
    torch.multiprocessing.spawn(hold, (tmp_path, tables), nprocs=2)
    held = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    memory = budget(recipe_of(**tables), Registry(), World()).memory.with_train(shard="all")
    counted = memory.needed(World(0, 2))
    assert counted["weights"] == held[0]["weights"] > held[1]["weights"]
    assert counted["gradients"] == held[0]["gradients"]
    assert counted["optimizer"] == max(one["optimizer"] for one in held)


# ---------- before a run


def test_ranks_of_a_machine_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, world = recipe_of(), World(0, 2)
    taken = budget(recipe, Registry(), world)
    needed = sum(taken.memory.needed(world).values())
    monkeypatch.setattr(announce, "budget", lambda *_: taken)
    monkeypatch.setattr(World, "gather_texts", lambda self, text: [text] * self.size)
    monkeypatch.setattr("lswt_core.budget.memory.available_memory", lambda _: 2 * needed)
    announce.announce_needs(Console(log_every=1), recipe, Registry(), world, tmp_path)
    assert "each of 2 processes" in capsys.readouterr().out
    monkeypatch.setattr("lswt_core.budget.memory.available_memory", lambda _: 2 * needed - 2)
    with pytest.raises(ResourceError, match=r"train\.micro_batch_size=2"):
        announce.announce_needs(Console(silent=True), recipe, Registry(), world, tmp_path)
    # on machines of their own each has all of it
    monkeypatch.setattr(World, "gather_texts", lambda self, text: [text, "another"])
    announce.announce_needs(Console(silent=True), recipe, Registry(), world, tmp_path)


def test_what_accelerators_leave_on_their_host_must_fit_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = with_train(planned("xxl"), shard="all", memory_device="host").memory
    monkeypatch.setattr(announce, "available_memory", lambda _: 2_000 * GB)
    announce.require_on_host(memory, World(0, 8), 8, "xxl")
    monkeypatch.setattr(announce, "available_memory", lambda _: 1_000 * GB)
    with pytest.raises(ResourceError, match="memory_device"):
        announce.require_on_host(memory, World(0, 8), 8, "xxl")


# ---------- what would fit, and how long it takes


def test_traffic_is_what_a_pass_gathers_and_scatters() -> None:
    taken, world = with_train(planned("xxl"), shard="all", memory_device="host"), World(0, 8)
    assert taken.flops is not None
    numbers = by_hand("xxl", 8, 3, "host")["numbers"]
    passes = 20 * (1 + taken.flops.update_curvature / taken.flops.train)
    traffic = traffic_of(taken, world, 3)
    # twice in bfloat16, gradients in float32; an eighth is its own
    assert traffic.shards == pytest.approx(passes * (2 * 2 + 4) * numbers * 7 / 8)
    assert traffic.replicas == 0
    assert traffic.host == 60 * by_hand("xxl", 8, 3, "host")["memories"] / 9
    replicas = traffic_of(with_train(planned("xxl"), shard=1), world, 3)
    assert replicas.shards == 0
    assert replicas.replicas == pytest.approx(2 * 4 * numbers * 7 / 8)


def test_slow_networks_are_waited_for() -> None:
    taken, machine = with_train(planned("xxl"), shard="all"), ACCELERATORS["h100"]
    together, apart = (
        step_time(taken, World(0, 32), 3, machine, per_machine) for per_machine in (32, 8)
    )
    assert together.total == together.compute > together.communication
    assert apart.total == apart.communication == pytest.approx(9 * together.communication)
    hybrid = step_time(with_train(taken, shard=8), World(0, 32), 3, machine, 8)
    assert hybrid.communication < apart.communication / 3


def test_remedies_are_the_fewest_changes_and_the_fastest_first() -> None:
    taken, world = planned("xxl"), World(0, 8)
    available = ACCELERATORS["h100"].memory

    def seconds(memory: Any, micro: int) -> float:
        changed = taken._replace(memory=memory)
        return step_time(changed, world, micro, ACCELERATORS["h100"], 8).total

    found = find_remedies(taken.memory, world, 3, available, seconds)
    assert [one.overrides for one in found] == [
        ["train.shard=all", "train.memory_device=host"]  # blocks are recomputed already
    ]
    stored = taken.memory.with_train(activation_checkpointing="none")
    found = find_remedies(stored, world, 6, available, seconds)
    assert len(found) == 2 and [one.seconds for one in found] == sorted(
        one.seconds for one in found
    )
    for one in found:
        assert one.total <= available
        assert {"shard", "memory_device"} < one.train.keys()
    assert find_remedies(taken.memory, world, 3, GB, seconds) == []


@pytest.mark.slow
def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(RECIPES / "large.toml"), "--on", "h100", "--ranks", "8"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == {"replicas": 8, "shards": 1} and not report["fits"]
    remedy = report["remedies"][0]
    assert main([*words, *remedy["overrides"]]) == 0
    text = capsys.readouterr().out
    for word in ("mesh", "shards of each", "host memory", "assumed to overlap"):
        assert word in text
    assert format_bytes(remedy["total"]) in text and "does not fit" not in text


def test_one_process_has_no_mesh_to_speak_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nano.toml"
    path.write_text(recipe_of().dump())
    assert main(["plan", str(path), "--on", "h100"]) == 0
    text = capsys.readouterr().out
    for word in ("shards of each", "host memory", "overlap", "would fit"):
        assert word not in text


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--per-machine", "-1"], ["--micro", "0"]])
def test_numbers_below_one_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(RECIPES / "tiny.toml"), *words]) == 2
    assert " ".join(words) in capsys.readouterr().err
