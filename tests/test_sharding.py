"""Parameters that are cut over ranks change no number, on any mesh; the mistakes that change them
silently are noticed; and communication is by block.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import distance
from mistakes import MISTAKES
from ranks import run_ranks
from safetensors.torch import load_file
from sharded_cases import EVERY, ROWS, Tensors, alone

from lswt_core.distributed.world import World
from lswt_core.train.session import Session

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
OTHERS = ["curvature", "counted", "bfloat16", "float32"]
FEW = ["plain", "moe", "mup"]
# what the reduction over replicas, once a step, may meet: tables without a gradient, blocks that
# are run again, micro-batches of several rows
REPLICATED = [*FEW, "frozen", "checkpointing", "two rows", "multi-token"]
PLANTED = [f"mistake {name}" for name in MISTAKES]
MESHES = {
    (1, 2): [*EVERY, *OTHERS, "compiled", *PLANTED],
    (2, 1): [*FEW, "counted"],
    (2, 2): [*REPLICATED, *OTHERS, "mistake abandoned accumulation"],
    (1, 4): [*FEW, "curvature"],
    (2, 4): FEW,
}


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
def mesh(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Replicas and shards."""
    found: tuple[int, int] = request.param
    return found


@pytest.fixture(scope="module")
def found(mesh: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """What the ranks of the mesh find, by case; they are started once."""
    directory = tmp_path_factory.mktemp("found")
    words = ["sharded_cases", directory, mesh[1], *MESHES[mesh]]
    done = run_ranks([words] * (mesh[0] * mesh[1]), HERE)
    assert not any(one.returncode for one in done), "\n".join(one.stderr[-2000:] for one in done)
    by_case: dict[str, Tensors] = {name: {} for name in MESHES[mesh]}
    for key, tensor in load_file(directory / "found.safetensors").items():
        name, _, rest = key.partition("/")
        by_case[name][rest] = tensor
    return by_case


def gap(found: Tensors, expected: Tensors) -> float:
    """The largest difference, of a number above 1 relative to it."""
    assert found.keys() <= expected.keys()
    return max(
        distance(found[name], expected[name]) / max(1.0, float(expected[name].abs().max()))
        for name in found
    )


def gradients(found: Tensors) -> torch.Tensor:
    """All gradients of the first step as one vector."""
    names = sorted(name for name in found if name.startswith("0.decoder."))
    return torch.cat([found[name].flatten() for name in names])


def test_losses_gradients_and_updates_are_those_of_one_process(found: dict[str, Tensors]) -> None:
    gaps = {name: gap(found[name], alone(name)) for name in found.keys() & {*EVERY}}
    assert len(gaps) >= 3 and not {name: one for name, one in gaps.items() if one >= 1e-12}
    if "float32" in found:
        assert gap(found["float32"], alone("float32")) < 2e-6
    if "curvature" in found:  # differences of gradients are divided by 2e-3 of the weights' norm
        assert gap(found["curvature"], alone("curvature")) < 1e-10


@pytest.mark.parametrize("mesh", [(1, 2)], indirect=True)
def test_compiled_blocks_are_those_of_one_process(found: dict[str, Tensors]) -> None:
    compiled = found["compiled"]
    assert len(compiled) > 50 and gap(compiled, alone("plain")) < 1e-12


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], indirect=True)
def test_parameters_gathered_in_bfloat16_round_as_autocast_does(
    found: dict[str, Tensors],
) -> None:
    exact, cast, gathered = map(gradients, (alone("float32"), alone("bfloat16"), found["bfloat16"]))
    assert len(exact) > 5000
    assert float((gathered - cast).norm() / exact.norm()) < 0.02
    error = float((cast - exact).norm())
    assert float((gathered - exact).norm()) == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], indirect=True)
def test_a_silent_mistake_shows(mesh: tuple[int, int], found: dict[str, Tensors]) -> None:
    planted = [name for name in found if name.startswith("mistake ")]
    assert len(planted) == (len(MISTAKES) if mesh == (1, 2) else 1)
    for name in planted:
        case = MISTAKES[name.removeprefix("mistake ")].case
        assert gap(found[name], alone(case)) > 1e-3, name


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2)], indirect=True)
def test_communication_is_by_block(mesh: tuple[int, int], found: dict[str, Tensors]) -> None:
    replicas, shards = mesh
    passes = ROWS // (replicas * shards)  # of a rank, one row each
    for blocks in (2, 4):
        units = blocks + 1  # and the rest of the model
        counts = [
            int(found["counted"][f"{blocks} {kind}"])
            for kind in ("all-gather", "reduce-scatter", "all-reduce")
        ]
        if shards == 1:
            assert counts == [0, 0, units]
        else:  # parameters for both passes; sums over replicas once a step
            assert counts == [2 * units * passes, units * passes, units]


def test_several_ranks_do_not_stop_within_a_step() -> None:
    session = Session.__new__(Session)
    session.stop = lambda: True  # type: ignore[assignment, method-assign]
    session.world = World(0, 2)
    assert not session.stopping()
    session.world = World()
    assert session.stopping()
