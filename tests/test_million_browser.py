"""A million predictions on the drift page in headless Chromium: what is shown after a brush, a click and a replay is right."""

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

pytest.importorskip("panel", reason="needs the extra apps: pip install 'rlhf_workbench[apps]'")
pytest.importorskip("bokeh_fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")
pytest.importorskip("frouros", reason="needs the extra monitor: pip install 'rlhf_workbench[monitor]'")

from browser import NEEDS_BROWSER, Page, asked, choose, columns, drag, outside, press, served, window_of

from rlhf_workbench.core.schema import Comparison, Mistake, MistakePattern, Observation
from rlhf_workbench.store.tables import connect

pytestmark = NEEDS_BROWSER
Floats = npt.NDArray[np.float64]
N, CHANGE, PATIENCE_S = 1_000_000, 600_000, 60
_RNG = np.random.default_rng(0)
LATE = np.arange(N) >= CHANGE
ERRORS: Floats = (_RNG.random(N) < np.where(LATE, 0.2, 0.1)).astype(float)
SURE: Floats = _RNG.uniform(0.6, 0.99, N).round(2)
SCORES: Floats = _RNG.normal(size=N) + 0.5 * LATE
CASE = _RNG.integers(0, 20, N) + 20 * LATE  # what each value is about: cooking, then law


@pytest.fixture(scope="module")
def link(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("store") / "live.duckdb"
    with connect(path) as store:
        rows = asked([f"{'cooking' if i < 20 else 'law'} question {i}" for i in range(40)])
        ids = [row.id for row in rows if isinstance(row, Comparison)]
        about = {"model_id": "m", "p_first": 0.9, "first_is_better": 0, "kind": "wrong", "surprise": 2.3}
        mistakes = [Mistake(comparison_id=one, **about) for one in ids[20:]]
        named = MistakePattern(model_id="m", name="legal", words=["law"], mistake_ids=[one.id for one in mistakes])
        store.append([*rows, *mistakes, named])
        levels, places = np.unique(SURE, return_inverse=True)
        features = pa.array([f'{{"confidence": {x}}}' for x in levels]).take(pa.array(places))
        about_cases = pa.array(ids).take(pa.array(CASE))
        errors = {"stream": pa.repeat("errors", N), "value": ERRORS, "comparison_id": about_cases, "features": features}
        store.append_table(Observation, pa.table(errors))
        store.append_table(Observation, pa.table({"stream": pa.repeat("scores", N), "value": SCORES}))
    with served(page, path) as url:
        page.driver.get(f"{url}/drift")
        page.wait(lambda: is_settled(page) and page.drawn_plots() == 4, PATIENCE_S)
        yield url


def is_settled(page: Page) -> bool:
    return "Drawn in" in page.text()


def check_views(page: Page) -> tuple[int, int]:
    """All views are those of the stretch that the page names, computed here in another way; which stretch it is."""
    page.wait(lambda: is_settled(page), PATIENCE_S)
    lo, hi = window_of(page)
    values, text = ERRORS[lo:hi], page.text()
    assert f"Values {lo:,} to {hi:,} of {N:,}: {100 * values.mean():.1f}% wrong." in text

    size = max(5, (hi - lo) // 40)
    blocks = values[: len(values) // size * size].reshape(-1, size).mean(axis=1)
    (curve,) = (part for part in columns(page, "value") if set(part) == {"index", "value"} and len(part["value"]) > 1)
    assert np.allclose(curve["value"], blocks)
    assert np.allclose(curve["index"], lo + size * (np.arange(len(blocks)) + 0.5))  # where they lie in the stream
    red = {x for part in columns(page, "rules") for x, rule in zip(part["index"], part["rules"], strict=True) if rule}
    limit = blocks[: len(blocks) // 2].mean()
    beyond = np.abs(blocks - limit) > 3 * np.sqrt(limit * (1 - limit) / size)
    assert set((lo + size * (np.flatnonzero(beyond) + 0.5)).tolist()) <= red

    (points,) = columns(page, "accuracy_lo")
    borders = np.linspace(0, 1, 16)
    groups = np.digitize(SURE[lo:hi], borders, right=True)
    assert points["n"] == [int((groups == g).sum()) for g in np.unique(groups)]
    assert np.allclose(points["accuracy"], [1 - values[groups == g].mean() for g in np.unique(groups)])
    for low, share, high in zip(points["accuracy_lo"], points["accuracy"], points["accuracy_hi"], strict=True):
        assert low < share < high

    before, inside = ([int(x) for x in part["at"]] for part in columns(page, "prompt"))
    assert len(inside) == min(100, hi - lo)
    assert all(lo <= place < hi for place in inside)
    assert all(2 * lo - hi <= place < lo for place in before)

    rows = re.findall(r"([\d,]+) 1 (0\.\d+) (cooking|law) question (\d+) answer", text.split("drawn at random.")[1])
    assert len(rows) == 12
    for place, sure, subject, case in rows:
        at = int(place.replace(",", ""))
        assert lo <= at < hi
        assert (ERRORS[at], SURE[at], CASE[at]) == (1, float(sure), int(case))
        assert subject == ("law" if at >= CHANGE else "cooking")
    assert ("legal · " in text) == (hi > CHANGE)
    assert [outside(page, name) for name in ("rules", "accuracy_lo", "prompt")] == [[], [], []]  # axes follow
    heights = page.ask(
        "all(document.body).filter(e => e.tagName === 'CANVAS').map(c => c.getBoundingClientRect().height)"
    )
    assert sum(height > 200 for height in heights) >= 4  # and no plot collapses
    assert page.complaints() == []
    return lo, hi


def visible_line(page: Page) -> tuple[Floats, Floats]:
    (line,) = (part for part in columns(page, "at") if set(part) == {"at", "value"})
    return np.array(line["at"]), np.array(line["value"])


def test_all_views_are_those_of_the_brushed_stretch(page: Page, link: str) -> None:
    assert check_views(page) == (0, N)
    drag(page, 0, (0.2, 0.5), (0.5, 0.5))
    page.wait(lambda: window_of(page) != (0, N), PATIENCE_S)
    lo, hi = check_views(page)
    assert 50_000 < lo < 200_000 < 350_000 < hi < CHANGE
    drag(page, 0, (0.4, 0.5), (0.9, 0.5))
    page.wait(lambda: window_of(page) != (lo, hi), PATIENCE_S)
    lo, hi = check_views(page)
    assert lo < CHANGE < hi


def test_a_clicked_alarm_shows_its_stretch(page: Page, link: str) -> None:
    press(page, "Whole stream")
    page.wait(lambda: window_of(page) == (0, N) and is_settled(page), PATIENCE_S)
    choose(page, "False alarms allowed", "one in 100,000")
    press(page, "What would have fired?")
    page.wait(lambda: "Would have fired: auto" in page.text(), PATIENCE_S)
    options = page.ask("all(document.body).filter(e => e.tagName === 'OPTION').map(o => o.textContent)")
    found = [int(one.split(" · ")[0].replace(",", "")) for one in options if " · auto · " in one]
    assert len(found) <= 21  # ten are allowed: the 99.9 % bound of a Poisson count, and the change
    at = next(place for place in found if CHANGE <= place < CHANGE + 1000)
    (marks,) = columns(page, "detector")
    assert marks["at"] == found
    width = N // 40
    assert np.allclose(marks["value"], [ERRORS[max(0, x + 1 - width) : x + 1].mean() for x in found])  # on the line

    choose(page, "Alarms", f"{at:,} · auto · rise")
    page.wait(lambda: window_of(page) != (0, N), PATIENCE_S)
    lo, hi = check_views(page)
    assert lo < CHANGE < at < hi < CHANGE + 10_000
    (begins,) = ([x for x in part["x"]] for part in columns(page, "x") if set(part) == {"x"})
    assert begins[0] == pytest.approx(CHANGE, abs=at - CHANGE)  # the dotted line
    places, level = visible_line(page)
    width = max(20, 3 * (hi - lo) // 40)  # as much again is visible on both sides
    assert np.allclose(level, [ERRORS[int(x) + 1 - width : int(x) + 1].mean() for x in places])
    assert places[-1] == 2 * hi - lo - 1


def test_views_do_not_wait_for_a_detector_that_turns_its_dial(page: Page, link: str) -> None:
    press(page, "Whole stream")
    page.wait(lambda: window_of(page) == (0, N) and is_settled(page), PATIENCE_S)
    choose(page, "Detectors", "ADWIN")
    press(page, "What would have fired?")
    page.wait(lambda: "ADWIN turns its dial first, on streams drawn from the first values: delta" in page.text())
    drag(page, 0, (0.3, 0.5), (0.7, 0.5))
    page.wait(lambda: window_of(page) != (0, N), PATIENCE_S)
    lo, hi = check_views(page)
    assert lo < CHANGE < hi
    assert "Would have fired" not in page.text()  # it is still busy
    press(page, "Stop")
    page.wait(lambda: "Stopped after" in page.text() and "What would have fired?" in page.text())
    choose(page, "Detectors", "CUSUM")
    press(page, "What would have fired?")
    only = "in the first 50,000 values, more are not shown to a single detector (the budget allows 0.5 false)"
    page.wait(lambda: only in page.text(), PATIENCE_S)
    assert "keeps the budget on streams drawn from the first 500 values" in page.text()


def test_the_density_counts_every_score(page: Page, link: str) -> None:
    choose(page, "Stream", "scores")
    page.wait(lambda: f"mean score {SCORES.mean():.3g}." in page.text() and is_settled(page), PATIENCE_S)
    counted = "Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.renderers && m.x_range)"
    counted += ".flatMap(m => m.renderers).map(r => r.data_source).filter(s => s && s.columns().includes('image'))"
    counted += ".map(s => [...s.get_column('image')[0]].filter(x => x > 0).reduce((a, b) => a + b, 0))"
    assert page.ask(counted) == [N]
    (chart,) = (part for part in columns(page, "value") if set(part) == {"index", "value"} and len(part["value"]) > 1)
    assert np.allclose(chart["value"], SCORES.reshape(40, -1).mean(axis=1))
    assert "No confidence is known here" in page.text()
    assert page.complaints() == []
