"""What is installed: the core, one package for every folder of plugins/, and the folder recipes/ as
the package ``lswt_recipes``. Everything else is declared in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

CORE = find_namespace_packages(include=["lswt_core*"])
PLUGINS = find_namespace_packages("plugins", include=["lswt_*"])
FOLDERS = {name: f"plugins/{name}" for name in PLUGINS if "." not in name}

setup(
    packages=[*CORE, *PLUGINS, "lswt_recipes"],
    package_dir={**FOLDERS, "lswt_recipes": "recipes"},
    package_data={"*": ["py.typed"], "lswt_recipes": ["**/*.toml"]},
)
