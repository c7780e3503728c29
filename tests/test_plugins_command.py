"""``plugins list`` and ``plugins describe``: what they say of components, installed or not,
importable or not.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lswt_core.__main__ import main
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS

FILE = """
print("a plugin that talks")
from typing import Annotated
from annotated_types import Ge, Interval
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer, PositionalEncoding
{extra}
class Waves(PositionalEncoding):
    '''Up and down.

    And again.'''
    name = "waves"
    citation = "@misc{{waves, title={{Waves}}}}"
    has_bias = True
    def __init__(
        self, dims, *, height: Annotated[float, Interval(gt=0, le=2)],
        times: Annotated[int, Ge(1)] = 3, calm: bool = False
    ) -> None:
        super().__init__(dims)
    def embed(self, x, at):
        return x
    @property
    def length_dependent(self):
        return False

@hookimpl
def lswt_components():
    return [Waves]
"""


@pytest.fixture(params=["read", "imported"])
def plugin(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A single-file plugin, offering a literal list that can be read from its text, or one that
    cannot.
    """
    path = tmp_path / "waves.py"
    # files of one content are one module, which another test may have imported
    text = FILE.format(extra="") + f"# {tmp_path}\n"
    path.write_text(text if request.param == "read" else text.replace("[Waves]", "list((Waves,))"))
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One that reads well and cannot be imported."""
    path = tmp_path / "broken.py"
    path.write_text(
        FILE.replace('"waves"', '"sunken"').format(extra="import a_module_that_is_missing")
    )
    return path


def run_cli(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command prints on standard output."""
    assert main(["plugins", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_list_tells_of_every_component_and_whether_it_can_be_imported(
    plugin: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--plugin", plugin, "--plugin", broken]
    report = json.loads(run_cli(capsys, "list", *files, "--json"))
    listed = {(one["kind"], one["name"]): one for one in report["components"]}
    assert listed.keys() >= {(offer.kind, offer.name) for offer in Registry().offers()}
    assert {kind for kind, _ in listed} == {*KINDS}
    ours, rope = listed["positional", "waves"], listed["positional", "rope"]
    assert (ours["distribution"], ours["source"], ours["imports"], ours["cause"]) == (
        "file",
        str(plugin),
        True,
        None,
    )
    assert (rope["distribution"], rope["imports"]) == ("lswt-core", True)
    assert rope["version"]
    assert rope["source"].endswith("lswt_rope/rotary.py")
    sunken = listed["positional", "sunken"]
    assert sunken["imports"] is False
    assert "broken.py" in sunken["cause"]
    assert "a_module_that_is_missing" in sunken["cause"]

    lines = run_cli(capsys, "list", *files).splitlines()
    columns = [
        lines[0].index(title)
        for title in ("name", "distribution", "imports", "source", "what it is")
    ]
    rows = {
        tuple(line[: columns[1]].split()): [
            line[a:b].strip() for a, b in zip(columns[1:], [*columns[2:], None], strict=True)
        ]
        for line in lines
    }
    assert rows["positional", "waves"] == [
        f"file {ours['version']}",
        "yes",
        str(plugin),
        "Up and down.",
    ]
    assert rows["positional", "sunken"][1] == "no"
    assert "a_module_that_is_missing" in rows["positional", "sunken"][3]
    assert len(lines) == 1 + len(report["components"]) + len(report["broken"])


def test_a_plugin_that_cannot_even_be_read_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "torn.py"
    path.write_text("def broken(:")
    (torn,) = json.loads(run_cli(capsys, "list", "--plugin", path, "--json"))["broken"]
    assert (torn["entry"], torn["distribution"]) == ("torn", "file")
    assert "SyntaxError" in torn["cause"]
    assert any(
        line.split()[:3] == ["broken", "torn", "file"]
        for line in run_cli(capsys, "list", "--plugin", path).splitlines()
    )


def test_a_description_tells_options_with_bounds_and_capabilities(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(
        run_cli(capsys, "describe", "positional/waves", "--plugin", plugin, "--json")
    )
    assert (report["doc"], report["citation"], report["imports"]) == (
        "Up and down.\n\nAnd again.",
        "@misc{waves, title={Waves}}",
        True,
    )
    assert report["options"] == {
        "height": {
            "type": "float",
            "bounds": {"gt": 0, "le": 2},
            "means": "a number, greater than 0, at most 2",
            "default": None,
            "required": True,
        },
        "times": {
            "type": "int",
            "bounds": {"ge": 1},
            "means": "a whole number, at least 1",
            "default": 3,
            "required": False,
        },
        "calm": {
            "type": "bool",
            "bounds": {},
            "means": "true or false",
            "default": False,
            "required": False,
        },
    }
    assert report["capabilities"] == {
        "cacheable_keys": {"value": False, "of": "class"},
        "has_bias": {"value": True, "of": "class"},
        "length_dependent": {"value": None, "of": "instance"},
        "sinks_depend_on_segment_end": {"value": False, "of": "instance"},
        "overrides": {"value": ["embed"], "of": "class"},
    }
    text = run_cli(capsys, "describe", "positional/waves", "--plugin", plugin)
    for line in (
        "  height: a number, greater than 0, at most 2 (required)",
        "  calm: true or false (default false)",
        "  has_bias: true",
        "  overrides: embed",
        '  in a recipe: [positional] use = "waves"',
        "And again.",
        "@misc{waves, title={Waves}}",
    ):
        assert line in text.splitlines(), text


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("memory/xl-cache", {"length": {"value": 0, "of": "instance"}}),
        ("loss/simctg", {"needs": {"value": ["states"], "of": "class"}}),
        ("optimizer/sophia-h", {"needs_hessian_vector_products": {"value": True, "of": "class"}}),
        ("data/text", {"streaming": {"value": False, "of": "instance"}}),
        ("tokenizer/bytes", {"overrides": {"value": ["split_long_text", "save"], "of": "class"}}),
    ],
)
def test_capabilities_are_those_the_interface_declares(
    component: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    actual = json.loads(run_cli(capsys, "describe", component, "--json"))
    assert actual["capabilities"] | expected == actual["capabilities"]
    assert actual["many"] is KINDS[component.partition("/")[0]].many


CAPPED = '''
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import SoftCap
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention

class Capped(SoftmaxAttention):
    """Capped scores."""
    name, transforms_scores = "capped", SoftCap

@hookimpl
def lswt_components():
    return [Capped]
'''


def test_a_capability_that_is_a_class_has_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "capped.py"
    file.write_text(CAPPED)
    words = ("describe", "mixer/capped", "--plugin", file)
    assert "  transforms_scores: SoftCap" in run_cli(capsys, *words).replace('"', "").splitlines()
    report = json.loads(run_cli(capsys, *words, "--json"))
    assert report["capabilities"]["transforms_scores"]["value"] == "SoftCap"


def test_what_cannot_be_imported_is_described_all_the_same(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["describe", "positional/sunken", "--plugin", broken]
    report = json.loads(run_cli(capsys, *words, "--json"))
    assert report["imports"] is False
    assert report["capabilities"] is None
    assert report["options"]["times"]["default"] == 3
    text = run_cli(capsys, *words)
    assert "imports: no: " in text
    assert "a_module_that_is_missing" in text
    assert "capabilities" not in text


@pytest.mark.parametrize(
    ("component", "code", "fragments"),
    [
        ("rope", 2, ["KIND/NAME", "positional/rope"]),
        ("positionl/rope", 2, ['"positionl"', 'did you mean "positional"?']),
        ("positional/rpe", 3, ['did you mean "rope"?']),
    ],
)
def test_what_is_not_there_is_told(
    component: str, code: int, fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "describe", component]) == code
    output = capsys.readouterr().err
    assert all(fragment in output for fragment in fragments), output


LIBRARIES = """
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Norm

class There(Norm):
    name = "there"
    libraries = ("a_package_that_is_missing", "json")

class Missing(Norm):
    name = "missing"
    libraries = ("a_package_that_is_missing",)

@hookimpl
def lswt_components():
    return [There, Missing]
"""


def test_a_component_without_its_library_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "libraries.py"
    path.write_text(LIBRARIES)
    report = json.loads(run_cli(capsys, "list", "--plugin", path, "--json"))
    listed = {(one["kind"], one["name"]): one for one in report["components"]}
    assert listed["norm", "there"]["imports"] is True
    assert listed["norm", "missing"]["imports"] is False
    assert "a_package_that_is_missing" in listed["norm", "missing"]["cause"]
    for kind, name, library in (
        ("attention", "flash", "flash_attn"),
        ("cross_entropy", "liger", "liger_kernel"),
        ("tracker", "wandb", "wandb"),
    ):
        one = listed[kind, name]
        assert one["imports"] == (find_spec(library) is not None)
        assert one["imports"] or library in one["cause"]


def test_the_markdown_table_has_every_kind_and_marks_defaults(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, rule, *rows = run_cli(capsys, "list", "--markdown", "--plugin", plugin).splitlines()
    assert header.count("|") == rule.count("|") == 4
    table = {cells[1].strip(): cells for row in rows if (cells := row.split("|"))}
    assert list(table) == list(KINDS)
    assert table["memory"][2].strip() == "[memory.NAME]"
    names = {kind: cells[3].strip().split(", ") for kind, cells in table.items()}
    assert {"**rope**", "alibi", "waves"} <= set(names["positional"])
    assert "**auto**" in names["attention"]
    offered = {(offer.kind, offer.name) for offer in Registry().offers()}
    shown = {(kind, name.strip("*")) for kind in names for name in names[kind]}
    assert shown == offered | {("attention", "auto"), ("positional", "waves")}


def test_the_list_tells_what_each_component_is_in_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plugins", "list"]) == 0
    output = capsys.readouterr().out
    assert "Rotary position embedding, pairing dimension i with i + D/2." in output
    lines = [line[output.splitlines()[0].index("what it is") :] for line in output.splitlines()]
    assert all(len(line) <= 80 for line in lines)
