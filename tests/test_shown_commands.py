"""Commands that README, recipes and ``plugins new`` show do what they are shown for: each is run as
it is printed, its length aside.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, shipped_recipes

from lswt_core.__main__ import build_parser, main
from lswt_core.ablation import build_arms
from lswt_core.budget import Budget, budget
from lswt_core.cli import bench
from lswt_core.model.build import build_model
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS
from lswt_core.train.session import Session

PAGES = "".join(path.read_text() for path in (ROOT / "README.md", ROOT / ".github" / "guide.md"))
ABLATIONS = [path.name for path in shipped_recipes() if path.parent.name == "ablations"]
BASELINES = {"warm-start.toml": "ablations/random-start.toml"}  # the twin
OTHER_TEXT = ("bytes.toml", "mixture.toml", "site-packages.toml")  # whose losses do not compare


def commands(text: str) -> list[str]:
    """The commands of a page's shell blocks."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = (re.sub(r"\s#.*", "", line) for line in blocks.splitlines())
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


COSTS: dict[int, Budget] = {}  # of the first arm of a width that is asked about


def cost(recipe: Recipe, *about: Any) -> Budget:
    """What every arm of a width takes: certificates are asked for here, and costs take most of the
    time.
    """
    if recipe.model.d_model not in COSTS:
        COSTS[recipe.model.d_model] = budget(recipe, *about)
    return COSTS[recipe.model.d_model]


def build_alone(session: Session) -> int:
    """A run that ends where its training would begin."""
    build_model(session.recipe, session.registry, device=torch.device("cpu"), dtype=torch.float32)
    return 0


@pytest.fixture(autouse=True)
def without_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_arms, "budget", cost)
    monkeypatch.setattr(Session, "run", build_alone)
    monkeypatch.chdir(ROOT)


def called(command: str) -> int:
    """A command's exit code: a run is built, an ablation certified, what would be measured is
    built.
    """
    words = words_of(command)
    if words[0] == "bench":
        arguments = build_parser().parse_args(words)
        for recipe in bench.chosen_recipes(arguments, Registry(), "cpu").values():
            build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)
        return 0
    return main([*words, *(["--dry-run"] if words[0] == "ablate" else [])])


def words_of(command: str) -> list[str]:
    """The arguments of ``lswt`` in a command that starts with lswt, python -m or torchrun."""
    words = shlex.split(command)
    if words[0] == "lswt":
        return words[1:]
    module = words.index("-m") + 1
    return (["run"] if words[module] == "lswt_core.run" else []) + words[module + 1 :]


# ---------- README and guide

NOT_OURS = ("python -m pip ", "lm_eval ", "python -m pytest")
# what they work on is not here; other tests run them
WITHOUT = ("generate", "evaluate", "export", "import", "plugins new", "plugins check", "tokenize")
SHOWN = [command for command in commands(PAGES) if not command.startswith(NOT_OURS)]


@pytest.mark.parametrize("command", [command for command in SHOWN if "fading" not in command])
def test_a_command_of_a_page_does_what_it_is_shown_for(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(command)
    if " ".join(words).startswith(WITHOUT):
        assert build_parser().parse_args(words).function
    else:
        assert called(command) == 0, capsys.readouterr().err


CLAIMS = [
    command
    for command in dict.fromkeys(commands((ROOT / ".github" / "claims.md").read_text()))
    if "lswt_core ablate " in command and "warm_start=none" not in command.partition("--swap")[2]
]  # without an accelerator the overlay of tiny has no warm start


@pytest.mark.slow
@pytest.mark.parametrize("command", CLAIMS)
def test_a_study_of_a_claim_can_be_made(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(command) == 0, capsys.readouterr().err


# ---------- new plugins


@pytest.fixture
def installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], list[str]]:
    """Write a package of a kind and install it; returns the commands that were printed."""

    def install(name: str, kind: str) -> list[str]:
        assert main(["plugins", "new", name, "--kind", kind, "--in", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        folder, module = tmp_path / f"lswt-{name}", f"lswt_{name.replace('-', '_')}"
        facts = folder / f"{module}-0.1.0.dist-info"
        facts.mkdir()
        facts.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: lswt-{name}\nVersion: 0.1.0\n"
        )
        facts.joinpath("entry_points.txt").write_text(f"[lswt]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(folder)
        return [
            line.strip()
            for line in printed.partition("or, without")[0].splitlines()
            if line.startswith("  python")
        ]

    return install


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_new_plugin_prints_works(
    kind: str, installed: Callable[[str, str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    install, check, *uses = installed(f"my-{kind.replace('_', '-')}", kind)
    # asked of every example elsewhere
    assert install.startswith("python -m pip install -e ") and " plugins check lswt_my_" in check
    assert [command.split()[2:4] for command in uses][:1] == [
        ["lswt_core.run", "recipes/quickstart.toml"]
    ]
    for command in uses:
        assert called(command) == 0, capsys.readouterr().err


def test_the_plugin_in_five_minutes_is_certified(
    installed: Callable[[str, str], list[str]],
) -> None:
    printed = installed("fading", "positional")
    shown = [command for command in SHOWN if "fading" in command and "plugins new" not in command]
    assert shown == printed[1:]


# ---------- shipped arms


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "random-start.toml"])
def test_a_shipped_arm_is_certified(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = ROOT / "recipes" / BASELINES.get(name, "quickstart.toml")
    command = f"python -m lswt_core ablate {baseline} --arm {ROOT / 'recipes' / 'ablations' / name}"
    assert called(f"{command}{' --allow data' if name in OTHER_TEXT else ''}") == 0, (
        capsys.readouterr().err
    )
