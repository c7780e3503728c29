"""The page of claims: what studies say, whether it can be made again, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_ablate import arm, study

from lswt_core.__main__ import main
from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.probe_runs import ProbedRuns
from lswt_core.ablation.report.publish import publish
from lswt_core.ablation.runs.outcome import ArmResult

CLAIMS = Path(__file__).parents[1] / ".github" / "claims.toml"
FILE = """title = "Tested"
source = "somebody"
[claim.part]
says = "The part helps."
ablate = "quickstart --swap part=false"
"""
WITHOUT = {
    "supported": [3.11, 3.2, 3.29],
    "contradicted": [2.89, 3.0, 3.11],
    "no difference": [3.0001, 3.1, 3.1999],
    "not resolved": [3.3, 3.0, 3.1],
}


def probed(result: ArmResult, values: list[float]) -> ArmResult:
    """An arm with a probe of every run."""
    pairs = zip(result.outcomes, values, strict=True)
    return replace(result, outcomes=[replace(one, probes={"gain": value}) for one, value in pairs])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file of claims."""
    tmp_path.joinpath("claims.toml").write_text(FILE)
    return tmp_path


def finding(place: Path, *arms: ArmResult) -> str:
    """What the page says of the claim, whose study has these arms."""
    directory = place / "reports" / "part"
    directory.mkdir(parents=True, exist_ok=True)
    publish(Comparison(study(*arms, margin=0.05)), directory)
    words = ["claims", str(place / "claims.toml"), "--reports", str(place / "reports")]
    assert main(words) == 0
    return summary(place)


def summary(place: Path) -> str:
    """The last cell of the claim's row."""
    page = (place / "claims.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| The part helps.")]
    return row.strip("| ").split(" | ")[-1]


@pytest.mark.parametrize("expected", WITHOUT)
def test_an_arm_without_the_part_that_is_worse_speaks_for_it(place: Path, expected: str) -> None:
    arms = arm("baseline", [3.0, 3.1, 3.2]), arm("part=false", [*WITHOUT[expected]])
    assert finding(place, *arms) == expected
    place.joinpath("claims.toml").write_text(FILE + "replaces = false\n")
    turned = {"supported": "contradicted", "contradicted": "supported"}
    assert finding(place, *arms) == turned.get(expected, expected)
    shutil.rmtree(place / "reports")
    assert main(["claims", str(place / "claims.toml")]) == 0, "from what was kept"
    assert summary(place) == turned.get(expected, expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.51, 1.6, 1.69], "supported"),
        ([0.51, 0.6, 0.69], "contradicted"),
        ([1.5, 0.6, 1.0], "not resolved"),
    ],
)
def test_a_claim_about_a_measure_is_judged_by_it(
    place: Path, values: list[float], expected: str
) -> None:
    place.joinpath("claims.toml").write_text(FILE + 'measure = "gain"\n')
    baseline = probed(arm("baseline", [3.0, 3.1, 3.2]), [1.0, 1.1, 1.2])
    other = probed(arm("part=false", [*WITHOUT["contradicted"]]), values)
    assert finding(place, baseline, other) == expected
    assert "| gain |" in (place / "claims.md").read_text()
    turned = {"supported": "contradicted", "contradicted": "supported"}
    place.joinpath("claims.toml").write_text(f'{FILE}measure = "gain"\nhigher_is_better = true\n')
    assert finding(place, baseline, other) == turned.get(expected, expected)
    assert "| gain (higher is better) |" in (place / "claims.md").read_text()


SEEN_AND_FRESH = [4.0, 4.1, 4.2, 2.9, 2.89, 2.91]  # of an arm whose baseline is 3.0


def judged_from(place: Path, first: int, measure: str) -> str:
    """The finding of a claim that seeds from ``first`` on judge."""
    claim = f'measure = "{measure}"\nseeds_from = {first}\n'
    place.joinpath("claims.toml").write_text(FILE + claim)
    values = {"baseline": [3.0] * len(SEEN_AND_FRESH), "part=false": SEEN_AND_FRESH}
    if measure == "loss":
        return finding(place, *(arm(name, losses) for name, losses in values.items()))
    alike = values["baseline"]
    return finding(place, *(probed(arm(name, alike), gains) for name, gains in values.items()))


@pytest.mark.parametrize("measure", ["loss", "gain"])
def test_seeds_that_were_made_after_a_measure_was_chosen_judge_alone(
    place: Path, measure: str
) -> None:
    assert judged_from(place, 0, measure) == "not resolved"
    assert judged_from(place, 3, measure) == "contradicted"
    page = place.joinpath("claims.md").read_text()
    assert "| -0.1000 | -0.1248 .. -0.0752 |  | 3 (3 to 5) | contradicted |" in page


def test_a_claim_is_judged_by_two_seeds_at_least(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        judged_from(place, 5, "loss")
    assert "[claim.part] seeds_from = 5: its study has 6 pairs" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        judged_from(place, -1, "loss")
    assert "claims.toml:7" in capsys.readouterr().err


def test_a_claim_is_about_one_arm_of_its_study(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"one": "supported", "two": "contradicted"}
    arms = [arm("baseline", [3.0, 3.1, 3.2])]
    arms += [arm(name, [*WITHOUT[expected]]) for name, expected in found.items()]
    with pytest.raises(AssertionError):
        finding(place, *arms)
    assert "one, two" in capsys.readouterr().err
    for (name, expected), other in zip(found.items(), ("two", "one"), strict=True):
        place.joinpath("claims.toml").write_text(f'{FILE}arm = "{name}"\nstudy = "part"\n')
        assert finding(place, *arms) == expected
        page = place.joinpath("claims.md").read_text()
        assert f"| {name} |" in page and f"| {other} |" not in page


def test_a_claim_without_a_study_is_not_tested(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", str(place / "claims.toml")]) == 0
    assert summary(place) == "not tested"
    assert "ablate quickstart --swap part=false" in capsys.readouterr().out


def test_the_projects_page_is_what_its_studies_say(tmp_path: Path) -> None:
    shutil.copy(CLAIMS, tmp_path)
    shutil.copytree(CLAIMS.with_suffix(""), tmp_path / "claims")
    assert main(["claims", str(tmp_path / "claims.toml")]) == 0
    made = (tmp_path / "claims.md").read_text().replace(f"{tmp_path}/", ".github/")
    assert made == CLAIMS.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("say = 1\n", "claims.toml:6"),
        ("higher_is_better = true\n", "a lower loss is better"),
        ('probe = ["remembering"]\n', "no such probe"),
    ],
)
def test_what_is_no_claim_is_refused(
    place: Path, more: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place.joinpath("claims.toml").write_text(FILE + more)
    assert main(["claims", str(place / "claims.toml")]) == 2
    assert why in capsys.readouterr().err


def test_an_unfinished_study_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = place / "reports" / "part"
    directory.mkdir(parents=True)
    report = {"unfinished": {"baseline": [1]}, "command": "ablate again"}
    directory.joinpath("report.json").write_text(json.dumps(report))
    words = ["claims", str(place / "claims.toml"), "--reports", str(place / "reports")]
    assert main(words) == 2
    assert "ablate again" in capsys.readouterr().err


def test_models_of_a_finished_study_are_probed_where_they_still_are(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.joinpath("claims.toml").write_text(FILE + 'measure = "gain"\nprobe = ["memory"]\n')
    gains = {"baseline": 1.0, "part=false": 2.0}
    asked: list[str] = []

    def measured_of(_: ProbedRuns, directory: Path, what: str) -> dict[str, dict[str, float]]:
        asked.append(what)
        name, _, seed = what.partition(", seed ")
        return {"memory": {"gain": gains[name] + 0.1 * int(seed) ** 2}}

    monkeypatch.setattr(ProbedRuns, "measured_of", measured_of)
    arms = [arm("baseline", [3.0, 3.1, 3.2, 3.3]), arm("part=false", [3.0, None, 3.2, 3.3])]
    assert finding(place, *arms) == "not resolved", "their runs are nowhere"
    assert not asked
    stored = {seed: ("key", str(place)) for seed in range(4)}
    assert finding(place, *(replace(one, stored=stored) for one in arms)) == "supported"
    assert len(asked) == 7 and "part=false, seed 1" not in asked
