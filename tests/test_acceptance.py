"""The acceptance of a machine: it goes on whatever becomes of an item, ends in time, writes after
every item, and its checks see what is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lswt_core.__main__ import main
from lswt_core.acceptance import attention
from lswt_core.acceptance.benchmarks import last_error
from lswt_core.acceptance.item import Item, Result
from lswt_core.acceptance.plan import items_for
from lswt_core.acceptance.record import HTML, JSON, MARKDOWN, Record
from lswt_core.acceptance.schedule import LOG, Schedule
from lswt_core.cli import bench_acceptance
from lswt_core.cli.bench_acceptance import chosen_items, run_items
from lswt_core.errors import RunsFailed, UsageError
from lswt_core.plugin_api.attention import reference_attention

HEADER = {"command": "bench", "machine": {"type": "cpu", "name": "here", "versions": {}}}
WORDS = "bench --acceptance --out"


@pytest.fixture(autouse=True)
def items_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


def fake(function: str, limit: float = 20, seconds: float = 0, **more: Any) -> Item:
    arguments = more.pop("arguments", {})
    target = f"acceptance_items:{function}"
    return Item(function, "it holds", target, arguments, seconds, limit, "group", **more)


def ends(pid: int) -> bool:
    """Whether a process ends within seconds: whoever was killed takes a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if status.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_goes_on_past_items_that_fail_hang_and_crash(tmp_path: Path) -> None:
    note = tmp_path / "note"
    items = [
        fake("passing"),
        fake("failing"),
        fake("not_applying"),
        fake("hanging", limit=0.7, arguments={"note": str(note)}),
        fake("crashing"),
        fake("passing")._replace(name="missing library", libraries=("no_such_library",)),
        fake("passing")._replace(name="too large", memory=10**12),
        fake("passing")._replace(name="too long", seconds=1000),
        fake("reading", arguments={"record": str(tmp_path / JSON)}),
    ]
    record, schedule = Record(tmp_path, HEADER), Schedule(tmp_path, time.monotonic() + 100)
    with pytest.raises(RunsFailed, match="failing, hanging, crashing failed"):
        run_items(schedule, items, record)
    written = json.loads((tmp_path / JSON).read_text())
    found = {item["name"]: (item["status"], item["reason"]) for item in written["items"]}
    assert found["failing"] == ("failed", "ValueError: the kernel is wrong")
    assert found["not_applying"] == ("skipped", "there is no such device")
    assert found["hanging"][0] == "failed" and "still running" in found["hanging"][1]
    assert found["crashing"][0] == "failed" and "signal 6" in found["crashing"][1]
    assert found["missing library"] == ("skipped", "no_such_library not installed")
    assert found["too large"][0] == "skipped" and "1000 GB" in found["too large"][1]
    assert found["too long"][0] == "skipped" and "no time" in found["too long"][1]
    numbers = {item["name"]: item["numbers"] for item in written["items"]}
    assert numbers["passing"]["answer"] == 42
    # what the last item saw in the file
    assert numbers["reading"] == {name: found[name][0] for name in list(found)[:-1]}
    assert written["left"] == [] and ends(int(note.read_text()))
    assert "the kernel is wrong" in (tmp_path / LOG).read_text()
    for page in (MARKDOWN, HTML):
        assert "ValueError: the kernel is wrong" in (tmp_path / page).read_text()


def test_a_group_shares_a_process_until_an_item_fails(tmp_path: Path) -> None:
    items = [fake("passing"), fake("passing"), fake("failing"), fake("passing")]
    results: list[Result] = []
    Schedule(tmp_path, time.monotonic() + 100).run(items, lambda _, one: results.append(one))
    first, second, _, fourth = (one.numbers.get("process") for one in results)
    assert first == second != fourth is not None


def test_an_item_is_stopped_when_the_time_is_over(tmp_path: Path) -> None:
    item = fake("hanging", arguments={"note": str(tmp_path / "note")})
    results: list[Result] = []
    schedule = Schedule(tmp_path, time.monotonic() + 0.5)
    schedule.run([item, fake("passing", seconds=1)], lambda _, one: results.append(one))
    assert [one.status for one in results] == ["skipped"] * 2
    assert all("no time" in one.reason for one in results)


def test_a_worker_ends_with_whoever_started_it(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "lswt_core.acceptance.worker"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    note = tmp_path / "note"
    request = {"name": "", "target": "acceptance_items:hanging", "arguments": {"note": str(note)}}
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()
    while not (note.exists() and note.read_text()):
        time.sleep(0.02)
    worker.stdin.close()
    worker.wait(5)
    assert ends(int(note.read_text()))


def test_results_of_other_items_are_kept(tmp_path: Path) -> None:
    first = Record(tmp_path, HEADER)
    for name in ("one", "two"):
        first.add(fake("passing")._replace(name=name), Result(name, "failed", "before"))
    again = Record(tmp_path, HEADER)
    again.keep_earlier()
    again.add(fake("passing")._replace(name="one"), Result("one", "passed"))
    written = json.loads((tmp_path / JSON).read_text())["items"]
    assert {item["name"]: item["status"] for item in written} == {"two": "failed", "one": "passed"}
    (tmp_path / JSON).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        Record(tmp_path, HEADER).keep_earlier()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_items_are_unique_and_match_patterns(device: str) -> None:
    items = items_for({"type": device, "count": 1})
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    assert all(item.limit > item.seconds > 0 for item in items)
    chosen = chosen_items(items, "attention/*")
    assert {"attention/sdpa float32", "attention/flex bfloat16"} <= {one.name for one in chosen}
    with pytest.raises(UsageError, match="recorded decoding"):
        chosen_items(items, "attension/*")


def test_a_wrong_backend_is_found() -> None:
    case = attention.CASES[2]
    shape, device = attention.SHAPES["cpu"], torch.device("cpu")

    def found(attend: Any) -> list[str]:
        return list(
            attention.beyond(attention.compare(attend, case, shape, device, torch.bfloat16))
        )

    def with_nan(blocks: Any) -> Tensor:
        out = reference_attention(blocks)
        return torch.where(out == out.max(), torch.nan, out)

    def inexact(blocks: Any) -> Tensor:
        return reference_attention(blocks) * 1.05

    def stale_gradient(blocks: Any) -> Tensor:
        return reference_attention(
            [one._replace(v=one.v.detach() + 0 * one.v) if one.causal else one for one in blocks]
        )

    assert not found(reference_attention)
    for wrong in (with_nan, inexact):
        assert any(text.startswith("output") for text in found(wrong))
    assert [text.split(" is")[0] for text in found(stale_gradient)] == ["gradient of fused"]


def test_a_device_that_does_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_acceptance, "MACHINE", fake("crashing"))
    assert main([*WORDS.split(), str(tmp_path)]) == 8
    assert "the device does not answer" in capsys.readouterr().err
    assert json.loads((tmp_path / JSON).read_text())["items"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Traceback\n  x\ntorch.OutOfMemoryError: CUDA\n\nerror: this is a bug; please report it"
         " with the traceback above\n", "torch.OutOfMemoryError: CUDA"),
        ("... training\nerror: --against lama: neither", "error: --against lama: neither"),
        ("", "nothing on standard error"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failed_command_is_found(text: str, expected: str) -> None:
    assert last_error(text) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bench --acceptance", "needs --out"),
        (f"{WORDS} x quickstart", "takes no recipe"),
        (f"{WORDS} x --swap ffn=gelu", "takes no swap"),
        (f"{WORDS} x --minutes 0", "more than 0"),
        ("bench quickstart --minutes 3", "goes with --acceptance"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert expected in capsys.readouterr().err


def test_a_benchmark_needs_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--rounds", "2"])
    assert "recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_ends_in_time_and_nothing_fails(tmp_path: Path) -> None:
    began = time.monotonic()
    assert main([*WORDS.split(), str(tmp_path), "--minutes", "0.6"]) == 0
    assert time.monotonic() - began < 36
    written = json.loads((tmp_path / JSON).read_text())
    statuses = [item["status"] for item in written["items"]]
    assert "passed" in statuses and "failed" not in statuses and not written["left"]
    assert {item.name for item in items_for({"type": "cpu", "count": 0})} == {
        item["name"] for item in written["items"]
    }
    assert written["machine"]["versions"]["torch"] == version("torch")
