"""What is installed: the wheel holds every plugin and recipe, and a stranger's package works beside
it without a change here, from an empty folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import tomli
from helpers import PLUGINS, ROOT

KERPLE = Path(__file__).parent / "third_party" / "lswt-kerple"
OWN_PARTS = (
    *("lswt_core", "plugins", "recipes"),
    *("pyproject.toml", "README.md", "LICENSE"),
)
SMALL = [  # quickstart, made to take seconds
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_layers=1",
    "embedding.d_vocab=8",
    "tokenizer.use=bytes",
    "memory.xl.length=16",
    "schedule.warmup_steps=1",
    "train.batch_size=2",
    "train.seq_len=16",
    "train.steps=3",
    "evaluate.tokens=64",
    "evaluate.batch_size=2",
    "sample.tokens=4",
]


def declared() -> dict[str, str]:
    """The entry points that pyproject.toml lists."""
    return tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "entry-points"
    ]["lswt"]


def test_every_plugin_folder_has_an_entry_point_and_every_entry_point_a_folder() -> None:
    assert sorted(declared().values()) == PLUGINS


def test_every_package_is_installed() -> None:
    """pyproject.toml lists packages one by one: setuptools cannot find some and rename one."""
    settings = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    core = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lswt_core").rglob("*.py")
    }
    tool = settings["tool"]["setuptools"]
    assert set(tool["packages"]) == core | set(PLUGINS) | {"lswt_recipes"}
    folders = {name: f"plugins/{name}" for name in PLUGINS} | {"lswt_recipes": "recipes"}
    assert tool["package-dir"] == folders


def call(*command: str | Path, where: Path) -> str:
    """Run a command away from the checkout; its output, or what went wrong."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "LSWT_", "PIP_"))
    }
    environment |= {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "LSWT_CACHE_DIR": str(where / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (
        f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels of this repository and of the stranger's package, built from copies so that the
    checkout stays clean.
    """
    built, directory = {}, tmp_path_factory.mktemp("wheels")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name, source, parts in (
        ("lswt-core", ROOT, OWN_PARTS),
        ("lswt-kerple", KERPLE, ("lswt_kerple", "pyproject.toml", "README.md")),
    ):
        copy = directory / name
        copy.mkdir()
        for part in parts:
            if (source / part).is_dir():
                shutil.copytree(source / part, copy / part, ignore=ignored)
            else:
                shutil.copy(source / part, copy / part)
        call(
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            directory / "dist",
            copy,
            where=directory,
        )
        (built[name],) = (directory / "dist").glob(f"{name.replace('-', '_')}-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment where both wheels are installed; it finds their
    dependencies where they are now.
    """
    directory = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", directory, where=directory)
    interpreter = directory / "bin" / "python"
    install = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        interpreter,
        "install",
        "--no-deps",
        "--no-index",
    )
    call(*install, *wheels.values(), where=directory)
    site = call(
        interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", where=directory
    ).strip()
    # more than one, if this environment sees another's packages
    here = [path for path in sys.path if path.endswith("site-packages")]
    # only now: pip must not take them for its own
    (Path(site) / "dependencies.pth").write_text("\n".join(here) + "\n")
    return interpreter


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_every_plugin_and_recipe(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["lswt-core"]) as wheel:
        files = set(wheel.namelist())
        (points,) = (name for name in files if name.endswith("entry_points.txt"))
        parser = ConfigParser()
        parser.read_string(wheel.read(points).decode())
    assert dict(parser["lswt"]) == declared()
    sources = [*(ROOT / "lswt_core").rglob("*.py"), ROOT / "lswt_core" / "py.typed"]
    expected = {str(path.relative_to(ROOT)) for path in sources}
    expected |= {
        str(path.relative_to(ROOT / "plugins"))
        for name in PLUGINS
        for path in (ROOT / "plugins" / name).rglob("*.py")
    }
    recipes = ROOT / "recipes"
    expected |= {f"lswt_recipes/{path.relative_to(recipes)}" for path in recipes.rglob("*.toml")}
    assert expected <= files
    assert not [name for name in files if name.startswith(("tests", "recipes", "plugins"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_strangers_component_is_found_and_trains(python: Path, tmp_path: Path) -> None:
    listed = json.loads(
        call(python, "-m", "lswt_core", "plugins", "list", "--json", where=tmp_path)
    )
    assert not listed["broken"]
    offers = {(offer["kind"], offer["name"]): offer for offer in listed["components"]}
    assert offers["positional", "kerple"]["distribution"] == "lswt-kerple"
    # not the checkout's
    assert all(Path(offer["source"]).is_relative_to(python.parents[1]) for offer in offers.values())

    assert [recipe["name"] for recipe in listed["recipes"]] == ["lswt-kerple:nano"]
    (tmp_path / "mine.toml").write_text('extends = "lswt-kerple:nano"\n')
    words = ["mine.toml", "--out", tmp_path / "run", *SMALL]
    call(python, "-m", "lswt_core.run", *words, where=tmp_path)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and losses[2] < losses[0]
    resolved = tomli.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert resolved["positional"]["use"] == "kerple" and "base" not in resolved["positional"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_package_is_installed_by_pip_and_trains(python: Path, tmp_path: Path) -> None:
    call(
        python,
        "-m",
        "lswt_core",
        "plugins",
        "new",
        "fading",
        "--kind",
        "positional",
        where=tmp_path,
    )
    install = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    )
    call(*install, "-e", "lswt-fading", where=tmp_path)
    report = json.loads(
        call(
            python,
            "-m",
            "lswt_core",
            "plugins",
            "describe",
            "positional/fading",
            "--json",
            where=tmp_path,
        )
    )
    assert (report["distribution"], report["version"], report["imports"]) == (
        "lswt-fading",
        "0.1.0",
        True,
    )
    assert Path(report["source"]) == tmp_path / "lswt-fading" / "lswt_fading.py"
    words = ["recipes/quickstart.toml", "positional.use=fading", *SMALL, "--out", tmp_path / "run"]
    output = call(python, "-m", "lswt_core.run", *words, where=tmp_path)
    assert str(Path("lswt_recipes") / "quickstart.toml") in output
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len([line for line in lines if "loss" in line]) == 3
    again = subprocess.run(
        [str(python), "-m", "lswt_core", "plugins", "new", "fading", "--kind", "positional"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2
    assert "lswt-fading 0.1.0" in again.stderr
