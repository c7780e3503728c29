"""Whole runs on several ranks: what one process gives, with every optimizer; continued by other
numbers of ranks, and after one was killed or its file damaged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import run
from ranks import run_ranks
from runs import lines, saved_steps, write_recipe
from safetensors import safe_open
from torch import Tensor

from lswt_core.checkpoint import Saved, verify

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
STEPS, HALF = 6, 4
RUN = [
    "train.batch_size=8",
    "train.micro_batch_size=2",
    f"train.steps={STEPS}",
    "evaluate.every=3",
    "evaluate.tokens=64",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "sample.tokens=0",
]
SHARED = ["optimizer.shared_forward=true", "optimizer.fraction=0.5"]
# the mesh (replicas, shards) that each is trained on
OPTIMIZERS: dict[str, tuple[tuple[int, int], list[str]]] = {
    "adamw": ((1, 2), ["optimizer.use=adamw", "average.use=ema"]),
    "sophia-g": ((2, 1), ["optimizer.fraction=0.25"]),
    "sophia-h": ((1, 2), ["optimizer.use=sophia-h", "optimizer.hessian_update_interval=3"]),
    "muon": ((2, 2), ["optimizer.use=muon"]),
    "schedule-free": ((1, 2), ["optimizer.use=schedule-free", "schedule.use=constant"]),
}


# the files of the recipe as a stream, which notes by which rank it is read
STREAM = """
import os
from pathlib import Path
from lswt_text import Text
from lswt_core.hooks import hookimpl

class Stream(Text):
    name, streaming = "stream", True

    def documents(self, split):
        if split == "train":
            note = Path(self.paths[0]).parent / f"read by {os.environ.get('RANK', '0')}"
            note.open("a").write("once\\n")
        yield from super().documents(split)

@hookimpl
def lswt_components():
    return [Stream]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that is tokenised beforehand."""
    path = write_recipe(tmp_path_factory.mktemp("sharded"))
    path.with_name("stream.py").write_text(STREAM)
    return path


@pytest.fixture(scope="module")
def stream(recipe: Path) -> Path:
    """Text that is tokenised while it is read."""
    path = recipe.with_name("stream.toml")
    path.write_text(recipe.read_text().replace('use = "text"', 'use = "stream"'))
    return path


def train(recipe: Path, mesh: tuple[int, int], out: str, *more: str, killed: int = -1) -> list[str]:
    """Train on a mesh; what every rank printed. With ``killed``, rank 1 is killed in that step."""
    directory, size = recipe.parent / out, mesh[0] * mesh[1]
    plugin = recipe.with_name("stream.py")
    words = [recipe, "--out", directory, "--plugin", plugin, "--unchecked", *RUN, *more]
    if size == 1:
        done = [run("lswt_core.run", *words, cwd=HERE, pictures=False, **surroundings(recipe))]
    else:
        module = ["lswt_core.run"] if killed < 0 else ["killed_run", killed]
        ranks = [[*module, *words, f"train.shard={mesh[1]}"]] * size
        done = run_ranks(ranks, HERE, **surroundings(recipe))
    codes = [one.returncode for one in done]
    if killed < 0:
        assert not any(codes), "\n".join(one.stderr[-2000:] for one in done)
    else:
        assert codes[1] == -9 and all(codes)
    return [one.stdout for one in done]


def surroundings(recipe: Path) -> dict[str, object]:
    """Environment variables of every process."""
    return {"LSWT_CACHE_DIR": recipe.parent / "cache"}


def path_of(directory: Path, step: int = STEPS) -> Path:
    return directory / "checkpoints" / f"step-{step:08}"


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint."""
    saved: Saved = verify(path_of(directory))
    return {
        f"{group}/{name}": tensor
        for group in ("model", "optimizer", "memory")
        for name, tensor in saved.tensors(group).items()
    }


def gap(one: Path, other: Path, group: str = "") -> float:
    """The largest difference of what two runs end with."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return max(
        float((a[name].double() - b[name].double()).abs().max())
        for name in a
        if name.startswith(group) and a[name].numel()
    )


def losses(directory: Path) -> list[float]:
    """What was logged of the training and of the evaluation."""
    return [line[key] for line in lines(directory) for key in ("loss", "eval/loss") if key in line]


def copied(source: Path, out: str, upto: int = STEPS) -> Path:
    """A copy of a run directory as it was after a step."""
    directory = source.parent / out
    shutil.copytree(source, directory)
    for step in saved_steps(directory):
        if step > upto:
            shutil.rmtree(path_of(directory, step))
    return directory


@pytest.fixture(scope="module")
def one(stream: Path) -> Path:
    """The run of one process."""
    train(stream, (1, 1), "one", *SHARED)
    return stream.parent / "one"


@pytest.fixture(scope="module")
def four(stream: Path) -> Path:
    """The run of four ranks, two replicas of two shards."""
    train(stream, (2, 2), "four", *SHARED)
    assert [path.name for path in stream.parent.glob("read by *")] == ["read by 0"]
    return stream.parent / "four"


def assert_close(one: Path, other: Path, bound: float = 5e-6) -> None:
    """Sums of float32 were taken in another order."""
    assert gap(one, other) < bound
    assert losses(other) == pytest.approx(losses(one), abs=2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_give_what_one_process_gives(recipe: Path, name: str) -> None:
    mesh, words = OPTIMIZERS[name]
    alone, together = recipe.parent / f"{name}-alone", recipe.parent / f"{name}-together"
    train(recipe, (1, 1), alone.name, *words)
    train(recipe, mesh, together.name, *words)
    # Muon orthogonalises in bfloat16, which rounds what differs to the next of its numbers
    assert_close(alone, together, 2e-2 if name == "muon" else 5e-6)


def test_a_shared_forward_pass_on_four_ranks_gives_what_one_process_gives(
    one: Path, four: Path
) -> None:
    assert_close(one, four)


@pytest.mark.parametrize(
    ("before", "after"), [("four", (1, 1)), ("four", (1, 2)), ("four", (2, 4)), ("one", (1, 4))]
)
def test_a_run_goes_on_with_another_number_of_ranks(
    stream: Path, before: str, after: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    source, out = request.getfixturevalue(before), f"{before}-then-{after[0]}x{after[1]}"
    directory = copied(source, out, HALF)
    printed = train(stream, after, out, *SHARED, "--accept-changes")
    assert f"continuing from {path_of(directory, HALF)}" in printed[0]
    assert_close(request.getfixturevalue("one"), directory)


def assert_same_bits(one: Path, other: Path) -> None:
    assert gap(one, other) == 0 and losses(one) == losses(other)


def test_one_rank_is_killed_and_the_run_ends_with_the_same_bits(stream: Path, four: Path) -> None:
    train(stream, (2, 2), "killed", *SHARED, killed=HALF + 1)
    directory = stream.parent / "killed"
    assert HALF <= saved_steps(directory)[-1] < STEPS
    train(stream, (2, 2), "killed", *SHARED)
    assert_same_bits(four, directory)


def test_damage_to_the_file_of_one_rank_is_named_and_an_older_checkpoint_taken(
    stream: Path, four: Path
) -> None:
    directory = copied(four, "damaged")
    flipped = path_of(directory) / "model-00003-of-00004.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    missing = path_of(directory, HALF) / "optimizer-00002-of-00004.safetensors"
    missing.unlink()
    printed = train(stream, (2, 2), "damaged", *SHARED)[0]
    for path in (flipped, missing):
        assert path.name in printed and path.parent.name in printed
    assert f"continuing from {path_of(directory, HALF - 2)}" in printed
    assert_same_bits(four, directory)


def test_ten_lines_read_what_four_ranks_wrote(four: Path) -> None:
    checkpoint, found = path_of(four), {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get("pieces", "{}"))
            for name in file.keys():  # noqa: SIM118 no mapping
                piece = file.get_tensor(name)
                place = places.get(name, {"offsets": [0] * piece.ndim, "shape": piece.shape})
                key = f"{path.name.split('-')[0]}/{name}"
                whole = found.setdefault(key, torch.full(place["shape"], 7).to(piece.dtype))
                ends = zip(place["offsets"], piece.shape, strict=True)
                whole[tuple(slice(begin, begin + size) for begin, size in ends)] = piece
    expected = tensors(four)
    assert found.keys() == expected.keys() and len(found) > 50
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    manifest = json.loads(checkpoint.joinpath("MANIFEST.json").read_text())
    assert manifest["step"] == STEPS
