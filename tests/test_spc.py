"""Control charts against published tables, and what they do with bad input.

Montgomery: D. C. Montgomery, Introduction to Statistical Quality Control, Wiley. The examples have kept their data over
the editions, the numbers of chapters are those of the sixth. The data of the piston rings, the orange juice cans, the
circuit boards, the computers and the dyed cloth are also in the R package qcc. The book rounds constants and
intermediate figures; where that changes the last printed digit, the chart is drawn from the figures as printed.
"""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.monitor.attribute_charts import c_chart, laney_p_chart, laney_u_chart, np_chart, p_chart, u_chart
from rlhf_workbench.monitor.chart_rules import find_hits
from rlhf_workbench.monitor.charts import Chart, chart_constants, individuals_chart, unbias, xbar_r_chart, xbar_s_chart
from rlhf_workbench.monitor.multivariate_charts import mewma_chart, t2_chart
from rlhf_workbench.monitor.run_lengths import (
    cusum_arl,
    ewma_arl,
    mewma_arl,
    mewma_limit,
    shewhart_arl,
    simulate_run_lengths,
)
from rlhf_workbench.monitor.spc import KINDS, chart_facts, chart_table, control_chart
from rlhf_workbench.monitor.weighted_charts import cusum_chart, estimate_shift, ewma_chart


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def printed(chart: Chart, digits: int, at: int = 0) -> list[float]:
    """Lower limit, center and upper limit of a point as a book prints them."""
    return [round(float(line[at]), digits) for line in (chart.lower, chart.center, chart.upper)]


# Appendix VI, for n = 2 … 25
APPENDIX = {
    "A2": "1.880 1.023 .729 .577 .483 .419 .373 .337 .308 .285 .266 .249 .235 .223 .212 .203 .194 .187 .180 .173 .167 "
    ".162 .157 .153",
    "A3": "2.659 1.954 1.628 1.427 1.287 1.182 1.099 1.032 .975 .927 .886 .850 .817 .789 .763 .739 .718 .698 .680 .663 "
    ".647 .633 .619 .606",
    "c4": ".7979 .8862 .9213 .9400 .9515 .9594 .9650 .9693 .9727 .9754 .9776 .9794 .9810 .9823 .9835 .9845 .9854 .9862 "
    ".9869 .9876 .9882 .9887 .9892 .9896",
    "B3": "0 0 0 0 .030 .118 .185 .239 .284 .321 .354 .382 .406 .428 .448 .466 .482 .497 .510 .523 .534 .545 .555 .565",
    "B4": "3.267 2.568 2.266 2.089 1.970 1.882 1.815 1.761 1.716 1.679 1.646 1.618 1.594 1.572 1.552 1.534 1.518 1.503 "
    "1.490 1.477 1.466 1.455 1.445 1.435",
    "d2": "1.128 1.693 2.059 2.326 2.534 2.704 2.847 2.970 3.078 3.173 3.258 3.336 3.407 3.472 3.532 3.588 3.640 3.689 "
    "3.735 3.778 3.819 3.858 3.895 3.931",
    "d3": ".853 .888 .880 .864 .848 .833 .820 .808 .797 .787 .778 .770 .763 .756 .750 .744 .739 .734 .729 .724 .720 .716 "
    ".712 .708",
    "D3": "0 0 0 0 0 .076 .136 .184 .223 .256 .283 .307 .328 .347 .363 .378 .391 .403 .415 .425 .434 .443 .451 .459",
    "D4": "3.267 2.574 2.282 2.114 2.004 1.924 1.864 1.816 1.777 1.744 1.717 1.693 1.672 1.653 1.637 1.622 1.608 1.597 "
    "1.585 1.575 1.566 1.557 1.548 1.541",
}
# Where the printed constant differs by one in its last digit, being made from rounded ones (d3(19) is 0.73348).
ROUNDED = {"d3": {19}, "D3": {19, 22, 24}, "D4": {3, 18, 19, 22}}


@pytest.mark.parametrize("name", APPENDIX)
def test_constants_are_those_of_the_appendix(name: str) -> None:
    digits = 4 if name == "c4" else 3
    for n, value in enumerate(numbers(APPENDIX[name]), 2):
        off = 1.1 * 10**-digits if n in ROUNDED.get(name, ()) else 0.5000001 * 10**-digits
        assert abs(getattr(chart_constants(n), name) - value) <= off, n


def test_constants_hold_by_simulation() -> None:
    x = np.random.default_rng(0).normal(size=(100_000, 7))
    ranges, constants = np.ptp(x, axis=1), chart_constants(7)
    assert abs(ranges.mean() - constants.d2) < 0.01
    assert abs(ranges.std() - constants.d3) < 0.01
    assert abs(x.std(axis=1, ddof=1).mean() - unbias(7)) < 0.005


FLOW = np.reshape(
    numbers(
        """1.3235 1.4128 1.6744 1.4573 1.6914 1.4314 1.3592 1.6075 1.4666 1.6109 1.4284 1.4871 1.4932 1.4324 1.5674
        1.5028 1.6352 1.3841 1.2831 1.5507 1.5604 1.2735 1.5265 1.4363 1.6441 1.5955 1.5451 1.3574 1.3281 1.4198
        1.6274 1.5064 1.8366 1.4177 1.5144 1.4190 1.4303 1.6637 1.6067 1.5519 1.3884 1.7277 1.5355 1.5176 1.3688
        1.4039 1.6697 1.5089 1.4627 1.5220 1.4158 1.7667 1.4278 1.5928 1.4181 1.5821 1.3355 1.5777 1.3908 1.7559
        1.2856 1.4106 1.4447 1.6398 1.1928 1.4951 1.4036 1.5893 1.6458 1.4969 1.3589 1.2863 1.5996 1.2497 1.5471
        1.5747 1.5301 1.5171 1.1839 1.8662 1.3680 1.7269 1.3957 1.5014 1.4449 1.4163 1.3864 1.3057 1.6210 1.5573
        1.5796 1.4185 1.6541 1.5116 1.7247 1.7106 1.4412 1.2361 1.3820 1.7601 1.4371 1.5051 1.3485 1.5670 1.4880
        1.4738 1.5936 1.6583 1.4973 1.4720 1.5917 1.4333 1.5551 1.5295 1.6866 1.6399 1.5243 1.5705 1.5563 1.5530
        1.5797 1.3663 1.6240 1.3732 1.6887"""
    ),
    (25, 5),
)


def test_means_and_ranges_of_the_flow_width() -> None:
    """Example 6.1: x̿ = 1.5056, R̄ = 0.32521; means 1.318 … 1.693, ranges up to 0.68749 (with D4 = 2.114)."""
    chart = xbar_r_chart(FLOW)
    assert chart.companion
    assert round(float(chart.center[0]), 4) == 1.5056
    assert round(float(chart.companion.center[0]), 5) == 0.32521
    assert printed(chart, 3) == [1.318, 1.506, 1.693]
    assert round(2.114 * 0.32521, 5) == 0.68749
    assert round(float(chart.companion.upper[0]), 3) == 0.688
    assert chart.companion.lower[0] == 0
    assert find_hits(chart, "limits") == []
    assert round(chart.parameters["sigma"], 4) == 0.1398  # R̄ / d2, as printed in section 6.2.1


RINGS = np.reshape(
    numbers(
        """74.030 74.002 74.019 73.992 74.008 73.995 73.992 74.001 74.011 74.004 73.988 74.024 74.021 74.005 74.002
        74.002 73.996 73.993 74.015 74.009 73.992 74.007 74.015 73.989 74.014 74.009 73.994 73.997 73.985 73.993
        73.995 74.006 73.994 74.000 74.005 73.985 74.003 73.993 74.015 73.988 74.008 73.995 74.009 74.005 74.004
        73.998 74.000 73.990 74.007 73.995 73.994 73.998 73.994 73.995 73.990 74.004 74.000 74.007 74.000 73.996
        73.983 74.002 73.998 73.997 74.012 74.006 73.967 73.994 74.000 73.984 74.012 74.014 73.998 73.999 74.007
        74.000 73.984 74.005 73.998 73.996 73.994 74.012 73.986 74.005 74.007 74.006 74.010 74.018 74.003 74.000
        73.984 74.002 74.003 74.005 73.997 74.000 74.010 74.013 74.020 74.003 73.988 74.001 74.009 74.005 73.996
        74.004 73.999 73.990 74.006 74.009 74.010 73.989 73.990 74.009 74.014 74.015 74.008 73.993 74.000 74.010
        73.982 73.984 73.995 74.017 74.013"""
    ),
    (25, 5),
)
RINGS_S = numbers(
    """.0148 .0075 .0147 .0091 .0122 .0087 .0055 .0123 .0055 .0063 .0029 .0042 .0105 .0153 .0073 .0078 .0106 .0070
    .0085 .0080 .0122 .0074 .0119 .0087 .0162"""
)


def test_means_and_standard_deviations_of_the_piston_rings() -> None:
    """Example 6.3. 24 of the 25 printed deviations are those of the data; 0.0122 of sample 21 is a misprint of 0.0082."""
    chart = xbar_s_chart(RINGS)
    assert chart.companion
    found = chart.companion.values.round(4)
    assert np.flatnonzero(abs(found - RINGS_S) > 1e-9).tolist() == [20]
    assert found[20] == 0.0082
    assert printed(chart, 3)[1] == 74.001
    # s̄ is printed as 0.0094, which has the misprint in it; the limits follow from that.
    assert round(float(np.mean(RINGS_S)), 4) == 0.0094
    as_printed = xbar_s_chart(RINGS, limits={"mean": 74.001, "sigma": 0.0094 / 0.94})
    assert as_printed.companion
    assert printed(as_printed, 3) == [73.988, 74.001, 74.014]
    assert printed(as_printed.companion, 4) == [0, 0.0094, 0.0196]
    assert as_printed.outside.tolist() == []


def test_subgroups_of_different_sizes() -> None:
    """Example 6.4: the piston rings, some left out; x̿ = 8362.075 / 113 = 74.001."""
    sizes = [int(n) for n in "5355544545553535455355555"]
    groups = [row[:n] for row, n in zip(RINGS, sizes, strict=True)]
    assert round(sum(len(group) * round(float(group.mean()), 3) for group in groups), 3) == 8362.075
    chart = xbar_s_chart(groups)
    assert sum(chart.n) == 113
    assert round(float(chart.center[0]), 3) == 74.001
    square = sum((n - 1) * group.var(ddof=1) for n, group in zip(sizes, groups, strict=True)) / (113 - 25)
    assert math.isclose(chart.parameters["sigma"], math.sqrt(square) / unbias(89))
    assert len(set(chart.upper.round(6))) == 3
    width = {int(n): float(u - c) for n, u, c in zip(chart.n, chart.upper, chart.center, strict=True)}
    assert math.isclose(width[3] / width[5], math.sqrt(5 / 3))


def test_individuals_of_the_mortgage_costs() -> None:
    """Example 6.5: x̄ = 300.5, MR̄ = 7.79; 279.78 … 321.22, moving range up to 25.45."""
    costs = numbers("310 288 297 298 307 303 294 297 308 306 294 299 297 299 314 295 293 306 301 304")
    chart = individuals_chart(costs)
    assert chart.companion
    assert chart.center[0] == 300.5
    assert round(float(np.nanmean(chart.companion.values)), 2) == 7.79
    as_printed = individuals_chart(costs, limits={"mean": 300.5, "sigma": 7.79 / 1.128})
    assert as_printed.companion
    assert printed(as_printed, 2) == [279.78, 300.5, 321.22]
    assert printed(as_printed.companion, 2) == [0, 7.79, 25.45]
    assert np.allclose(chart.upper, as_printed.upper, atol=0.01)
    assert find_hits(chart) == []


JUICE = [12, 15, 8, 10, 4, 7, 16, 9, 14, 10, 5, 6, 17, 12, 22, 8, 10, 5, 13, 11, 20, 18, 24, 15, 9, 12, 7, 13, 9, 6]
JUICE_LATER = [9, 6, 12, 5, 6, 4, 6, 3, 7, 6, 2, 4, 3, 6, 5, 4, 8, 5, 6, 7, 5, 6, 3, 5]


def test_shares_of_the_orange_juice_cans() -> None:
    """Example 7.1: p̄ = 0.2313; revised without samples 15 and 23, 0.2150; after the adjustment 0.1108."""
    first = p_chart(JUICE, 50)
    assert printed(first, 4) == [0.0524, 0.2313, 0.4102]
    assert (first.outside + 1).tolist() == [15, 23]
    revised = p_chart(JUICE, 50, limits=p_chart(np.delete(JUICE, [14, 22]), 50).parameters)
    assert printed(revised, 4) == [0.0407, 0.2150, 0.3893]
    assert (revised.outside + 1).tolist() == [15, 21, 23]
    adjusted = p_chart(JUICE_LATER, 50)
    assert printed(adjusted, 4) == [0, 0.1108, 0.2440]
    later = p_chart(JUICE_LATER, 50, limits=revised.parameters)
    assert printed(later, 4) == printed(revised, 4)
    assert (later.values < later.center).mean() > 0.9  # most points lie below: the adjustment worked


def test_numbers_of_the_orange_juice_cans() -> None:
    """Example 7.2, from p̄ = 0.2313 as printed: 2.620, 11.565, 20.510."""
    assert printed(np_chart(JUICE, 50, limits={"rate": 0.2313}), 3) == [2.620, 11.565, 20.510]
    assert (np_chart(JUICE, 50).outside + 1).tolist() == [15, 23]


ORDERS = [12, 8, 6, 9, 10, 12, 11, 16, 10, 6, 20, 15, 9, 8, 6, 8, 10, 7, 5, 8, 5, 8, 10, 6, 9]
ORDER_SIZES = [100, 80, 80, 100, 110, 110, 100, 100, 90, 90, 110, 120, 120]
ORDER_SIZES += [120, 110, 80, 80, 80, 90, 100, 100, 100, 100, 90, 90]


def test_purchase_orders_of_different_sizes() -> None:
    """Table 7.4: 234 of 2450 in error, p̄ = 0.0955 (0.096); sample 11 lies above its limit of 0.180."""
    chart = p_chart(ORDERS, ORDER_SIZES)
    assert (sum(ORDERS), sum(ORDER_SIZES)) == (234, 2450)
    assert round(float(chart.center[0]), 4) == 0.0955
    assert (chart.outside + 1).tolist() == [11]
    assert printed(chart, 3, at=10) == [0.011, 0.096, 0.180]
    assert printed(chart, 3, at=0) == [0.007, 0.096, 0.184]
    by_hand = p_chart([12], 100, limits={"rate": 0.096})  # the book rounds to 0.096 and 0.029
    assert abs(by_hand.sigma[0] - 0.029) < 0.0005  # type: ignore[index]


CIRCUITS = [21, 24, 16, 12, 15, 5, 28, 20, 31, 25, 20, 24, 16, 19, 10, 17, 13, 22, 18, 39, 30, 24, 16, 19, 17, 15]


def test_nonconformities_of_the_circuit_boards() -> None:
    """Example 7.3: c̄ = 19.85, 6.48 … 33.22; revised without samples 6 and 20, 19.67."""
    chart = c_chart(CIRCUITS)
    assert printed(chart, 2) == [6.48, 19.85, 33.21]  # the book has 33.22, from 19.85 and 13.37
    assert round(19.85 + 3 * math.sqrt(19.85), 2) == 33.22
    assert printed(c_chart(CIRCUITS, limits={"rate": 19.85}), 2) == [6.48, 19.85, 33.22]
    assert (chart.outside + 1).tolist() == [6, 20]
    revised = c_chart(np.delete(CIRCUITS, [5, 19]))
    assert printed(revised, 2) == [6.36, 19.67, 32.97]


def test_nonconformities_per_unit() -> None:
    """The computers: 0.07, 1.93, 3.79. The dyed cloth (unequal inspection units): ū = 1.42 and its stepped limits."""
    computers = u_chart([10, 12, 8, 14, 10, 16, 11, 7, 10, 15, 9, 5, 7, 11, 12, 6, 8, 10, 7, 5], 5)
    assert printed(computers, 2) == [0.07, 1.93, 3.79]
    sizes = [10, 8, 13, 10, 9.5, 10, 12, 10.5, 12, 12.5]
    cloth = u_chart([14, 12, 20, 11, 7, 10, 21, 16, 19, 23], sizes, limits={"rate": 1.42})
    assert round(153 / 107.5, 2) == 1.42
    upper = [2.55, 2.68, 2.41, 2.55, 2.58, 2.55, 2.45, 2.52, 2.45, 2.43]
    lower = [0.29, 0.16, 0.43, 0.29, 0.26, 0.29, 0.39, 0.32, 0.39, 0.41]
    assert cloth.upper.round(2).tolist() == upper
    assert cloth.lower.round(2).tolist() == lower
    assert cloth.outside.tolist() == []


READINGS = numbers(
    """9.45 7.99 9.29 11.66 12.16 10.18 8.04 11.46 9.20 10.34 9.03 11.47 10.51 9.40 10.08 9.37 10.62 10.31 8.52 10.84
    10.90 9.33 12.29 11.50 10.60 11.08 10.38 11.62 11.31 10.52"""
)
STANDARD = {"mean": 10.0, "sigma": 1.0}


def test_ewma_of_table_9_1() -> None:
    """Example 9.2 and Table 9.10: λ = 0.1, L = 2.7."""
    chart = ewma_chart(READINGS, limits=STANDARD, weight=0.1, width=2.7)
    table = """9.945 9.7495 9.70355 9.8992 10.1253 10.1307 9.92167 10.0755 9.98796 10.0232 9.92384 10.0785 10.1216
    10.0495 10.0525 9.98426 10.0478 10.074 9.91864 10.0108 10.0997 10.0227 10.2495 10.3745 10.3971 10.4654 10.4568
    10.5731 10.6468 10.6341"""
    assert [float(f"{z:.6g}") for z in chart.values] == numbers(table)
    assert printed(chart, 2, at=0) == [9.73, 10, 10.27]
    assert printed(chart, 2, at=1) == [9.64, 10, 10.36]
    assert printed(chart, 2, at=29) == [9.38, 10, 10.62]


def test_cusum_of_table_9_1() -> None:
    """Example 9.1 and Table 9.2: k = 0.5, h = 5."""
    chart = cusum_chart(READINGS, limits=STANDARD)
    assert chart.companion
    above = """0 0 0 1.16 2.82 2.50 .04 1.00 0 0 0 .97 .98 0 0 0 .12 0 0 .34 .74 0 1.79 2.79 2.89 3.47 3.35 4.47 5.28
    5.30"""
    below = "0.05 1.56 1.77 0 0 0 1.46 0 .30 0 .47 0 0 .10 0 .13 0 0 .98 0 0 .17 0 0 0 0 0 0 0 0"
    assert chart.values.round(2).tolist() == numbers(above)
    assert chart.companion.values.round(2).tolist() == numbers(below)
    assert (chart.outside + 1).tolist() == [29, 30]
    shift = estimate_shift(chart, 28)
    assert (shift.start + 1, shift.n, round(shift.mean, 2)) == (23, 7, 11.25)


def test_t2_of_fiber_strength_and_diameter() -> None:
    """Example 11.1: 20 samples of 10, α = 0.001, limit 13.72."""
    strength = numbers(
        """115.25 115.91 115.05 116.21 115.90 115.55 114.98 115.25 116.15 115.92 115.75 114.90 116.01 115.83 115.29
        115.63 115.47 115.58 115.72 115.40"""
    )
    diameter = numbers(
        "1.04 1.06 1.09 1.05 1.07 1.06 1.05 1.10 1.09 1.05 .99 1.06 1.05 1.07 1.11 1.04 1.03 1.05 1.06 1.04"
    )
    means = np.stack([strength, diameter], axis=1)
    assert [round(x, 2) for x in means.mean(axis=0)] == [115.59, 1.06]
    known = {"mean": [115.59, 1.06], "covariance": [[1.23, 0.79], [0.79, 0.83]], "m": 20, "alpha": 0.001}
    chart = t2_chart(np.repeat(means[:, None], 10, axis=1), limits=known)
    assert chart.values[:15].round(2).tolist() == numbers(
        "2.16 2.14 6.77 8.29 1.89 .03 7.54 3.01 5.92 2.41 1.13 9.96 3.86 1.11 2.56"
    )
    x = np.random.default_rng(0).multivariate_normal([115.59, 1.06], known["covariance"], (20, 10))
    assert round(float(t2_chart(x, alpha=0.001).upper[0]), 2) == 13.72  # phase I: it depends on m, n and p alone
    assert chart.upper[0] == pytest.approx(13.72 * 21 / 19, rel=1e-3)  # phase II is wider by (m + 1)/(m − 1)


def test_t2_of_single_points_keeps_its_false_alarm_rate() -> None:
    """Both limits are exact: α of the points of phase I, and of points that come after it."""
    rng = np.random.default_rng(0)
    first = later = 0
    for _ in range(400):
        x = rng.normal(size=(50, 3)) @ [[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]]
        chart = t2_chart(x[:25], alpha=0.05)
        first += len(chart.outside)
        later += len(t2_chart(x[25:], limits=chart.parameters).outside)
    assert abs(first / 10_000 - 0.05) < 0.007
    assert abs(later / 10_000 - 0.05) < 0.012


def test_t2_does_not_care_for_units() -> None:
    x = np.random.default_rng(0).normal(size=(30, 3))
    turned = x @ np.array([[1e6, 0, 0], [3, 1e-6, 0], [0, 0, 1]]) + 1000
    assert np.allclose(t2_chart(x).values, t2_chart(turned).values, rtol=1e-4)


# Prabhu and Runger 1997, Journal of Quality Technology 29, for 200 points between false alarms
MEWMA = {0.05: (7.35, 11.22), 0.1: (8.64, 12.73), 0.2: (9.65, 13.87), 0.4: (10.31, 14.58), 0.8: (10.58, 14.85)}


@pytest.mark.parametrize("weight", MEWMA)
def test_mewma_limits_are_those_of_the_table(weight: float) -> None:
    assert [round(mewma_limit(weight, p, 200), 2) for p in (2, 4)] == pytest.approx(MEWMA[weight], abs=0.0101)
    assert mewma_arl(weight, 2, MEWMA[weight][0]) == pytest.approx(200, rel=0.01)


def test_mewma_by_simulation() -> None:
    """The chart itself, on series of 200 normal points: the share without alarm is that of the run length."""
    rng, n = np.random.default_rng(1), 300
    known = {"mean": [0, 0], "covariance": [[1, 0], [0, 1]], "m": 10**6, "h": 8.64, "weight": 0.1}
    quiet = sum(not len(mewma_chart(rng.normal(size=(200, 2)), limits=known).outside) for _ in range(n))
    assert abs(quiet / n - math.exp(-200 / 200)) < 0.09


# Montgomery, Table 9.3 (k = 0.5; h = 4, h = 5) and Table 9.11 (Lucas and Saccucci 1990)
SHIFTS = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4]
CUSUM = {4: "168 74.2 26.6 13.3 8.38 4.75 3.34 2.62 2.19 1.71", 5: "465 139 38.0 17.0 10.4 5.75 4.01 3.11 2.57 2.01"}
EWMA = {
    (0.4, 3.054): "500 224 71.2 28.4 14.3 5.9 3.5 2.5 2.0 1.4",
    (0.2, 2.962): "500 150 41.8 18.2 10.5 5.5 3.7 2.9 2.4 1.9",
    (0.1, 2.814): "500 106 31.3 15.9 10.3 6.1 4.4 3.4 2.9 2.2",
}


@pytest.mark.parametrize("h", CUSUM)
def test_run_lengths_of_cusum_are_those_of_the_table(h: int) -> None:
    for shift, value in zip(SHIFTS, numbers(CUSUM[h]), strict=True):
        assert cusum_arl(0.5, h, shift) == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize("weight", EWMA)
def test_run_lengths_of_ewma_are_those_of_the_table(weight: tuple[float, float]) -> None:
    for shift, value in zip(SHIFTS, numbers(EWMA[weight]), strict=True):
        assert ewma_arl(*weight, shift) == pytest.approx(value, rel=0.01, abs=0.051)


@pytest.mark.parametrize(
    ("settings", "tabulated", "exact"),
    [
        ({"kind": "individuals"}, 370.4, shewhart_arl()),
        ({"kind": "ewma", "weight": 0.2, "width": 2.962}, 500, ewma_arl(0.2, 2.962)),
        ({"kind": "cusum", "k": 0.5, "h": 5}, 465, cusum_arl()),
        ({"kind": "individuals", "shift": 1.0}, 43.9, shewhart_arl(1.0)),
        ({"kind": "ewma", "weight": 0.1, "width": 2.814, "shift": 0.5}, 31.3, ewma_arl(0.1, 2.814, 0.5)),
        ({"kind": "cusum", "k": 0.5, "h": 4, "shift": 1.0}, 8.38, cusum_arl(0.5, 4, 1.0)),
    ],
)
def test_run_lengths_by_simulation_within_five_percent(settings: dict, tabulated: float, exact: float) -> None:
    lengths = simulate_run_lengths(n=6000, seed=7, **settings)
    assert lengths.mean() == pytest.approx(tabulated, rel=0.05)
    assert abs(lengths.mean() - exact) < 3.5 * lengths.std() / math.sqrt(len(lengths))


def test_simulation_and_charts_do_the_same() -> None:
    """The charts, given the values that the simulation drew, raise their alarm where it did."""
    for seed in range(5):
        x = np.random.default_rng(seed).normal(0.7, 1, 500)
        known = {"mean": 0.0, "sigma": 1.0}
        cusum = cusum_chart(x, limits=known)
        assert cusum.companion
        first = min([*cusum.outside, *cusum.companion.outside])
        assert simulate_run_lengths("cusum", n=1, seed=seed, shift=0.7)[0] == first + 1
        assert (
            simulate_run_lengths("individuals", n=1, seed=seed, shift=0.7)[0]
            == individuals_chart(x, known).outside[0] + 1
        )


def test_laney_by_hand() -> None:
    """Rates 0.1, 0.3, 0.1, 0.3 of 100 each: p̄ = 0.2, z = ±2.5, moving ranges 5, sigma_z = 5 / 1.128."""
    chart = laney_p_chart([10, 30, 10, 30], 100)
    assert chart.parameters["rate"] == 0.2
    assert chart.parameters["sigma_z"] == pytest.approx(5 / 1.128379, rel=1e-5)
    assert chart.sigma is not None
    assert chart.sigma[0] == pytest.approx(0.04 * 5 / 1.128379, rel=1e-5)
    events = laney_u_chart([10, 30, 10, 30], 1)
    assert events.parameters["sigma_z"] == pytest.approx(20 / math.sqrt(20) / 1.128379, rel=1e-5)


def test_laney_keeps_its_false_alarm_rate_where_the_rate_wanders() -> None:
    rng, plain, laney = np.random.default_rng(0), 0, 0
    for _ in range(50):
        sizes = rng.integers(1000, 4000, 100)
        wrong = rng.binomial(sizes, rng.normal(0.2, 0.02, 100))
        plain += len(p_chart(wrong, sizes).outside)
        laney += len(laney_p_chart(wrong, sizes).outside)
    assert plain / 5000 > 0.1
    assert laney / 5000 < 0.01


BAD = [
    ("individuals", ([5, 5, 5],), "do not vary"),
    ("individuals", ([5],), "needs at least 2"),
    ("individuals", ([],), "needs at least 2"),
    ("individuals", ([1, math.nan, 3],), "got nan at position 1"),
    ("individuals", ([1, math.inf],), "must be finite"),
    ("individuals", (["a", "b"],), "must be numbers"),
    ("individuals", ([[1, 2], [3, 4]],), "one row"),
    ("xbar_r", ([[1, 2], [1, 2, 3]],), "subgroups of one size"),
    ("xbar_r", ([[1], [2]],), "has no spread"),
    ("xbar_s", ([[1, 2], [3]],), "subgroup 1 has one value"),
    ("xbar_s", ([[1, 2]],), "needs at least 2"),
    ("xbar_s", ([[1, 1], [2, 2]],), "do not vary"),
    ("xbar_s", ([[0.1] * 3, [0.7] * 3],), "do not vary"),
    ("xbar_s", ([[1, 2], [3, math.nan]],), "subgroup 1 must be finite"),
    ("p", ([3, 6], 5), "above its size"),
    ("p", ([3, -1], 5), "negative"),
    ("p", ([3, 1], [5, 0]), "size 0"),
    ("p", ([3, 1], [5, 5, 5]), "each count needs a size"),
    ("p", ([0, 0], 5), "leaves no room"),
    ("p", ([5, 5], 5), "leaves no room"),
    ("np", ([1, 2], [5, 6]), "use kind p"),
    ("c", ([0, 0],), "leaves no room"),
    ("c", ([3, -1],), "negative"),
    ("u", ([3, 1], [1, -2]), "size 0 or less"),
    ("laney_p", ([2, 2, 2], 10), "do not vary at all"),
    ("ewma", ([5, 5, 5],), "do not vary"),
    ("cusum", ([5, 5, 5],), "do not vary"),
    ("t2", ([[1, 2], [3, 4]],), "needs at least 4"),
    ("t2", ([[1.0, 2], [2, 4], [3, 6], [4, 8], [5, 10]],), "singular"),
    ("t2", ([[1.0, 2], [2, 2], [3, 2], [4, 2], [5, 2]],), "does not vary"),
    ("t2", ([[1.0, math.nan]] * 5,), "row 0"),
    ("mewma", ([[1.0, 2], [2, 4], [3, 6], [4, 8], [5, 10]],), "singular"),
]


@pytest.mark.parametrize(("kind", "data", "said"), BAD)
def test_bad_input_is_refused_with_a_reason(kind: str, data: tuple, said: str) -> None:
    with pytest.raises(InputError, match=said):
        control_chart(kind, *data)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("ewma", {"weight": 0}, "weight must be"),
        ("ewma", {"weight": 1.5}, "weight must be"),
        ("ewma", {"width": 0}, "weight must be"),
        ("cusum", {"k": -1}, "k must be"),
        ("cusum", {"h": 0}, "k must be"),
        ("individuals", {"k": 1}, "has no setting k"),
    ],
)
def test_impossible_settings_are_refused(kind: str, settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        control_chart(kind, [1, 2, 4], **settings)


def test_limits_of_other_variables_do_not_fit() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(InputError, match="limits are of 2 variables"):
        t2_chart(x, limits=t2_chart(x[:, :2]).parameters)


def test_limits_of_another_kind_of_chart_are_refused() -> None:
    rate, measured = p_chart([1, 2], 10).parameters, individuals_chart([1, 2]).parameters
    for kind, data, limits in (("individuals", ([1, 2],), rate), ("p", ([1, 2], 9), measured), ("t2", (FLOW,), rate)):
        with pytest.raises(InputError, match="are they of another kind of chart"):
            control_chart(kind, *data, limits=limits)


def drawn(kind: str, seed: int, m: int = 40) -> tuple:
    """Data of a kind, made up."""
    rng = np.random.default_rng(seed)
    takes = KINDS[kind].takes
    if takes == "values":
        return (rng.normal(5, 2, m),)
    if takes == "groups":
        return (rng.normal(5, 2, (m, 4)),)
    if takes == "rows":
        return (rng.normal(5, 2, (m, 3)),)
    counts = rng.binomial(50, 0.2, m)
    return (counts, 50) if takes == "sized counts" else (counts,)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_limits_do_not_move_with_new_data(kind: str) -> None:
    first = control_chart(kind, *drawn(kind, 0))
    later = control_chart(kind, *drawn(kind, 1), limits=first.parameters)
    assert later.parameters == first.parameters
    for panel, old in zip(later.panels, first.panels, strict=True):
        assert np.array_equal(panel.center, old.center, equal_nan=True)
        if kind != "t2":  # its limit for later points is another one, and wider
            assert np.array_equal(panel.upper, old.upper)
            assert np.array_equal(panel.lower, old.lower, equal_nan=True)
    one = tuple(part[:1] if np.ndim(part) else part for part in drawn(kind, 2))
    assert len(control_chart(kind, *one, limits=first.parameters).values) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_plain_values(kind: str) -> None:
    import json

    chart = control_chart(kind, *drawn(kind, 0))
    facts = json.loads(json.dumps(chart_facts(chart, find_hits(chart)), allow_nan=False))
    assert len(facts["points"]) == 40
    assert json.loads(json.dumps(chart.parameters)) == chart.parameters


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=30), st.integers(-1000, 1000), st.sampled_from([0.25, 2, 8]))
def test_limits_move_with_the_data(values: list[int], by: int, scale: float) -> None:
    if len(set(values)) < 2:
        return
    old, new = individuals_chart(values), individuals_chart(np.array(values) * scale + by)
    assert np.allclose(new.upper, old.upper * scale + by)
    assert np.allclose(new.lower, old.lower * scale + by)
    assert new.outside.tolist() == old.outside.tolist()


@given(st.integers(1, 9), st.lists(st.integers(10, 500), min_size=2, max_size=20))
def test_limits_tighten_with_the_size(rate: int, sizes: list[int]) -> None:
    chart = p_chart(np.array(sizes) * rate / 10, sizes)
    order = np.argsort(sizes, kind="stable")
    assert (np.diff(chart.upper[order]) <= 1e-12).all()
    assert (np.diff(chart.lower[order]) >= -1e-12).all()
    assert (chart.lower <= chart.center).all()
    assert (chart.center <= chart.upper).all()
    assert chart.lower.min() >= 0
    assert chart.upper.max() <= 1


def test_tables_are_charted_by_their_columns() -> None:
    table = pd.DataFrame({"wrong": ORDERS, "n": ORDER_SIZES})
    found = chart_table(table, ["wrong"], sizes="n")
    assert found.chart.kind == "p"
    assert (found.chart.outside + 1).tolist() == [11]
    assert chart_table(table, ["wrong"], sizes=200.0, kind="np").chart.kind == "np"
    assert chart_table(table, ["wrong", "n"]).chart.kind == "t2"
    long = pd.DataFrame({"width": FLOW.ravel(), "sample": np.repeat(np.arange(25), 5)})
    assert printed(chart_table(long, ["width"], subgroup="sample", kind="xbar_r").chart, 3) == [1.318, 1.506, 1.693]
    days = pd.DataFrame({"x": ["1", "2", "4"], "day": ["2026-01-01", "2026-01-02", "2026-01-02"]})
    assert str(chart_table(days, ["x"], at="day").labels[1])[:10] == "2026-01-02"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"values": ["y"]}, "there is no column 'y'"),
        ({"values": ["x"], "sizes": "y"}, "there is no column 'y'"),
        ({"values": ["x"], "subgroup": "y"}, "there is no column 'y'"),
        ({"values": ["x"], "at": "y"}, "there is no column 'y'"),
        ({"values": ["word"]}, "row 2 of column 'word' holds 'b'"),
        ({"values": ["x"], "at": "word"}, "row 1 of column 'word' holds '1', which is no moment|time|no moment"),
        ({"values": ["x"], "kind": "xbar_s"}, "needs a column of subgroups"),
        ({"values": ["x"], "kind": "c", "subgroup": "word"}, "takes no subgroups"),
        ({"values": ["x", "x"], "kind": "c"}, "takes one column"),
        ({"values": ["x"], "kind": "pp"}, "there is no chart 'pp'"),
        ({"values": ["x"], "kind": "p"}, "needs sizes"),
        ({"values": ["x"], "kind": "c", "sizes": 5.0}, "takes no sizes"),
    ],
)
def test_tables_that_cannot_be_charted(given: dict, said: str) -> None:
    table = pd.DataFrame({"x": [1, 2, 4], "word": ["1", "b", "c"]})
    with pytest.raises((InputError, MissingError), match=said):
        chart_table(table, **given)
