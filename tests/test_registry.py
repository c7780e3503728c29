"""Finding plugins: what is installed, what each offers, and what is said about the ones that are
broken or clash.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lswt_core.errors import PluginError
from lswt_core.registry import REQUIRED, NotOffered, Registry

HEAD = "from lswt_core.hooks import hookimpl\nfrom lswt_core.interfaces import FeedForward\n"
HOOK = "\n@hookimpl\ndef lswt_components():\n    return [Zebra]\n"
ZEBRA = """
class Zebra(FeedForward):
    '''Striped.'''
    name = "zebra"
    def __init__(self, dims, *, stripes: int = 3) -> None:
        super().__init__(dims)
    def forward(self, x):
        return x
"""
PLUGIN = HEAD + ZEBRA + HOOK


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that a distribution with some entry points and modules is installed."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def installed(name: str, points: str | dict[str, str], **modules: str) -> None:
        lines = (
            points
            if isinstance(points, str)
            else "".join(f"{key} = {value}\n" for key, value in points.items())
        )
        folder = site / f"{name.replace('-', '_')}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text(f"[lswt]\n{lines}")
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)

    return installed


@pytest.fixture
def single(tmp_path: Path) -> Any:
    """A registry of one single-file plugin."""

    def made(text: str) -> Registry:
        path = tmp_path / "plugin.py"
        path.write_text(text)
        return Registry([], files=[path])

    return made


def test_an_installed_plugin_is_found_read_and_loaded(install: Any) -> None:
    install("acme-zebra", {"zebra": "acme_zebra_a"}, acme_zebra_a=PLUGIN)
    registry = Registry()
    offer = registry.find("ffn", "zebra")
    assert "acme_zebra_a" not in sys.modules
    assert (
        offer
        == registry.find("ffn", "acme-zebra:zebra")
        == registry.find("ffn", "Acme_Zebra:zebra")
    )
    assert (offer.distribution, offer.version, offer.module, offer.qualified) == (
        "acme-zebra",
        "1.2",
        "acme_zebra_a",
        "acme-zebra:zebra",
    )
    assert (offer.doc, Path(offer.source).name, offer.options) == (
        "Striped.",
        "acme_zebra_a.py",
        (("stripes", int, 3),),
    )
    component = registry.load(offer)
    assert component is sys.modules["acme_zebra_a"].Zebra
    assert registry.schema(offer)(stripes=4).model_dump() == {"stripes": 4}


def test_a_broken_plugin_hurts_nobody_who_does_not_name_it(install: Any, tmp_path: Path) -> None:
    install("acme-zebra", {"zebra": "acme_zebra_b"}, acme_zebra_b=PLUGIN)
    install("acme-broken", {"gnu": "acme_gnu"}, acme_gnu="import a_module_that_is_missing\n")
    install("acme-lines", "no equals sign\n")
    install("acme-bytes", {})
    (tmp_path / "site" / "acme_bytes-1.2.dist-info" / "entry_points.txt").write_bytes(b"\xff")
    install("acme-lost", {"lost": "acme_lost_module", "odd": "a b c"})
    registry = Registry()
    assert registry.load(registry.find("ffn", "zebra")).name == "zebra"
    with pytest.raises(NotOffered) as caught:
        registry.find("ffn", "gnu")
    for fragment in (
        "acme-broken 1.2 (gnu)",
        "a_module_that_is_missing",
        "offered:",
        "zebra",
        "plugins list",
    ):
        assert fragment in str(caught.value)
    assert {"acme-broken", "acme-lines", "acme-bytes", "acme-lost"} <= {
        broken.distribution for broken in registry.broken()
    }
    assert "zebra" in {offer.name for offer in registry.offers()}


def test_a_plugin_that_reads_well_but_cannot_be_imported_fails_when_loaded(install: Any) -> None:
    install("acme-zebra", {"zebra": "acme_zebra_c"}, acme_zebra_c=f"{PLUGIN}\nraise KeyError('x')")
    registry = Registry()
    with pytest.raises(PluginError, match=r"acme-zebra 1\.2 \(acme_zebra_c\).*KeyError: 'x'"):
        registry.load(registry.find("ffn", "zebra"))


@pytest.mark.parametrize(
    "points",
    [
        ({"zebra": "acme_one"}, {"zebra": "acme_two"}),
        ({"zebra": "acme_one"}, {"horses": "acme_two"}),
    ],
)
def test_a_clash_names_both_and_can_be_settled(points: Any, install: Any) -> None:
    install("acme-one", points[0], acme_one=PLUGIN)
    install("acme-two", points[1], acme_two=PLUGIN)
    registry = Registry()
    with pytest.raises(PluginError) as caught:
        registry.find("ffn", "zebra")
    for fragment in ("acme-one 1.2", "acme-two 1.2", "acme_one.py", 'use = "acme-'):
        assert fragment in str(caught.value)
    assert registry.find("ffn", "acme-two:zebra").module == "acme_two"
    assert registry.load(registry.find("ffn", "acme-two:zebra")).__module__ == "acme_two"


def test_a_broken_namesake_is_a_clash(install: Any) -> None:
    install("acme-one", {"zebra": "acme_three"}, acme_three=PLUGIN)
    install("acme-two", {"zebra": "acme_four"}, acme_four="import a_module_that_is_missing\n")
    with pytest.raises(PluginError, match=r"acme-one.*acme-two 1.2 \(broken"):
        Registry().find("ffn", "zebra")
    assert Registry().find("ffn", "acme-one:zebra").module == "acme_three"


def test_a_module_listed_twice_counts_once(install: Any) -> None:
    install("acme-one", {"zebra": "acme_five", "stripes": "acme_five"}, acme_five=PLUGIN)
    assert Registry().find("ffn", "zebra").module == "acme_five"


def test_components_are_found_behind_other_names_and_in_packages(
    install: Any, tmp_path: Path
) -> None:
    package = tmp_path / "site" / "acme_package"
    package.mkdir()
    (package / "layers.py").write_text(HEAD + ZEBRA)
    (package / "__init__.py").write_text(
        "from lswt_core.hooks import hookimpl\nfrom .layers import Zebra\n" + HOOK
    )
    install("acme-package", {"animals": "acme_package"})
    registry = Registry()
    assert Path(registry.find("ffn", "zebra").source) == package / "layers.py"
    assert not any(name.startswith("acme_package") for name in sys.modules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEAD + ZEBRA + HOOK.replace("components", "componets"),
            "there is no hook 'lswt_componets'; the nearest is 'lswt_components'",
        ),
        (HEAD + ZEBRA, "it has no hook; define a function lswt_components"),
        (HEAD + ZEBRA + HOOK.replace("()", "(animal)"), "must take no arguments"),
        (HEAD + ZEBRA + HOOK.replace("[Zebra]", "3"), "must return a list of classes, not 3"),
        (HEAD + ZEBRA + HOOK.replace("[Zebra]", "[3]"), "must return a list of classes"),
        (HEAD + ZEBRA + HOOK.replace("[Zebra]", "[int]"), "int must derive from exactly one"),
        (
            HEAD + ZEBRA + HOOK.replace("return [Zebra]", "raise KeyError('x')"),
            "raised KeyError: 'x'",
        ),
        (
            HEAD + ZEBRA + HOOK.replace("return [Zebra]", "raise SystemExit(3)"),
            "raised SystemExit: 3",
        ),
        (PLUGIN.replace("[Zebra]", "[Zebra, Zebra]"), "offers ffn 'zebra' twice"),
        (PLUGIN.replace('name = "zebra"', ""), "needs a class attribute 'name'"),
        (PLUGIN.replace('"zebra"', '"ze:bra"'), "needs a class attribute 'name'"),
        (PLUGIN.replace("stripes: int", "use: int"), "reserved"),
        (PLUGIN.replace("stripes: int", "stripes"), "'stripes' has no annotation"),
        (PLUGIN.replace("stripes: int", "stripes: 'Unknown'"), "NameError"),
        ("import os\nos._exit_is_not_here", "cannot be imported: AttributeError"),
        ("def broken(:", "cannot be imported: SyntaxError"),
    ],
)
def test_broken_plugins_are_told_what_is_wrong(text: str, message: str, single: Any) -> None:
    registry = single(text)
    assert registry.offers() == []
    (broken,) = registry.broken()
    assert broken.distribution == "file" and broken.entry == "plugin" and len(broken.version) == 12
    assert message in broken.cause and "plugin.py" in broken.cause


@pytest.mark.parametrize(
    "text",
    [
        PLUGIN.replace('name = "zebra"', 'name = "ze" + "bra"'),
        PLUGIN.replace("[Zebra]", "list((Zebra,))"),
        PLUGIN.replace("stripes: int = 3", "stripes: int = 1 + 2"),
        PLUGIN.replace("class Zebra(", "class Horse(FeedForward):\n    pass\nclass Zebra(Horse, "),
        HEAD + f"if True:\n{ZEBRA.replace(chr(10), chr(10) + '    ')}" + HOOK,
        HEAD + ZEBRA + "Zebra = Zebra\n" + HOOK,
    ],
)
def test_what_the_text_does_not_tell_is_learned_by_importing(text: str, single: Any) -> None:
    (offer,) = single(text).offers()
    assert (offer.kind, offer.name, offer.options, offer.doc) == (
        "ffn",
        "zebra",
        (("stripes", int, 3),),
        "Striped.",
    )


def test_every_shape_of_option_reads_alike_from_text_and_from_the_class(tmp_path: Path) -> None:
    options = """
        self, dims, *, a: int, b: float = 1_000.0, c: bool = True, d: str = "x",
        e: list[str] | None = None, f: Size = -1, g: Literal["p", "q"] = "p",
        h: Annotated[float, Ge(0), Lt(1)] = DEFAULT, i: Optional[int] = None,
        j: typing.Annotated[int, at.Interval(ge=1, le=3)] = 2, k: list[list[int]] = [[1]],
        l: dict[str, float] = {"x": 1.5}, m: Union[int, str] = "x",
        n: Annotated[list[str], at.MinLen(1)] = ["y"], o: Literal["only"] = "only"
    """
    head = "import typing\nfrom typing import Annotated, Literal, Optional, Union\n"
    head += "import annotated_types as at\nfrom annotated_types import Ge, Lt\n"
    head += "Size: typing.TypeAlias = Annotated[int, Ge(-2)]\nDEFAULT = 0.5\nCITATION = 'Someone'\n"
    body = ZEBRA.replace("self, dims, *, stripes: int = 3", options).replace(
        "name =", "citation = CITATION\n    name ="
    )
    path = tmp_path / "many_options.py"
    path.write_text("from __future__ import annotations\n" + HEAD + head + body + HOOK)
    registry = Registry([], files=[path])
    (static,) = registry.offers()
    component = registry.load(static)
    (live,) = Registry([sys.modules[component.__module__]]).offers()
    assert live._replace(distribution="file", version=static.version) == static
    assert static.options[0].default is REQUIRED
    assert static.options[7].default == 0.5
    assert static.citation == "Someone"
    registry.schema(static).model_validate({"a": 1, "j": 3, "e": ["x"], "m": 4})


def test_modules_and_other_registries(single: Any) -> None:
    registry = single(PLUGIN)
    (offer,) = registry.offers()
    component = registry.load(offer)
    modules = Registry([sys.modules[component.__module__]])
    assert modules.load(modules.find("ffn", "zebra")) is component
    with pytest.raises(PluginError, match="zebra"):
        modules.load(offer)
    with pytest.raises(PluginError, match=r"nowhere\.py"):
        Registry([], files=[Path("nowhere.py")])


def test_load_checks_the_name(single: Any) -> None:
    registry = single(f"{PLUGIN}\nZebra.name = 'horse'")
    with pytest.raises(PluginError, match="zebra"):
        registry.load(registry.find("ffn", "zebra"))


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("zebr", ['did you mean "zebra"?']),
        ("other:zebra", ['"other:zebra"']),
        ("nothing-like-it", ["offered: zebra", "plugins list"]),
    ],
)
def test_not_offered(name: str, fragments: list[str], single: Any) -> None:
    with pytest.raises(NotOffered) as caught:
        single(PLUGIN).find("ffn", name)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_a_schema_that_cannot_be_built_names_the_component(single: Any) -> None:
    registry = single(PLUGIN.replace("stripes: int = 3", "stripes: list[FeedForward]"))
    with pytest.raises(
        PluginError,
        match=r"'zebra' \(file .*plugin\.py\)",
    ):
        registry.schema(registry.find("ffn", "zebra"))


def test_first_party_plugins_read_alike_from_text_and_from_the_class(tmp_path: Path) -> None:
    folders = sorted(
        path.parent for path in (Path(__file__).parents[1] / "plugins").glob("lswt_*/__init__.py")
    )
    assert folders
    site = tmp_path / "first_party-1.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: first-party\nVersion: 1\n")
    (site / "entry_points.txt").write_text(
        "[lswt]\n" + "".join(f"{folder.name} = {folder.name}\n" for folder in folders)
    )
    code = f"""
import importlib, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(folders[0].parent)!r}, {str(folders[0].parents[1])!r}]
from lswt_core.registry import Registry
registry = Registry()
static = [offer for offer in registry.offers() if offer.distribution == "first-party"]
assert "torch" not in sys.modules, "a plugin had to be imported"
assert not [broken for broken in registry.broken() if broken.distribution == "first-party"]
for offer in static:
    registry.schema(offer)
modules = [importlib.import_module(name) for name in {[folder.name for folder in folders]!r}]
live = Registry(modules)
assert not live.broken(), live.broken()
same = [offer._replace(distribution="first-party", version="1") for offer in live.offers()]
assert same == static, (same, static)
print(len(static))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) >= len(folders), done.stderr


def test_a_class_can_be_asked_for_by_name() -> None:
    optimizer = Registry().get("optimizer", "sophia-g")
    assert issubclass(optimizer, torch.optim.Optimizer) and optimizer.name == "sophia-g"  # type: ignore[attr-defined]
    with pytest.raises(NotOffered, match='"sophia-g"'):
        Registry().get("optimizer", "sofia-g")
