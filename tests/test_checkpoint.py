"""A save is all or nothing, a damaged checkpoint is never used, and two processes never share a
run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lswt_core.checkpoint import FORMAT, MANIFEST, Files, RunLock, Store, Written
from lswt_core.checkpoint.pieces import Piece
from lswt_core.errors import BusyError, CheckpointError, ResourceError

torch.set_num_threads(1)


def state(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """A small state that differs from step to step."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) + step
    return {"model": {"w": base, "tied": base}, "optimizer": {"w/step": torch.tensor(step)}}, {
        "train": {"step": step}
    }


def save(store: Store, *steps: int) -> None:
    for step in steps:
        store.save(step, *state(step))


def assert_holds(saved: object, step: int) -> None:
    groups, documents = state(step)
    assert saved.step == step
    for group, members in groups.items():
        tensors = saved.tensors(group)
        assert tensors.keys() == members.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in members.items())
    assert saved.document("train") == documents["train"]


def no_notice(text: str) -> None:
    raise AssertionError(f"unexpected notice: {text}")


# ---------- round trips


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_tensor_comes_back_bit_for_bit_and_saving_changes_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    members = {
        "shared": base,
        "alias": base,
        "transposed": base.t(),
        "slice": base[1:4, ::3],
        "expanded": base[:1].expand(5, 10),
        "odd": odd,
        "parameter": torch.nn.Parameter(odd.clone()),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(-7),
    }
    kinds = (
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
    members |= {f"kind/{kind}": (base * 10).abs().to(kind) for kind in kinds}
    before = {
        name: hashlib.sha256(bits(tensor.detach())).digest() for name, tensor in members.items()
    }
    store = Store(tmp_path)
    store.save(1, {"model": members, "nothing": {}}, {})
    saved = store.newest(no_notice)
    loaded = saved.tensors("model")
    assert {
        name: hashlib.sha256(bits(tensor.detach())).digest() for name, tensor in members.items()
    } == before
    assert {
        name: hashlib.sha256(bits(tensor)).digest() for name, tensor in loaded.items()
    } == before
    assert all(
        loaded[name].shape == tensor.shape and loaded[name].dtype == tensor.dtype
        for name, tensor in members.items()
    )
    assert members["alias"] is members["shared"] and not members["transposed"].is_contiguous()
    assert saved.tensors("nothing") == {}


@pytest.mark.parametrize("size", [3, 2], ids=["whole", "a piece is missing"])
def test_pieces_of_a_tensor_are_put_together_if_all_are_there(size: int, tmp_path: Path) -> None:
    """As several ranks leave them, one file each."""
    whole = torch.arange(12.0).reshape(6, 2)
    store, written = Store(tmp_path), {}
    temporary = store.begin(1)
    for rank in range(size):
        piece = Piece(whole[2 * rank : 2 * rank + 2], (2 * rank, 0), (6, 2))
        name = f"model-{rank + 1:05d}-of-00003.safetensors"
        written |= store.write_group(temporary, name, {"weight": piece})
    store.seal(temporary, 1, written, {})
    store.publish(temporary, 1)
    saved = Store(tmp_path).newest(no_notice)
    if size == 3:
        assert saved.tensors("model")["weight"].equal(whole)
        return
    with pytest.raises(CheckpointError, match=r"'weight'.*\[6, 2\]"):
        saved.tensors("model")


def test_what_is_loaded_lives_without_the_file(tmp_path: Path) -> None:
    save(Store(tmp_path), 1)
    saved = Store(tmp_path).newest(no_notice)
    tensors = saved.tensors("model")
    for tensor in tensors.values():
        tensor.add_(1)  # must not reach the disk
    assert_holds(Store(tmp_path).newest(no_notice), 1)
    file = saved.path / "model.safetensors"
    os.truncate(file, 0)  # a mapped file would now crash the process
    assert torch.equal(tensors["w"], state(1)[0]["model"]["w"] + 1)


def test_documents_come_back_and_unknown_names_list_the_known(tmp_path: Path) -> None:
    document = {
        "text": "ä\n",
        "number": 0.1 + 0.2,
        "big": 2**70,
        "nested": [{"a": [None, True]}, []],
    }
    store = Store(tmp_path)
    store.save(1, {}, {"data": document})
    saved = store.newest(no_notice)
    assert saved.document("data") == document
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*data\.json"):
        saved.tensors("model")


@pytest.mark.parametrize(
    ("tensors", "documents", "message"),
    [
        (
            {"model": {"w": torch.zeros(2, dtype=torch.complex64)}},
            {},
            "'w' of 'model'",
        ),
        (
            {"model": {"w": torch.zeros(2, 2).to_sparse()}},
            {},
            "'w' of 'model'",
        ),
        ({"../model": {}}, {}, r"\.\./model"),
        ({}, {"MANIFEST": {}}, "MANIFEST"),
        ({}, {"train": float("nan")}, "'train'.*JSON"),
        ({}, {"train": {1, 2}}, "'train'.*JSON"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    tmp_path: Path, tensors: dict, documents: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Store(tmp_path / "checkpoints").save(1, tensors, documents)
    assert list(tmp_path.iterdir()) == []


# ---------- crashes and faults


class Crash(BaseException):
    """The process dies here; nothing of it runs afterwards."""


class Faulty(Files):
    """Counts operations; from number ``positions`` on fails, either half-way through it or right
    after it.
    """

    def __init__(
        self,
        at: int = 10**9,
        error: BaseException | None = None,
        *,
        after: bool = False,
        once: bool = False,
    ) -> None:
        self.at, self.error, self.after, self.once, self.calls = (
            at,
            error or Crash(),
            after,
            once,
            [],
        )

    def _call(
        self,
        operation: str,
        path: Path,
        act: Callable[[], object],
        half: Callable[[], object] = lambda: None,
    ) -> object:
        number = len(self.calls)
        self.calls.append((operation, path.name))
        if number < self.at or (self.once and number > self.at):
            return act()
        if number == self.at:
            (act if self.after else half)()
        raise self.error

    def _half(self, path: Path) -> None:
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> Written:
        write = super().write_tensors
        return self._call(
            "write",
            path,
            lambda: write(path, tensors),
            lambda: (write(path, tensors), self._half(path)),
        )

    def write_bytes(self, path: Path, content: bytes) -> Written:
        write = super().write_bytes
        return self._call(
            "write",
            path,
            lambda: write(path, content),
            lambda: write(path, content[: len(content) // 2]),
        )

    def fsync(self, path: Path) -> None:
        self._call("fsync", path, lambda: Files.fsync(self, path))

    def fsync_directory(self, path: Path) -> None:
        self._call("fsync_directory", path, lambda: Files.fsync_directory(self, path))

    def mkdir(self, path: Path) -> None:
        self._call("mkdir", path, lambda: Files.mkdir(self, path))

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", target, lambda: Files.rename(self, source, target))

    def remove_tree(self, path: Path) -> None:
        victims = sorted(file for file in path.rglob("*") if file.is_file())[:1]
        self._call(
            "remove_tree",
            path,
            lambda: Files.remove_tree(self, path),
            lambda: [victim.unlink() for victim in victims],
        )


def operations(tmp_path: Path, before: tuple[int, ...]) -> list[tuple[str, str]]:
    """What one save does after others."""
    store = Store(tmp_path / "count")
    save(store, *before)
    store.files = Faulty()
    save(store, max(before, default=0) + 1)
    shutil.rmtree(store.directory)
    return store.files.calls


def test_files_reach_the_disk_before_their_names_do_and_old_ones_go_last(tmp_path: Path) -> None:
    calls = operations(tmp_path, (1, 2))
    publication = calls.index(("rename", "step-00000003"))
    written = [name for operation, name in calls if operation == "write"]
    synced = [name for operation, name in calls[:publication] if operation == "fsync"]
    assert sorted(written) == sorted(synced)
    assert written[-1] == MANIFEST
    assert [operation for operation, _ in calls[publication - 2 :]] == [
        "fsync", "fsync_directory", "rename", "fsync_directory", "rename", "remove_tree",
    ]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["half-way", "right after"])
@pytest.mark.parametrize("before", [(), (1,), (1, 2), (1, 2, 3)], ids=len)
def test_a_crash_at_any_operation_loses_nothing(
    tmp_path: Path, before: tuple[int, ...], after: bool
) -> None:
    step = max(before, default=0) + 1
    calls = operations(tmp_path, before)
    assert len(calls) >= 12
    for at in range(len(calls)):
        directory = tmp_path / str(at)
        save(Store(directory), *before)
        with pytest.raises(Crash):
            save(Store(directory, files=Faulty(at, after=after)), step)
        published = calls.index(("rename", f"step-{step:08d}")) < at + after
        newest = Store(directory).newest(no_notice)
        if published or before:
            assert_holds(newest, step if published else step - 1)
        else:
            assert newest is None
        save(Store(directory), step, step + 1)  # the next process is not in the way of itself
        assert_holds(Store(directory).newest(no_notice), step + 1)
        assert not list(directory.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("code", "expected", "exit_code"),
    [
        (errno.ENOSPC, ResourceError, 7),
        (errno.EDQUOT, ResourceError, 7),
        (errno.EIO, CheckpointError, 5),
        (errno.EROFS, CheckpointError, 5),
    ],
)
def test_a_disk_that_fails_at_any_operation_leaves_the_old_and_no_rubbish(
    tmp_path: Path, code: int, expected: type[Exception], exit_code: int
) -> None:
    calls = operations(tmp_path, (1, 2))
    for at in range(len(calls)):
        directory = tmp_path / str(at)
        store = Store(directory)
        save(store, 1, 2)
        store.files = Faulty(at, OSError(code, os.strerror(code)), once=True)
        with pytest.raises(expected, match=str(directory)) as caught:
            save(store, 3)
        assert caught.value.exit_code == exit_code
        if code == errno.ENOSPC:
            assert "200 bytes" in str(caught.value)
        published = ("rename", "step-00000003") in calls[:at]
        assert_holds(store.newest(no_notice), 3 if published else 2)
        assert published or not list(directory.glob(".tmp-*"))
        store.files = Files()
        save(store, 3, 4)
        assert store.steps()[-2:] == [3, 4]


# ---------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def older(path: Path) -> Path:
    return path.parent.parent / "step-00000001" / path.name


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "bit flipped": flip,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": lambda path: path.unlink(),
    "older": lambda path: shutil.copyfile(older(path), path),
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "renamed": lambda path: path.rename(path.with_suffix(".old")),
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "train.json", MANIFEST]
)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_skipped_left_alone_and_survived(
    tmp_path: Path, kind: str, name: str
) -> None:
    save(Store(tmp_path), 1, 2)
    broken = tmp_path / "step-00000002"
    DAMAGE[kind](broken / name)
    before = {path.name: path.stat().st_size for path in broken.iterdir()}
    notices: list[str] = []
    store = Store(tmp_path)
    assert_holds(store.newest(notices.append), 1)
    assert len(notices) == 1 and str(broken) in notices[0] and name in notices[0]
    assert {path.name: path.stat().st_size for path in broken.iterdir()} == before
    save(store, 2, 3, 4)
    assert_holds(Store(tmp_path).newest(no_notice), 4)
    (aside,) = tmp_path.glob("step-00000002-damaged-*")
    assert {path.name: path.stat().st_size for path in aside.iterdir()} == before


def reseal(path: Path, **changes: object) -> None:
    """Forge a manifest that matches its own hash."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}, this lswt-core reads {FORMAT}"),
        ({"format": "1"}, "has format '1'"),
        ({"step": 7}, "belongs to step 7"),
        ({"step": None}, "not a checkpoint's manifest"),
        (
            {"files": {"../step-00000001/train.json": {"bytes": 1, "sha256": ""}}},
            "not a checkpoint's manifest",
        ),
        ({"files": {"/etc/hostname": {"bytes": 1, "sha256": ""}}}, "not a checkpoint's manifest"),
        ({"files": []}, "not a checkpoint's manifest"),
        ({"files": {"train.json": {"bytes": -1, "sha256": ""}}}, "not a checkpoint's manifest"),
    ],
)
def test_a_forged_or_foreign_manifest_is_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    save(Store(tmp_path), 1, 2)
    reseal(tmp_path / "step-00000002", **changes)
    notices: list[str] = []
    assert_holds(Store(tmp_path).newest(notices.append), 1)
    assert len(notices) == 1 and message in notices[0]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"null", b"\xff", b"{}"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    save(Store(tmp_path), 1, 2)
    (tmp_path / "step-00000002" / MANIFEST).write_bytes(content)
    notices: list[str] = []
    assert_holds(Store(tmp_path).newest(notices.append), 1)
    assert len(notices) == 1


@pytest.mark.parametrize(
    "name",
    [
        "step-00000009-tmp",
        "step-9",
        "xstep-00000009",
        "step-00000009.old",
        ".tmp-9-aa",
        "step-000000009",
    ],
)
def test_only_whole_names_are_checkpoints(tmp_path: Path, name: str) -> None:
    save(Store(tmp_path), 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "step-00000008").write_text("a file")
    assert Store(tmp_path).steps() == [1]
    assert_holds(Store(tmp_path).newest(no_notice), 1)


# ---------- what is kept


def test_nothing_yet(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").newest(no_notice) is None
    assert Store(tmp_path / "none").steps() == []


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path, keep=keep)
    save(store, 1, 5, 7, 100, 123_456_789)
    assert store.steps() == [1, 5, 7, 100, 123_456_789][-keep:]


@pytest.mark.parametrize("fresh", [True, False], ids=["new process", "same process"])
def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path, fresh: bool) -> None:
    store = Store(tmp_path)
    save(store, 1, 2)
    os.truncate(tmp_path / "step-00000002" / "model.safetensors", 9)
    save(Store(tmp_path) if fresh else store, 3)
    assert store.steps() == [1, 2, 3]
    save(Store(tmp_path) if fresh else store, 4)
    assert store.steps() == [3, 4]


def test_one_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Store(tmp_path, keep=1)


def test_a_step_that_is_saved_is_not_written_again(tmp_path: Path) -> None:
    save(Store(tmp_path), 1)
    store = Store(tmp_path, files=Faulty(0))
    assert store.save(1, *state(1)) == tmp_path / "step-00000001"


def test_a_rank_that_hashed_its_share_alone_does_not_take_the_whole_for_intact(
    tmp_path: Path,
) -> None:
    save(Store(tmp_path), 1)
    damaged = tmp_path / "step-00000001" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    store = Store(tmp_path)
    assert store.fault(1, [0]) == "" and damaged.name in store.fault(1, [1])
    save(store, 1)
    assert_holds(Store(tmp_path).newest(no_notice), 1)


# ---------- processes


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


HOLD = """
import sys, time
from pathlib import Path
from lswt_core.checkpoint import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_directory_has_one_owner_until_it_dies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with python(HOLD, run) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with (
                pytest.raises(BusyError, match=rf"\b{holder.pid}\b") as caught,
                RunLock(run),
            ):
                pass
        assert caught.value.exit_code == 73
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    with RunLock(run), pytest.raises(BusyError, match=rf"\b{os.getpid()}\b"), RunLock(run):
        pass
    with RunLock(run):
        pass


AUDIT = """
import sys
found = []
sys.addaudithook(lambda event, _: found.append(event) if event == "pickle.find_class" else None)
from pathlib import Path
import torch
from lswt_core.checkpoint import Store
store = Store(Path(sys.argv[1]))
began = len(found)
for step in (1, 2, 3):
    store.save(step, {"model": {"w": torch.ones(3)}}, {"train": {}})
saved = store.newest(print)
print(saved.tensors("model")["w"].sum().item(), saved.document("train"), len(found) - began)
"""


@pytest.mark.slow
def test_no_pickle(tmp_path: Path) -> None:
    with python(AUDIT, tmp_path) as process:
        assert process.communicate(timeout=60)[0] == "3.0 {} 0\n"
