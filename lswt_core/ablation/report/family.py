"""The family of comparisons over which p values are corrected: every arm that was compared with the
same baseline in the same store.
"""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.runs.outcome import OtherComparison, Study
from lswt_core.ablation.statistics.looks import valid_p
from lswt_core.ablation.statistics.paired_runs import clear_p, equivalence_test, paired_test


def describe_others(study: Study) -> list[dict[str, Any]]:
    """Return the comparisons of other studies with this baseline: arm, study, seeds (pairs) and
    their p values, valid under all looks.
    """
    return [describe_other(one) for one in study.others if len(one.differences) > 1]


def describe_other(one: OtherComparison) -> dict[str, Any]:
    """Return an earlier comparison at its last look."""
    differences, pairs = one.differences, len(one.differences)
    declared = one.looks.declared
    equivalent = equivalence_test(differences, one.margin).p
    return {
        "arm": one.arm,
        "study": one.study,
        "margin": one.margin,
        "seeds": pairs,
        "p_looks": valid_p(paired_test(differences).p, declared, pairs),
        "p_equivalent": valid_p(equivalent, declared, pairs, sides=1),
        "p_clear": valid_p(clear_p(differences, one.margin), declared, pairs),
    }


def describe_family(report: dict[str, Any]) -> list[str]:
    """Return over how many comparisons p values are corrected, if some are of other studies."""
    family = report["family"]
    others = ", ".join(sorted({one["arm"] for one in family["others"]}))
    if not others:
        return []
    own = family["size"] - len(family["others"])
    return [
        f"Corrected (Holm) over {family['size']} comparisons with this baseline in this store:"
        f" {own} of this study, and earlier ones of {others}. The verdicts of earlier reports may"
        " be weaker by now: the same commands write them anew."
    ]


def describe_looks(report: dict[str, Any]) -> list[str]:
    """Return what the intervals and p values are valid for, and which looks were taken."""
    lines, asked = [], report["settings"].get("looks")
    for one in report["comparisons"]:
        declared, taken = one["looks"]["declared"], one["looks"]["taken"]
        is_plain = not (taken[1:] or declared[1:]) and asked in (None, list(declared))
        if not one["level"] or is_plain:
            continue
        planned, seen = (", ".join(map(str, pairs)) or "none" for pairs in (declared, taken))
        lines.append(
            f"{one['arm']}: looks were declared at {planned} pairs, and taken at {seen}. Its"
            f" interval covers the difference with a probability of {1 - one['level']:.2%} at this"
            " look alone, and of 95 % at all looks together."
        )
    return lines
