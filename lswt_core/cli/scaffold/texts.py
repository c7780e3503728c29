"""What stands beside the code in a new plugin package: how it is packaged, told and tested. @NAME@
and the like are filled in.
"""

from __future__ import annotations

from typing import NamedTuple

PYPROJECT = """\
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "@DISTRIBUTION@"
version = "0.1.0"
dependencies = ["lswt-core"]

[project.entry-points.lswt]
@NAME@ = "@MODULE@"

[tool.setuptools]
py-modules = ["@MODULE@"]
"""

TEST = '''\
"""What every plugin promises, checked for this one."""

import pytest

from lswt_core.conformance import checks


@pytest.mark.parametrize("check", checks("@MODULE@"), ids=str)
def test_conforms(check):
    check()
'''

README = """\
# @DISTRIBUTION@

The @KIND@ `@NAME@` for lswt-core: one class in `@MODULE@.py`. Its docstring says what it computes, the keyword-only parameters of its
constructor are its options, and the docstring of the method to change says so. What it may rely on is in its interface,
`lswt_core.interfaces.@INTERFACE@`. Once it implements a paper, `citation` is that paper's BibTeX.

```bash
# once; edits need no further installation
python -m pip install -e .
# what others see: options, capabilities, citation
python -m lswt_core plugins describe @KIND@/@NAME@
# does it keep what its interface promises? python -m pytest asks the same
python -m lswt_core plugins check @MODULE@
```

Where recipes are, try it:

```bash
@USE@
```

Without an installation, recipes know it by `--plugin PATH/TO/@MODULE@.py`.
"""

RUN = "python -m lswt_core.run recipes/quickstart.toml @OVERRIDES@ --out runs/@NAME@"
ABLATE = "python -m lswt_core ablate recipes/quickstart.toml --swap @SWAP@ --seeds 5"


class Use(NamedTuple):
    """How a recipe takes a component up: overrides, and the swap of an ablation where losses of
    both arms compare.
    """

    overrides: str
    swap: str | None = None


USES: dict[str, Use] = {
    # in the place of quickstart's cache: two would remember the same twice
    "memory": Use("memory.xl.use=@NAME@", "memory.xl=@NAME@"),
    "loss": Use("loss.@NAME@.weight=0.1", "loss.@NAME@.weight=0.1"),
    "data": Use("data.use=@NAME@"),
    "tokenizer": Use("tokenizer.use=@NAME@"),
    "tracker": Use("track.@NAME@.use=@NAME@"),
}
