"""A study from its command to its exit code, in this process: arms are built and certified, and
what their runs came to is given.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import write_shallow_recipe

from lswt_core.__main__ import main
from lswt_core.ablation.certificate import RunRecord, check_records
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.progress import Job, Progress
from lswt_core.ablation.runs.runner import Runner, RunsStopped, Workers
from lswt_core.ablation.runs.store import RunStore, write_json
from lswt_core.errors import UsageError
from lswt_core.hf.directory import written_whole
from lswt_core.recipe import Recipe

Runs = Callable[[Job], Outcome]
pytestmark = pytest.mark.usefixtures("budgets_once")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shallow_recipe(tmp_path_factory.mktemp("study"))


@pytest.fixture
def study(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, Path]]:
    """``study(runs, words)``: ablate, with these outcomes and without a picture; its exit code and
    the directory of its report.
    """

    def ablate(runs: Runs, *words: str) -> tuple[int, Path]:
        def recorded(job: Job) -> Outcome:
            directory = store_of(tmp_path, words) / job.key
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "start.json").write_text("{}")
            (directory / "batches.txt").write_text("")
            return runs(job)

        monkeypatch.setattr(
            Runner, "run", lambda self: {job.key: recorded(job) for job in self.jobs}
        )
        for picture in ("plot_differences", "plot_curves"):
            monkeypatch.setattr(f"lswt_core.ablation.report.publish.{picture}", lambda *_: b"")
        out = tmp_path / "out"
        return main(["ablate", str(recipe), *words, "--seeds", "2", *places(tmp_path, words)]), out

    return ablate


def store_of(directory: Path, words: Sequence[str]) -> Path:
    """The store of a study."""
    return Path(words[words.index("--store") + 1]) if "--store" in words else directory / "store"


def places(directory: Path, words: Sequence[str]) -> list[str]:
    """Where the study goes, unless its words say so."""
    defaults = {"--store": directory / "store", "--out": directory / "out"}
    return [
        word
        for option, path in defaults.items()
        if option not in words
        for word in (option, str(path))
    ]


def finished(
    job: Job, documents: Sequence[tuple[str, float, int]] = (("a", 300.0, 100), ("b", 90.0, 28))
) -> Outcome:
    train = job.recipe.train
    tokens = train.total_steps * train.tokens_per_step
    return Outcome(
        job.seed, loss=3.0 + job.seed / 10, documents=list(documents), curve=[(tokens, 3.1)]
    )


def read(directory: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return report


# ---------- budgets


BUDGETS = (
    "train.steps=24",
    "train.batch_size=8",
    "train.seq_len=32",
    "train.document_masking=true",
    "train.tokens=768",
    "train.document_assignment=round-robin",
)


@pytest.mark.parametrize("swap", BUDGETS)
def test_another_budget_is_no_swap(
    recipe: Path, swap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", str(recipe), "--swap", swap, "--dry-run"]) == 2
    assert f"--allow {swap.partition('=')[0]}\n" in capsys.readouterr().err


def test_another_budget_passes_by_its_name(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [swap.partition("=")[0] for swap in BUDGETS]
    words = [
        word
        for swap, key in zip(BUDGETS, keys, strict=True)
        for word in ("--swap", swap, "--allow", key)
    ]
    assert main(["ablate", str(recipe), *words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"allowed: {key} is" in printed for key in keys)


def test_a_budget_that_an_arm_says_it_is_about_is_refused_too(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe.with_name("longer.toml")
    file.write_text(
        'recipe = "nano.toml"\n[arm.longer]\naxis = ["train"]\nset = ["train.steps=24",'
        ' "train.grad_clip=2.0"]\n'
    )
    assert main(["ablate", str(file), "--dry-run"]) == 2
    assert "--allow train.steps\n" in capsys.readouterr().err


def test_the_work_of_the_whole_training_is_shown(
    study: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = study(finished, "--swap", "train.steps=24", "--allow", "train.steps")
    assert code == 0
    baseline, arm = read(out)["arms"]
    assert (baseline["tokens"], arm["tokens"]) == (12 * 64, 24 * 64)
    assert baseline["flops_per_token"] == arm["flops_per_token"]
    assert (
        arm["training_flops"] == 2 * baseline["training_flops"] == 24 * 64 * arm["flops_per_token"]
    )
    evaluated = {"tokens": 128, "documents": 2, "bytes": None}
    assert [one["evaluated"] for one in (baseline, arm)] == [evaluated] * 2
    assert read(out)["certificate"][0]["status"] == "allowed"
    printed = capsys.readouterr().out
    assert "+100.00%" in printed, "in the table before the runs"
    assert all(
        "+100.0%" in text
        for text in (printed, (out / "report.md").read_text(), (out / "report.html").read_text())
    )


@pytest.mark.parametrize(
    "documents", [[("a", 300.0, 100), ("b", 90.0, 20)], [("a", 300.0, 100), ("c", 90.0, 28)]]
)
def test_runs_that_were_measured_on_other_text_are_not_compared(
    study: Callable[..., tuple[int, Path]],
    documents: Sequence[tuple[str, float, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def runs(job: Job) -> Outcome:
        return finished(job) if job.arm == "baseline" else finished(job, documents)

    assert study(runs, "--swap", "ffn=gelu")[0] == 2
    assert "--allow data" in capsys.readouterr().err
    code, out = study(runs, "--swap", "ffn=gelu", "--allow", "data")
    assert code == 0 and read(out)["certificate"][0]["status"] == "allowed"


def test_runs_that_trained_on_other_amounts_are_not_compared(
    study: Callable[..., tuple[int, Path]],
) -> None:
    def runs(job: Job) -> Outcome:
        return Outcome(job.seed, loss=3.0, curve=[(768 if job.arm == "baseline" else 700, 3.1)])

    assert study(runs, "--swap", "ffn=gelu")[0] == 2
    assert study(runs, "--swap", "ffn=gelu", "--allow", "tokens")[0] == 0


@pytest.mark.slow
def test_a_matched_arm_does_the_baselines_work_in_all(
    study: Callable[..., tuple[int, Path]],
) -> None:
    words = ("--swap", "train.steps=10", "--allow", "train.steps", "--match", "flops")
    code, out = study(finished, *words)
    assert code == 0
    baseline, arm = read(out)["arms"]
    assert arm["training_flops"] == pytest.approx(baseline["training_flops"], rel=0.01)
    assert arm["tokens"] < baseline["tokens"]


def test_an_arm_gets_the_steps_that_take_the_baselines_time(
    study: Callable[..., tuple[int, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured: list[int] = []

    def time_steps(baseline: Recipe, arm: Recipe, threads: int, plugins: object) -> object:
        measured.append(threads)
        return [[1.0, 1.1, 0.9], [1.5, 1.65, 1.35]]

    monkeypatch.setattr("lswt_core.ablation.match_time.time_steps", time_steps)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    words = ("--swap", "ffn=gelu", "--match", "time", "--jobs", "2")
    code, out = study(finished, *words)
    assert code == 0 and study(finished, *words)[0] == 0
    assert measured == [max(1, (os.cpu_count() or 1) // 2)], "once, with the threads of a run"
    baseline, arm = read(out)["arms"]
    assert (baseline["tokens"], arm["tokens"]) == (12 * 64, 8 * 64)
    (certificate,) = read(out)["certificate"]
    assert certificate["status"] == "certified" and certificate["axes"] == ["ffn", "train.steps"]
    assert certificate["matched"]["measured"]["ratio"] == pytest.approx(1.5)
    assert "takes 1.500 times as long" in capsys.readouterr().out
    words = ("--swap", "train.steps=10", "--allow", "train.steps", "--match", "time")
    assert study(finished, *words)[0] == 2
    assert "the swap is about it" in capsys.readouterr().err


@pytest.mark.slow
def test_updates_are_timed_side_by_side(recipe: Path) -> None:
    from lswt_core.ablation.match_time import time_steps

    shallow, deep = (Recipe.load(recipe, [f"model.n_layers={n}"]) for n in (1, 6))
    shorter, longer = time_steps(shallow, deep, 1, [])
    assert len(shorter) == len(longer) > 4
    assert sorted(shorter)[len(shorter) // 2] < sorted(longer)[len(longer) // 2]


def test_batches_differ_where_the_batch_was_allowed_to() -> None:
    one, other = RunRecord({}, ["1", "2"]), RunRecord({}, ["3", "4"])
    assert [
        flaw.about for flaw in check_records(one, other, ["train"], ["train.grad_clip"])[1]
    ] == ["data"]
    assert not check_records(one, other, ["ffn"], ["ffn.use", "train.batch_size"])[1]


@pytest.mark.parametrize("cheater", ["baseline", "ffn=gelu"])
def test_what_a_run_found_in_itself_is_refused_unless_allowed(
    study: Callable[..., tuple[int, Path]], cheater: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(job: Job) -> Outcome:
        flaws = [("causality", "it looks ahead")] if job.arm == cheater else []
        return replace(finished(job), flaws=flaws)

    assert study(runs, "--swap", "ffn=gelu")[0] == 2
    assert "it looks ahead" in capsys.readouterr().err
    code, out = study(runs, "--swap", "ffn=gelu", "--allow", "causality")
    assert code == 0 and read(out)["certificate"][0]["status"] == "allowed"


def test_every_number_is_traced_to_its_runs(
    study: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {"ffn/gelu": {"distribution": "lswt-core", "version": "1", "sha256": "abc"}}
    core: dict[str, str | None] = {"version": "1", "sha256": "def", "commit": None}
    flops: dict[str, int | None] = {}

    def runs(job: Job) -> Outcome:
        flops[job.arm] = job.flops
        unigram = [2.5 * 100, 2.5 * 28]
        facts = {"unigram": unigram, "evaluated_bytes": 120, "text": "t", "evaluated_text": "e"}
        heeded = ["step 3: the batch was discarded"] if job.arm != "baseline" else []
        more = {"code": code, "core": core, "warnings": heeded, "runs_at_once": 1}
        return replace(finished(job), **facts, **more)

    _, out = study(runs, "--swap", "ffn=gelu")
    _, arm = read(out)["arms"]
    assert flops == {one["name"]: one["training_flops"] for one in read(out)["arms"]}
    assert all(flops.values())
    run = arm["runs"][1]
    assert run["seed"] == 1 and run["text"] == "t" and run["evaluated_text"] == "e"
    assert run["directory"] == str(tmp_path / "store" / run["key"]) and len(run["key"]) == 20
    assert arm["evaluated"] == {"tokens": 128, "documents": 2, "bytes": 120}
    assert arm["unigram"]["loss"] == 2.5
    assert arm["code"] == {"components": code, "core": core}
    assert "WORSE THAN UNIGRAM" in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "ffn=gelu (seeds 0, 1): step 3: the batch was discarded" in text
        assert "a norm inside" in text


# ---------- exit codes


def lost(job: Job) -> Outcome:
    return Outcome.failed(job.seed, "killed by signal 9")


@pytest.mark.parametrize(
    ("fails", "code"),
    [
        (lambda job: True, 8),
        (lambda job: job.arm != "baseline", 8),
        (lambda job: job.arm != "baseline" and job.seed == 1, 8),
        (lambda job: False, 0),
    ],
    ids=["every run", "an arm", "a run", "none"],
)
def test_a_study_with_failures_has_a_report_and_says_so(
    study: Callable[..., tuple[int, Path]],
    fails: Callable[[Job], bool],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exit_code, out = study(
        lambda job: lost(job) if fails(job) else finished(job), "--swap", "ffn=gelu"
    )
    assert exit_code == code
    failed = sum(len(arm["failures"]) for arm in read(out)["arms"])
    assert (out / "report.html").is_file()
    assert (f"{failed} of 4 runs failed" in capsys.readouterr().err) == bool(failed)


def test_an_ablation_names_what_comes_next(
    study: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    swap = ("--swap", "ffn=gelu")
    assert study(finished, *swap, "--dry-run")[0] == 0
    _, given = capsys.readouterr().out.split("next:\n  python -m lswt_core ")
    assert main(shlex.split(given)) == 0
    _, page = capsys.readouterr().out.split("next:\n  open ")
    assert Path(page.strip()).is_file()


def test_the_baseline_is_read_once_for_its_arms_and_once_for_each_attention(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, ...]] = []
    load = Recipe.load

    def watched(path: Path, overrides: Sequence[str] = (), **more: Any) -> Recipe:
        reads.append(tuple(overrides))
        return load(path, overrides, **more)

    monkeypatch.setattr(Recipe, "load", watched)
    assert main(["ablate", str(recipe), "--swap", "ffn=gelu", "--dry-run"]) == 0
    assert len(reads) == len(set(reads)) == 4


def never(job: Job) -> Outcome:
    raise AssertionError("a run was made")


def a_file(directory: Path) -> Path:
    path = directory / "file"
    path.write_text("something")
    return path


@pytest.mark.parametrize(
    "place", [a_file, lambda _: Path("/proc/lswt"), lambda directory: a_file(directory) / "below"]
)
@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_place_that_cannot_be_written_to_is_refused_before_the_runs(
    study: Callable[..., tuple[int, Path]],
    place: Callable[[Path], Path],
    option: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = place(tmp_path)
    assert study(never, "--swap", "ffn=gelu", option, str(path))[0] == 2
    output = capsys.readouterr().err
    assert (
        f"choose another {option}" in output and str(path) in output and "Traceback" not in output
    )


def test_a_torn_record_of_a_report_is_named_and_written_anew(
    study: Callable[..., tuple[int, Path]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ablation.json").write_text('{"finger')
    code, out = study(finished, "--swap", "ffn=gelu")
    assert code == 0 and "ablation.json" in caplog.text
    assert json.loads((out / "ablation.json").read_text())["fingerprint"]


@pytest.mark.parametrize("place", [a_file, lambda _: Path("/proc/lswt")])
def test_other_commands_refuse_such_a_place_too(
    recipe: Path, place: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place(tmp_path)
    assert main(["run", str(recipe), "--out", str(path)]) == 2
    with pytest.raises(UsageError, match=str(path)), written_whole(path / "model"):
        pass
    assert main(["plugins", "new", "fading", "--kind", "positional", "--in", str(path)]) == 2
    assert capsys.readouterr().err.count(str(path)) == 2


# ---------- stopping, progress


def stopped_after(count: int) -> Callable[[Runner], dict[str, Outcome]]:
    """A runner that is asked to stop after some runs."""

    def run(runner: Runner) -> dict[str, Outcome]:
        jobs = runner.jobs[:count]
        raise RunsStopped({job.key: finished(job) for job in jobs}, len(runner.jobs))

    return run


def test_a_stopped_ablation_prints_what_is_finished_and_what_is_missing(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Runner, "run", stopped_after(3))
    words = ["--swap", "ffn=gelu", "--seeds", "2", *places(tmp_path, [])]
    assert main(["ablate", str(recipe), *words]) == 75
    _, table = capsys.readouterr().out.split("finished so far")
    header, baseline, arm = (line.split() for line in table.splitlines()[1:4])
    assert header[-2:] == ["missing", "seeds"]
    assert baseline == ["baseline", "3.0500", "2", "of", "2", "0", "none"]
    assert arm == ["ffn=gelu", "3.0000", "+0.0000", "1", "of", "2", "0", "1"]
    report = read(tmp_path / "out")
    assert report["unfinished"] == [{"arm": "ffn=gelu", "seeds": [1]}]
    (one,) = report["comparisons"]
    assert (one["verdict"], one["delta"], one["values"]) == ("not finished", 0.0, [0.0])
    assert one["p"] is one["ci95"] is one["p_equivalent"] is None
    assert [len(arm["failures"]) for arm in report["arms"]] == [0, 0]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "NOT FINISHED" in text and "ffn=gelu: 1" in text and "0 of 2" in text


def test_a_report_outlives_its_pictures_and_torn_records(
    study: Callable[..., tuple[int, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(job: Job) -> Outcome:
        directory = tmp_path / "store" / job.key
        (directory / "start.json").write_text('{"torn')
        return finished(job)

    def undrawable(*_: object) -> bytes:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("lswt_core.ablation.report.publish.plot_held_out", undrawable)
    code, out = study(torn, "--swap", "ffn=gelu")
    assert code == 2, "nobody can tell where the runs began"
    (certificate,) = read(out)["certificate"]
    assert certificate["status"] == "broken" and certificate["flaws"][0]["about"] == "records"
    assert "no fonts" in (out / "report.html").read_text()


def test_progress_shows_every_arm_and_the_time_left(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Recipe.load(recipe)
    jobs = [Job(arm, seed, f"{arm}{seed}", steps) for seed in (0, 1) for arm in ("baseline", "x")]
    progress = Progress(jobs, RunStore(tmp_path))
    clock = progress.began
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    assert not progress.is_due()
    progress.start(jobs[0])
    assert "seed 0: starting" in progress.text({}, ["baseline0"])
    assert progress.time_left([], ["baseline0"]) == ""
    (tmp_path / "baseline0").mkdir()
    (tmp_path / "baseline0" / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 3.5}\n{"step": 6, "eval/loss": 3.4}\n{"step": 7, "lo'
    )
    clock += 60  # half of the first of four runs
    assert progress.is_due() and not progress.is_due()
    lines = progress.text({}, ["baseline0"]).splitlines()
    assert lines[0] == "progress: 0 of 4 runs finished, about 7 min 00 s left"
    assert lines[2].split(maxsplit=4)[1:4] == ["0", "of", "2"]
    assert lines[2].endswith("seed 0: step 6/12, loss 3.5000")
    progress.finish(jobs[0])
    clock += 60
    assert progress.time_left(["baseline0"], []) == "about 6 min 00 s left"


def test_the_time_left_knows_that_runs_differ_in_size(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Recipe.load(recipe)
    sizes = {"large": 3000, "small": 1000}
    jobs = [Job(name, 0, name, steps, flops=flops) for name, flops in sizes.items()]
    unknown = [jobs[0], jobs[1]._replace(flops=None)]
    for known, left in ((jobs, "about 30 s left"), (unknown, "about 1 min 30 s left")):
        progress = Progress(known, RunStore(tmp_path))
        progress.start(known[0])
        progress.finish(known[0])
        clock = progress.began + 90
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda clock=clock: clock)
            assert progress.time_left(["large"], []) == left
            assert progress.time_left(["large", "small"], []) == ""


def test_progress_of_many_arms_shows_those_that_run(recipe: Path, tmp_path: Path) -> None:
    steps = Recipe.load(recipe)
    jobs = [Job(f"arm {i}", 0, str(i), steps) for i in range(30)]
    progress = Progress(jobs, RunStore(tmp_path))
    progress.start(jobs[20])
    head, _, *rows = progress.text({}, ["20"]).splitlines()
    assert head.startswith("progress: 0 of 30 runs finished")
    assert [row.split("  ")[1] for row in rows] == ["arm 20"]


class FakeProcess:
    """A process that has ended, or runs until it is terminated."""

    def __init__(self, code: int | None) -> None:
        self.code, self.terminated = code, False

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.terminated = True

    def wait(self, timeout: float) -> int:
        assert self.terminated
        return 75


def test_asked_to_stop_the_runner_ends_its_processes_and_keeps_what_is_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job("baseline", seed, str(seed), Recipe.load(recipe)) for seed in range(3)]
    processes: list[FakeProcess] = []
    lines: list[str] = []

    def launch(runner: Runner, path: Path, directory: Path, *_: str) -> FakeProcess:
        ends = not processes
        if ends:
            write_json(directory / "outcome.json", finished(jobs[0]).to_json())
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        processes.append(FakeProcess(0 if ends else None))
        return processes[-1]

    monkeypatch.setattr(Runner, "launch", launch)
    runner = Runner(jobs, RunStore(tmp_path), Workers(1, 1, [], []), lines.append)
    with pytest.raises(RunsStopped) as stopped:
        runner.run()
    assert [*stopped.value.outcomes] == ["0"] and stopped.value.exit_code == 75
    assert processes[1].terminated and len(processes) == 2
    assert "done, held-out loss 3.0000" in lines[1]
    assert lines[-1].startswith("stopping: 1 runs save their state")
