"""Templates of the files around the component in a new plugin package, with placeholders such as
@NAME@.
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
"""The conformance checks of this plugin."""

import pytest

from lswt_core.conformance import checks


@pytest.mark.parametrize("check", checks("@MODULE@"), ids=str)
def test_conforms(check):
    check()
'''

README = """\
# @DISTRIBUTION@

The @KIND@ `@NAME@` for lswt-core: one class in `@MODULE@.py`. Its docstring says what it computes;
the keyword-only parameters of its constructor are its options; the docstring of the method to
change begins with "Change this". Its interface is `lswt_core.interfaces.@INTERFACE@`. If it
implements a paper, set `citation` to the paper's BibTeX. An option can be a component itself:
annotated `inner: FeedForward`, a recipe writes it as a table, `[ffn.inner]` with `use = "gelu"`
(see the top of `lswt_core/interfaces.py`).

```bash
# once; edits take effect without reinstalling
python -m pip install -e .
# options, capabilities, citation
python -m lswt_core plugins describe @KIND@/@NAME@
# the conformance checks; python -m pytest runs the same
python -m lswt_core plugins check @MODULE@
```

Train with it, in the directory that has `recipes/`:

```bash
@USE@
```

Without installation: `--plugin PATH/TO/@MODULE@.py`.
"""

RUN = "python -m lswt_core.run recipes/quickstart.toml @OVERRIDES@ --out runs/@NAME@"
ABLATE = "python -m lswt_core ablate recipes/quickstart.toml --swap @SWAP@ --seeds 5"


class Use(NamedTuple):
    """How a recipe uses a component: overrides, and the swap of an ablation if the losses of both
    arms are comparable.
    """

    overrides: str
    swap: str | None = None


USES: dict[str, Use] = {
    # replaces quickstart's KV cache: at most one memory has a length
    "memory": Use("memory.xl.use=@NAME@", "memory.xl=@NAME@"),
    "loss": Use("loss.@NAME@.weight=0.1", "loss.@NAME@.weight=0.1"),
    "data": Use("data.use=@NAME@"),
    "tokenizer": Use("tokenizer.use=@NAME@"),
    "tracker": Use("track.@NAME@.use=@NAME@"),
}
