"""Components of others are checked before something is trained with them: once for each content,
quickly, and with the options of the recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_recipe

from lswt_core.__main__ import main
from lswt_core.conformance.before_run import LEFT_OUT, check_components
from lswt_core.conformance.check import RULES
from lswt_core.conformance.subject import MODEL_KINDS
from lswt_core.errors import PluginError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

KERPLE = Path(__file__).parent / "third_party" / "lswt-kerple" / "lswt_kerple" / "__init__.py"
LEAKY = '''
from torch import nn
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import FeedForward

class Leaky(FeedForward):
    """Looks ``ahead``, if asked to."""
    name = "leaky"
    def __init__(self, dims, *, ahead: bool = True) -> None:
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)
        self.ahead = ahead
    def forward(self, x):
        return self.fc(x.mean(1, keepdim=True) + x if self.ahead else x)

@hookimpl
def lswt_components():
    return [Leaky]
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a nano recipe, a plugin and a cache of its own."""
    write_recipe(tmp_path)
    tmp_path.joinpath("leaky.py").write_text(LEAKY)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chosen_of(place: Path, **options: Any) -> tuple[Any, Registry]:
    registry = Registry(files=[place / "leaky.py"])
    tables = {"train": {"steps": 1}, "ffn": {"use": "leaky", **options}}
    return Recipe.from_dict(tables, registry=registry).third_party(), registry


@pytest.mark.slow
def test_a_run_with_a_component_that_fails_does_not_start(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "nano.toml", "--plugin", "leaky.py", "ffn.use=leaky", "--out", "run"]
    words += ["train.steps=1"]
    assert main(words) == 3
    message = capsys.readouterr().err
    assert "[ffn] ffn/leaky of file" in message and "ffn/leaky: position-wise" in message
    assert "plugins check" in message and "--unchecked" in message
    assert not list(place.glob("run/metrics.jsonl")) and not list(place.glob("cache/checked/*"))
    assert main([*words, "--unchecked"]) == 0
    assert json.loads((place / "run/environment.json").read_text())["unchecked"] == ["ffn.leaky"]
    assert main([*words, "ffn.ahead=false", "--out", "other"]) == 0
    assert "checked ffn/leaky of file" in capsys.readouterr().out
    assert json.loads((place / "other/environment.json").read_text())["unchecked"] == []


@pytest.mark.slow
def test_an_ablation_checks_its_arms(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablate = ["ablate", "nano.toml", "--swap", "ffn=leaky", "--plugin", "leaky.py", "--seeds", "1"]
    assert main(ablate) == 3
    assert "position-wise" in capsys.readouterr().err and not place.joinpath("runs").exists()
    assert main([*ablate, "--dry-run", "--unchecked"]) == 0
    assert "--unchecked" in capsys.readouterr().out, "the command that comes next says so too"


def test_what_passed_is_checked_again_when_code_or_options_change(place: Path) -> None:
    lines: list[str] = []
    for _ in range(2):
        check_components(*chosen_of(place, ahead=False), lines.append)
    assert len(lines) == 1 and "quick checks" in lines[0]
    with pytest.raises(PluginError, match="position-wise"):
        check_components(*chosen_of(place), lines.append)
    text = LEAKY.replace('"""Looks', '"""Never looks').replace(
        "if self.ahead else x", "if 0 else x"
    )
    place.joinpath("leaky.py").write_text(text)
    check_components(*chosen_of(place), lines.append)
    assert len(lines) == 2
    place.joinpath("leaky.py").write_text(f"{LEAKY}# broken again")
    with pytest.raises(PluginError, match="position-wise"):
        check_components(*chosen_of(place), lines.append)


def test_checks_leave_the_generator_alone(place: Path) -> None:
    before = torch.get_rng_state()
    check_components(*chosen_of(place, ahead=False), lambda _: None)
    assert torch.get_rng_state().equal(before)


def test_a_component_inside_of_one_of_ours_is_checked(place: Path) -> None:
    registry = Registry(files=[place / "leaky.py"])
    inner = {"shared": {"use": "leaky"}, "routed": {"use": "gelu"}}
    tables = {"train": {"steps": 1}, "ffn": {"use": "shared-expert", **inner}}
    components = Recipe.from_dict(tables, registry=registry).third_party()
    assert [one.table for one in components] == ["ffn.shared"]
    with pytest.raises(PluginError, match=r"\[ffn.shared\] ffn/leaky"):
        check_components(components, registry, lambda _: None)


def test_a_strangers_package_passes(place: Path) -> None:
    registry = Registry(files=[KERPLE])
    tables = {"train": {"steps": 1}, "positional": {"use": "kerple"}}
    lines: list[str] = []
    recipe = Recipe.from_dict(tables, registry=registry)
    check_components(recipe.third_party(), registry, lines.append)
    assert len(lines) == 1


def test_our_own_components_are_not_checked() -> None:
    assert Recipe.from_dict({"train": {"steps": 1}}).third_party() == []


def test_what_is_left_out_exists_and_every_layer_is_checked() -> None:
    assert {rule.name for rule in RULES} >= LEFT_OUT
    for kind in (*MODEL_KINDS, "loss", "optimizer", "schedule", "parametrisation"):
        assert [rule for rule in RULES if kind in rule.kinds and rule.name not in LEFT_OUT]
