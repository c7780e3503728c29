"""Recipes that come with an installed package: "lswt:small" of this one, "PACKAGE:NAME" of a
package with plugins that ships a folder ``recipes/``. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lswt_core import __version__
from lswt_core.registry import nearest
from lswt_core.registry.discover import installed, normal

OWN = "lswt"  # prefix of this package's recipes
SUFFIX = ".toml"
# two characters at least: "C:" is a drive
QUALIFIED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]+):(.*)", re.DOTALL)


class PackagedRecipe(NamedTuple):
    """A recipe file of an installed package."""

    package: str  # as a reference begins: "lswt", "lswt-kerple"
    name: str  # "small", "ablations/gelu"
    version: str  # of the package
    path: Path

    @property
    def qualified(self) -> str:
        """The reference that works from any folder: "lswt:ablations/gelu"."""
        return f"{self.package}:{self.name}"


class UnusableReference(Exception):
    """A recipe reference that leads to no file."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


def is_qualified(reference: str) -> bool:
    """Whether a reference reads PACKAGE:NAME."""
    return QUALIFIED.fullmatch(reference) is not None


def packaged_path(reference: str) -> Path:
    """The file of a reference "PACKAGE:NAME". Raises UnusableReference if there is none."""
    match = QUALIFIED.fullmatch(reference)
    assert match is not None, "asked only where is_qualified()"
    package, name = match[1], match[2].removesuffix(SUFFIX)
    recipes = own_recipes() if package == OWN else packaged_by(package)
    if name in recipes:
        return recipes[name].path
    if recipes:
        guess = nearest(name, recipes)
        fix = f'did you mean "{package}:{guess}"?' if guess else "see: python -m lswt_core recipes"
        raise UnusableReference(f'{package} has no recipe "{name}"', fix)
    packages = sorted({OWN, *(recipe.package for recipe in plugin_recipes())})
    why = f'no installed package with plugins is called "{package}" and ships recipes'
    raise UnusableReference(why, f"install it, or use one of: {', '.join(packages)}")


def own_recipes() -> dict[str, PackagedRecipe]:
    """The recipes of lswt-core by name. An installation has them in ``lswt_recipes`` beside
    ``lswt_core``, a checkout (also an editable installation) in ``recipes``.
    """
    beside = Path(__file__).parents[2]
    folders = [beside / "lswt_recipes", beside / "recipes"]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {recipe.name: recipe for recipe in recipes_in(folder, OWN, __version__)}


def packaged_by(package: str) -> dict[str, PackagedRecipe]:
    """The recipes of one package with plugins, by name."""
    recipes = [recipe for recipe in plugin_recipes() if normal(recipe.package) == normal(package)]
    return {recipe.name: recipe for recipe in recipes}


def plugin_recipes() -> list[PackagedRecipe]:
    """The recipes that installed packages with plugins ship; not those of lswt-core."""
    by_path: dict[Path, PackagedRecipe] = {}
    for entry in installed():
        for folder in recipe_folders(entry.module.partition(".")[0]):
            for recipe in recipes_in(folder, entry.distribution, entry.version):
                by_path.setdefault(recipe.path, recipe)
    return list(by_path.values())


def recipe_folders(package: str) -> list[Path]:
    """The folder ``recipes`` of a package, which is not imported; none of a single module."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # a broken plugin, which the registry reports
        return []
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) / "recipes" for place in places or ()]


def recipes_in(folder: Path, package: str, version: str) -> Iterator[PackagedRecipe]:
    """The recipe files below a folder, those of subfolders last."""
    paths = sorted(folder.rglob(f"*{SUFFIX}"), key=lambda path: (len(path.parts), path))
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield PackagedRecipe(package, name, version, path)
