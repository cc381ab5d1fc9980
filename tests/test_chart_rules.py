"""Each rule about patterns: a shortest series that sets it off alone, and one that just does not."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.monitor.chart_rules import RULES, Hit, find_hits, first_of_each
from rlhf_workbench.monitor.charts import Chart, individuals_chart, xbar_s_chart
from rlhf_workbench.monitor.weighted_charts import ewma_chart

STANDARD = {"mean": 0.0, "sigma": 1.0}


def chart_of(values: list[float]) -> Chart:
    """Individuals with known mean 0 and standard deviation 1, without the moving ranges."""
    found = individuals_chart(values, STANDARD)
    return Chart(**{**vars(found), "companion": None})


NINE = [0.5, 0.4, 0.6, 0.2, 0.3, 1.5, 0.3, 0.2, 0.4]
SIX = [-1.2, -0.7, -0.1, 0.3, 0.6, 1.1]
FOURTEEN = [0.5, -0.4, 0.3, -0.6, 0.2, -1.5, 0.1, -0.2, 0.4, -0.7, 0.3, -0.5, 0.6, -0.1]
FIFTEEN = [0.5, 0.2, -0.3, -0.6, 0.9, 0.1, 0.3, -0.8, -0.2, 0.4, 0.7, -0.1, -0.5, 0.3, 0.6]
EIGHT = [1.2, 1.5, -1.1, -1.4, -1.2, 1.3, 1.6, -1.1]
# rule → (sets it off, its points), (just does not)
CASES: dict[str, tuple[list[float], list[int], list[float]]] = {
    "nelson-1": ([0.1, 3.01, -0.2], [1], [0.1, 2.99, -0.2]),
    "nelson-2": (NINE, list(range(9)), [*NINE[:4], 0.0, *NINE[5:]]),
    "nelson-3": (SIX, list(range(6)), [*SIX[:3], SIX[2], *SIX[4:]]),
    "nelson-4": (FOURTEEN, list(range(14)), [*FOURTEEN[:6], -1.6, *FOURTEEN[7:]]),
    "nelson-5": ([0.1, 2.1, -0.4, 2.2], [1, 3], [0.1, 2.1, -0.4, -2.2]),
    "nelson-6": ([-0.1, 1.1, 1.3, -0.2, 1.2, 1.4], [1, 2, 4, 5], [-0.1, 1.1, 1.3, -0.2, 1.2, -1.4]),
    "nelson-7": (FIFTEEN, list(range(15)), [*FIFTEEN[:7], -1.01, *FIFTEEN[8:]]),
    "nelson-8": (EIGHT, list(range(8)), [*EIGHT[:3], -0.99, *EIGHT[4:]]),
    "western-electric-1": ([0.1, -3.01, -0.2], [1], [0.1, -2.99, -0.2]),
    "western-electric-2": ([0.1, -2.1, 0.4, -2.2], [1, 3], [0.1, -2.1, 0.4, 0.3, -2.2]),
    "western-electric-3": ([0.1, -1.1, -1.3, -1.2, 0.5, -1.4], [1, 2, 3, 5], [0.1, -1.1, -1.3, 0.2, 0.5, -1.4]),
    "western-electric-4": (NINE[:8], list(range(8)), NINE[:7]),
}


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_rule_finds_its_pattern_and_nothing_else(rule: str, sign: int) -> None:
    series, points, _ = CASES[rule]
    hits = find_hits(chart_of([sign * x for x in series]), rule.rsplit("-", 1)[0])
    assert hits == [Hit(rule, points[-1], points, "value")]


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_rule_leaves_alone_what_just_is_no_pattern(rule: str, sign: int) -> None:
    assert find_hits(chart_of([sign * x for x in CASES[rule][2]]), rule.rsplit("-", 1)[0]) == []


@pytest.mark.parametrize("rule", ["nelson-2", "nelson-3", "nelson-4", "nelson-7", "nelson-8", "western-electric-4"])
def test_a_run_that_is_one_too_short_is_no_pattern(rule: str) -> None:
    series = CASES[rule][0]
    names = rule.rsplit("-", 1)[0]
    assert find_hits(chart_of(series[1:]), names) == []
    assert find_hits(chart_of(series[:-1]), names) == []


def test_eight_beyond_one_sigma_must_lie_on_both_sides() -> None:
    assert find_hits(chart_of([abs(x) for x in EIGHT]), ["nelson-8"]) == []


def test_two_neighbours_beyond_two_sigma_are_two_of_three() -> None:
    assert [hit.points for hit in find_hits(chart_of([2.1, 2.2]), ["nelson-5"])] == [[0, 1]]
    assert [hit.points for hit in find_hits(chart_of([2.1, 2.2, 2.3]), ["nelson-5"])] == [[0, 1], [0, 1, 2]]


def test_a_pattern_is_complete_at_a_point_that_belongs_to_it() -> None:
    for hit in find_hits(chart_of(np.random.default_rng(0).normal(0, 1.3, 3000).tolist())):
        assert hit.points[-1] == hit.index
        assert hit.points == sorted(set(hit.points))


values = st.lists(st.integers(-28, 28), max_size=60)  # eighths, so that shifts and scales are exact


@given(
    values, st.integers(-64, 64), st.sampled_from([0.125, 0.5, 2, 16]), st.sampled_from(["nelson", "western-electric"])
)
def test_rules_do_not_care_for_shift_and_scale(x: list[int], shift: int, scale: float, rules: str) -> None:
    if not x:
        return
    old = individuals_chart(np.array(x) / 8, STANDARD)
    new = individuals_chart(np.array(x) / 8 * scale + shift, {"mean": float(shift), "sigma": scale})
    assert find_hits(new, rules) == find_hits(old, rules)


@given(values)
def test_rules_are_the_same_upside_down(x: list[int]) -> None:
    if x:
        up, down = (chart_of([sign * v / 8 for v in x]) for sign in (1, -1))
        assert find_hits(up) == find_hits(down)


def by_counting(z: list[float], rule: int) -> set[int]:
    """Where a rule of Nelson is met, point after point, without vectors."""
    found = set()
    for i in range(len(z)):

        def last(n: int, i: int = i) -> list[float]:
            return z[max(0, i - n + 1) : i + 1]

        steps = [b - a for a, b in itertools.pairwise(last(14))]
        met = {
            1: abs(z[i]) > 3,
            2: len(last(9)) == 9 and (min(last(9)) > 0 or max(last(9)) < 0),
            3: len(last(6)) == 6 and (all(s > 0 for s in steps[-5:]) or all(s < 0 for s in steps[-5:])),
            4: len(last(14)) == 14 and all(a * b < 0 for a, b in itertools.pairwise(steps)),
            5: any(s * z[i] > 2 and sum(s * v > 2 for v in last(3)) >= 2 for s in (1, -1)),
            6: any(s * z[i] > 1 and sum(s * v > 1 for v in last(5)) >= 4 for s in (1, -1)),
            7: len(last(15)) == 15 and all(abs(v) < 1 for v in last(15)),
            8: len(last(8)) == 8 and all(abs(v) > 1 for v in last(8)) and min(last(8)) < 0 < max(last(8)),
        }
        if met[rule]:
            found.add(i)
    return found


@given(values, st.integers(1, 8))
def test_rules_are_what_counting_says(x: list[int], rule: int) -> None:
    z = [v / 8 for v in x]
    if z:
        hits = find_hits(chart_of(z), [f"nelson-{rule}"])
        assert {hit.index for hit in hits} == by_counting(z, rule)


def test_each_rule_is_met_by_long_noise_somewhere() -> None:
    """Otherwise the comparison with counting would say little."""
    z = np.random.default_rng(2).normal(0, 1.4, 200_000).tolist()
    assert {hit.rule for hit in find_hits(chart_of(z))} == set(RULES["nelson"])


@given(values, values)
def test_more_points_never_change_earlier_hits(x: list[int], more: list[int]) -> None:
    if x:
        z = [v / 8 for v in x]
        before, after = find_hits(chart_of(z)), find_hits(chart_of(z + [v / 8 for v in more]))
        assert [hit for hit in after if hit.index < len(z)] == before
        stretches = [hit for hit in first_of_each(after) if hit.index < len(z)]
        assert stretches == first_of_each(before)


def test_a_stretch_is_one_alarm() -> None:
    """Two runs of eleven, parted by a point on the other side: two alarms, six hits."""
    chart = chart_of([0.3, 0.6] * 5 + [0.3, -0.5] + [0.4, 0.2] * 5 + [0.4])
    hits = find_hits(chart, ["nelson-2"])
    assert [hit.index for hit in hits] == [8, 9, 10, 20, 21, 22]
    assert [hit.index for hit in first_of_each(hits)] == [8, 20]
    lone = chart_of([3.5, 0.1, 3.5, 3.6, 0.1])
    assert [hit.index for hit in first_of_each(find_hits(lone, ["nelson-1"]))] == [0, 2]


def test_other_panels_are_judged_by_their_limits_alone() -> None:
    chart = individuals_chart([0, 0.1] * 20 + [5], STANDARD)
    assert {hit.rule for hit in find_hits(chart) if hit.panel == "moving range"} == {"nelson-1"}
    average = ewma_chart([1.2] * 60, STANDARD)
    assert {hit.rule for hit in find_hits(average)} == {"nelson-1"}
    spread = xbar_s_chart(np.random.default_rng(0).normal(0, [[1]] * 20 + [[9]], (21, 4)), STANDARD)
    assert [hit.index for hit in find_hits(spread, "limits") if hit.panel == "standard deviation"] == [20]


def test_steps_in_the_limits_are_followed() -> None:
    from rlhf_workbench.monitor.attribute_charts import p_chart

    chart = p_chart([12, 120], [100, 1000], limits={"rate": 0.1})
    assert find_hits(chart, ["nelson-5"]) == []
    assert [hit.index for hit in find_hits(p_chart([130], [1000], limits={"rate": 0.1}), "limits")] == [0]
    assert find_hits(p_chart([13], [100], limits={"rate": 0.1}), "limits") == []


def test_unknown_rules_are_refused() -> None:
    chart = chart_of([0.1, 0.2])
    assert find_hits(chart, "none") == []
    with pytest.raises(InputError, match="there is no set of rules 'murphy'"):
        find_hits(chart, "murphy")
    with pytest.raises(InputError, match="there is no rule 'nelson-9'"):
        find_hits(chart, ["nelson-9"])


def test_western_electric_rules_together_as_tabulated() -> None:
    """Champ and Woodall 1987, Technometrics 29: 91.75 points between false alarms with all four rules."""
    rng, n = np.random.default_rng(5), 1500
    lengths = []
    for _ in range(n):
        hits = find_hits(chart_of(rng.normal(size=900)), "western-electric")
        lengths.append(hits[0].index + 1 if hits else 900)
    assert abs(np.mean(lengths) - 91.75) < 3.5 * np.std(lengths) / np.sqrt(n)
