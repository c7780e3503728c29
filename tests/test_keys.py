"""Under what the runs of ablations are kept: whatever changes a run's numbers changes its key, and
nothing else does.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from nano import NANO

from lswt_core.ablation.runs.store import CacheKeys, Surroundings
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

RECIPE = (
    NANO + '[tokenizer]\nuse = "own-bytes"\n[ffn]\nuse = "own"\n[train]\nbatch_size = 2\nseq_len ='
    " 16\nsteps = 2\n"
)
METADATA = "site-packages/library-1.0.dist-info/METADATA"
FILES = {
    "plugin.py": (
        """
from pathlib import Path
import beside
from elsewhere.parents import Parent
from lswt_bytes import Bytes
from lswt_core.hooks import hookimpl
from lswt_eager import Eager

class Own(Parent):
    name = "own"

    def forward(self, x):
        import late
        return super().forward(x) * beside.SCALE

class Backend(Eager):
    name = "own-attention"

class OwnBytes(Bytes):
    name = "own-bytes"

    def fit(self, documents, fingerprint, cache):
        self.words = Path("words.txt").read_text()

    def fingerprint(self):
        return self.words

@hookimpl
def lswt_components():
    return [Own, Backend, OwnBytes]
"""
    ),
    "beside.py": "from further import SCALE\nimport library\n",
    "further.py": "SCALE = 1.0\n",
    "late.py": "",
    "unused.py": "",
    "words.txt": "a b",
    "site-packages/elsewhere/__init__.py": "",
    "site-packages/elsewhere/parents.py": (
        "from lswt_swiglu import SwiGlu\n\nclass Parent(SwiGlu):\n    name = 'parent'\n"
    ),
    "site-packages/library/__init__.py": "",
    METADATA: "Metadata-Version: 2.1\nName: library\nVersion: 1.0\n",
    "site-packages/library-1.0.dist-info/top_level.txt": "library\n",
    "site-packages/library-1.0.dist-info/RECORD": "library/__init__.py,sha256=abc,0\n",
}
MODULES = ("beside", "further", "late", "library", "elsewhere", "elsewhere.parents")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe, a text, word embeddings, and a plugin that imports from it and
    from what is installed.
    """
    for name, text in FILES.items():
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        # a module of its own
        tmp_path.joinpath(name).write_text(
            text + (f"# {tmp_path}\n" if name == "plugin.py" else "")
        )
    tmp_path.joinpath("corpus.txt").write_text("".join(random.Random(0).choices("abc ", k=500)))
    tmp_path.joinpath("nano.toml").write_text(RECIPE.format(corpus=tmp_path / "corpus.txt"))
    save(tmp_path, 0.0)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(place: Path, value: float) -> None:
    numpy.savez(place / "table.npz", table=numpy.full((320, 24), value, dtype=numpy.float32))


def key(place: Path, *overrides: str, backend: str = "blocked") -> str:
    registry = Registry(files=[place / "plugin.py"])
    recipe = Recipe.load(
        place / "nano.toml", ["embedding.warm_start=table.npz", *overrides], registry=registry
    )
    return CacheKeys(registry, Surroundings("cpu", 1)).of(recipe, [backend])


def append(name: str, text: str = "# edited\n") -> Callable[[Path], object]:
    return lambda place: place.joinpath(name).write_text((place / name).read_text() + text)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(append("plugin.py"), id="the plugin"),
        pytest.param(append("beside.py"), id="a module it imports"),
        pytest.param(append("further.py"), id="a module that this one imports"),
        pytest.param(append("late.py"), id="a module that is imported in a function"),
        pytest.param(
            append("site-packages/elsewhere/parents.py"), id="a parent class of another package"
        ),
        pytest.param(
            lambda place: place.joinpath(METADATA).write_text(
                FILES[METADATA].replace("1.0", "1.1")
            ),
            id="a version",
        ),
        pytest.param(
            append("site-packages/library-1.0.dist-info/RECORD", "library/a.py,sha256=d,1\n"),
            id="a build of one version",
        ),
        pytest.param(lambda place: save(place, 1.0), id="the word embeddings of a warm start"),
        pytest.param(
            lambda place: place.joinpath("corpus.txt").write_text("another text " * 40),
            id="the text",
        ),
        pytest.param(append("words.txt", " c"), id="a file of the tokenizer"),
    ],
)
def test_what_changes_a_run_changes_its_key(place: Path, change: Callable[[Path], object]) -> None:
    before = key(place)
    assert key(place) == before
    change(place)
    assert key(place) != before


def test_what_a_run_does_not_use_leaves_its_key(place: Path) -> None:
    before = key(place)
    append("unused.py")(place)
    # an installed library is told by its distribution
    append("site-packages/library/__init__.py")(place)
    assert key(place) == before


def test_the_kernel_behind_auto_is_part_of_the_key(place: Path) -> None:
    assert (
        Recipe.load(place / "nano.toml", registry=Registry(files=[place / "plugin.py"]))
        .one("attention")
        .name
        == "auto"
    )
    assert key(place) != key(place, backend="sdpa")
    own = key(place, backend="own-attention")
    append("plugin.py", "Backend.offset = 1\n")(place)
    assert key(place, backend="own-attention") != own
