"""The conformance kit: our plugins pass, and each mutant is caught by its check alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import SkipTest

import helpers  # one thread: tiny tensors
import mutant_import
import mutants
import processes
import pytest
import right_components
import torch

from lswt_core.__main__ import main
from lswt_core.cli.scaffold import examples
from lswt_core.conformance import Check, Failed, checks, fresh_process
from lswt_core.conformance.check import RULES
from lswt_core.errors import PluginError
from lswt_core.interfaces import Component, Dims
from lswt_core.registry.kinds import KINDS

# its defaults are on the Hub; tests/test_tokenizers.py and test_sources.py have local ones
NETWORK = ("lswt_hf",)
MODULES = [name for name in helpers.PLUGINS if name not in NETWORK]
EXAMPLES = sorted(path.stem for path in Path(examples.__path__[0]).glob("[!_]*.py"))

# checks of a second and more
LONG = {
    "compile",
    "coordinate check",
    "fingerprint",
    "huggingface",
    "import effects",
    "long sequences",
    "order",
    "repeatable",
    "sharding",
}
BY_MUTANT: defaultdict[str, list[Check]] = defaultdict(list)
for found in [*checks(mutants), *checks(mutant_import)]:
    BY_MUTANT[found.subject.component.__name__].append(found)
# those that read whole installations, import other libraries, or have many components
LONGEST = ("lswt_python", "lswt_wandb", "lswt_blocks", "lswt_mlp", "lswt_recall", "lswt_rope")
QUICK_MODULES = [name for name in MODULES if name not in LONGEST]
QUICK = [name for name, check in mutants.EXPECTED_CHECK.items() if check not in LONG]


@pytest.mark.parametrize("module", helpers.slow_unless(QUICK_MODULES, MODULES))
def test_our_plugins_conform(module: str) -> None:
    applied = [one for one in checks(module) if one.rule.name not in LONG]
    failed = [one.report() for one in applied if one.result().outcome == "FAILED"]
    assert not failed, "\n\n".join(failed)


@cache
def answer_in_fork(request: str) -> dict[str, Any]:
    """``fresh_process.run`` by a process that is forked from one that has imported no plugin."""
    done = processes.run("fresh_plugin", cwd=Path(__file__).parent, input=request, plugins=False)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1])
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins are imported in forked processes, which begin two seconds sooner."""
    monkeypatch.setattr(fresh_process, "run", answer_in_fork)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_our_plugins_pass_the_long_checks(module: str, forked: None) -> None:
    applied = [one for one in checks(module) if one.rule.name in LONG]
    failed = [one.report() for one in applied if one.result().outcome == "FAILED"]
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_what_plugins_new_writes_conforms(kind: str) -> None:
    applied = checks(f"lswt_core.cli.scaffold.examples.{kind}")
    assert {one.subject.kind for one in applied} == {kind} <= KINDS.keys()
    quick = [one for one in applied if one.rule.name not in LONG]
    failed = [one.report() for one in quick if one.result().outcome == "FAILED"]
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXAMPLES)
def test_what_plugins_new_writes_passes_the_long_checks(kind: str, forked: None) -> None:
    applied = checks(f"lswt_core.cli.scaffold.examples.{kind}")
    failed = [one.report() for one in applied if one.result().outcome == "FAILED"]
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("name", helpers.slow_unless(QUICK, mutants.EXPECTED_CHECK))
def test_a_mutant_is_caught_by_the_check_meant_for_it(name: str) -> None:
    meant = [one for one in BY_MUTANT[name] if one.rule.name == mutants.EXPECTED_CHECK[name]]
    assert [one.result().outcome for one in meant] == ["FAILED"], meant[0].result()


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.EXPECTED_CHECK)
def test_no_other_check_catches_a_mutant(name: str) -> None:
    failed = [one.rule.name for one in BY_MUTANT[name] if one.result().outcome == "FAILED"]
    assert failed == [mutants.EXPECTED_CHECK[name]]


@pytest.mark.parametrize("component", right_components.COMPONENTS)
def test_what_is_right_is_not_blamed(component: type[Component]) -> None:
    applied = [one for one in checks(component) if one.rule.name not in LONG]
    failed = [one.report() for one in applied if one.result().outcome == "FAILED"]
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
def test_what_is_right_is_not_blamed_for_what_several_ranks_do() -> None:
    applied = [one for one in checks(right_components) if one.rule.name == "sharding"]
    assert len(applied) == len(right_components.COMPONENTS)
    failed = [one.report() for one in applied if one.result().outcome == "FAILED"]
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.sharded.CURE)
def test_a_mistake_on_several_ranks_is_told_with_its_cure(name: str) -> None:
    found = next(one for one in BY_MUTANT[name] if one.rule.name == "sharding")
    assert mutants.sharded.CURE[name] in found.result().message
    assert found.subject.offer.name in found.report()


def test_every_check_catches_a_mutant() -> None:
    caught = {
        (mutants.EXPECTED_CHECK[name], applied[0].subject.kind)
        for name, applied in BY_MUTANT.items()
    }
    uncovered = {
        one.name for one in RULES if not any((one.name, kind) in caught for kind in one.kinds)
    }
    assert uncovered <= {"huggingface"}, "which needs an installed package"
    assert len(mutants.EXPECTED_CHECK) >= 90


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_checked_and_every_check_says_why_and_how_to_fix(kind: str) -> None:
    applied = [one for one in RULES if kind in one.kinds]
    assert len(applied) >= 3
    assert all(len(one.why) > 20 and len(one.fix) > 10 and one.function.__doc__ for one in applied)


def test_a_failure_says_what_why_and_how_to_fix_it() -> None:
    check = next(one for one in BY_MUTANT["Mean"] if one.rule.name == "micro-batches")
    assert str(check) == "loss/mean: micro-batches"
    with pytest.raises(
        Failed,
        match=r"\n *why it matters: \S(.|\n)*\n *fix: \S",
    ):
        check()


def test_a_constant_in_the_constructor_is_said_to_be_no_buffer() -> None:
    for name, words in (("PlainConstant", "register_buffer"), ("ReadsConstant", "meta device")):
        check = next(one for one in BY_MUTANT[name] if one.rule.name == "meta device")
        assert words in check.result().message
    skipped = [one for one in BY_MUTANT["PlainConstant"] if one.rule.name == "forward"]
    assert [one.result().outcome for one in skipped] == ["skipped"]


@pytest.mark.parametrize("needs", ["nonzero", "item", "tolist", "unique", "numpy"])
def test_a_constructor_that_needs_values_is_told(
    needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = right_components.Relu.__init__

    def init(self: right_components.Relu, dims: Dims) -> None:
        build(self, dims)
        getattr(torch.ones(()), needs)()

    monkeypatch.setattr(right_components.Relu, "__init__", init)
    applied = checks(right_components.Relu)
    result = next(one for one in applied if one.rule.name == "meta device").result()
    assert result.outcome == "FAILED" and "reset_parameters" in result.message


def test_float32_in_a_float64_forward_is_said_to_be_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(component: type[Component], check: str) -> str:
        return next(one for one in checks(component) if one.rule.name == check).result().message

    layer, loss = right_components.Relu, right_components.Balanced
    monkeypatch.setattr(layer, "forward", lambda self, x: self.fc1(x.float()))
    assert "promote_types" in message(layer, "forward")
    exact = loss.loss
    monkeypatch.setattr(loss, "loss", lambda self, gate: exact(self, gate.float()))
    found = message(loss, "micro-batches")
    assert len(set(re.findall(r"\d\.\d{7,}", found))) == 2 and "float32" in found


def test_a_check_that_presupposes_a_failed_one_is_skipped() -> None:
    check = next(one for one in BY_MUTANT["MeanOverRows"] if one.rule.name == "row independence")
    assert check.result().outcome == "FAILED"
    skipped = next(one for one in BY_MUTANT["MeanOverTokens"] if one.rule.name == "causality")
    with pytest.raises(SkipTest, match="'position-wise'"):
        skipped()


def test_the_command_reports_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    right = Path(examples.__path__[0], "schedule.py").read_text()
    file.write_text(right.replace("return min(done", "return 2 * min(done"))
    only = [word for check in ("options", "range", "stateless") for word in ("--only", check)]
    assert main(["plugins", "check", str(file), *only]) == PluginError.exit_code
    text = capsys.readouterr().out
    assert "schedule/example: range" in text
    assert "FAILED" in text
    assert "fix: return a number between 0 and 1" in text
    assert "1 ok, 1 failed, 1 skipped" in text
    assert main(["plugins", "check", "lswt_schedules", "--only", "range", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {one["check"] for one in report} == {"range"}
    assert {one["outcome"] for one in report} == {"ok"}
    assert main(["plugins", "check", "lswt_schedules", "--only", "rang"]) == 2
    assert main(["plugins", "check", "lswt_nonesuch"]) == PluginError.exit_code
    assert "lswt_nonesuch" in capsys.readouterr().err


def test_options_and_classes_can_be_given() -> None:
    from lswt_rope import Rope

    applied = checks(Rope, reversed=False)
    assert {str(one.subject) for one in applied} == {"positional/rope"}
    assert applied[0].subject.options == {"reversed": False}


@pytest.mark.slow
def test_the_test_that_plugins_new_writes_passes(tmp_path: Path) -> None:
    assert main(["plugins", "new", "fading", "--kind", "positional", "--in", str(tmp_path)]) == 0
    package = tmp_path / "lswt-fading"
    surroundings = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "."],
        cwd=package,
        env=surroundings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
