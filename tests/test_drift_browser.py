"""The drift page in headless Chromium: a stream, a brush, an alarm, and what is behind it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("panel", reason="needs the extra apps: pip install 'rlhf_workbench[apps]'")
pytest.importorskip("bokeh_fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")
pytest.importorskip("frouros", reason="needs the extra monitor: pip install 'rlhf_workbench[monitor]'")

from browser import NEEDS_BROWSER, Page, asked, choose, drag, mouse, press, served, window_of

from rlhf_workbench.core.schema import Comparison, Mistake, MistakePattern, Observation
from rlhf_workbench.store.tables import connect

pytestmark = NEEDS_BROWSER
ATTACK = "<script>alert(1)</script>"
N = 20_000
CHANGE = 12_000


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of errors whose rate and subject change, and one of scores."""
    path, rng = tmp_path_factory.mktemp("store") / "live.duckdb", np.random.default_rng(0)
    with connect(path) as store:
        rows = asked([f"{'sea' if i < 20 else ATTACK} question {i}" for i in range(40)])
        ids = [row.id for row in rows if isinstance(row, Comparison)]
        about = {"model_id": "m", "p_first": 0.9, "first_is_better": 0, "kind": "wrong", "surprise": 2.3}
        mistake = Mistake(comparison_id=ids[0], **about)
        named = MistakePattern(model_id="m", name=f"about {ATTACK}", words=["sea"], mistake_ids=[mistake.id])
        store.append([*rows, mistake, named])
        late = np.arange(N) >= CHANGE
        sure = rng.uniform(0.6, 0.99, N).round(2)
        errors = {
            "stream": ["errors of the judge"] * N,
            "value": (rng.random(N) < np.where(late, 0.25, 0.1)).astype(float),
            "comparison_id": [ids[i] for i in rng.integers(0, 20, N) + 20 * late],
            "features": [f'{{"confidence": {x}}}' for x in sure],
        }
        store.append_table(Observation, pa.table(errors))
        scores = {"stream": ["margin"] * N, "value": rng.normal(size=N) + late}
        store.append_table(Observation, pa.table(scores))
    return path


@pytest.fixture(scope="module")
def link(page: Page, store_path: Path) -> Iterator[str]:
    with served(page, store_path) as url:
        yield f"{url}/drift"


def opened(page: Page, link: str, plots: int = 4) -> None:
    page.complaints()  # what earlier pages said
    page.driver.get(link)
    page.wait(lambda: f"of {N:,}: " in page.text() and "Drawn in" in page.text() and page.drawn_plots() >= plots)


RANGES = "Bokeh.documents.flatMap(d => [...d._all_models.values()]).map(m => m.x_range).filter(Boolean).map(x => [x.start, x.end])"
MARK = """(() => { const figures = Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.x_range);
const has = r => r.data_source?.columns().includes('detector') && r.data_source.get_column('detector').length;
const figure = figures.find(f => f.renderers.some(has)); if (!figure) return null;
const source = figure.renderers.find(has).data_source;
const view = Bokeh.index.find_one(figure); view.el.scrollIntoView({block: 'center'});
const box = view.el.getBoundingClientRect();
return [box.left + view.frame.x_scale.compute(source.get_column('at')[0]),
        box.top + view.frame.y_scale.compute(source.get_column('value')[0])]; })()"""  # where the first alarm is


def test_it_shows_a_stream_from_all_sides_and_asks_nobody_else(page: Page, link: str) -> None:
    opened(page, link)
    text = page.text()
    assert f"Values 0 to {N:,} of {N:,}: " in text
    assert f"about {ATTACK}" in text
    assert (
        page.ask("all(document.body).filter(e => e.tagName === 'SCRIPT' && e.textContent.includes('alert(1)'))") == []
    )
    assert page.ask("document.documentElement.scrollWidth") <= page.ask("document.documentElement.clientWidth")
    assert page.ask("document.querySelector('header a').getAttribute('href')") == "/"  # back to the overview
    assert page.complaints() == []
    assert page.hosts() == {"127.0.0.1"}


def test_what_would_have_fired_and_what_is_behind_it(page: Page, link: str) -> None:
    opened(page, link)
    press(page, "What would have fired?")
    page.wait(lambda: "Would have fired: auto once in 20,000 values (the budget allows 2 false)." in page.text())
    choose(page, "Alarms", "auto · rise")
    page.wait(lambda: "Drawn in" in page.text() and window_of(page) != (0, N))
    begin, end = window_of(page)
    assert begin < CHANGE < end < CHANGE + 2000  # the stretch around the change
    assert f"{ATTACK} question" in page.text()  # what people ask since then
    around = [2 * begin - end, 2 * end - begin]  # the line shows as much again on both sides
    page.wait(lambda: around in page.ask(RANGES))
    assert page.complaints() == []


def test_an_alarm_is_clicked_on_the_line(page: Page, link: str) -> None:
    opened(page, link)
    press(page, "What would have fired?")
    page.wait(lambda: "Would have fired: auto once in 20,000 values (the budget allows 2 false)." in page.text())
    page.wait(lambda: page.ask(MARK) is not None)
    x, y = page.ask(MARK)
    mouse(page, ("mouseMoved", x, y), ("mousePressed", x, y), ("mouseReleased", x, y))
    page.wait(lambda: window_of(page)[0] > 0)
    assert window_of(page)[0] < CHANGE
    assert page.complaints() == []


def test_a_stretch_is_drawn_across_the_line(page: Page, link: str) -> None:
    opened(page, link)
    drag(page, 0, (0.3, 0.5), (0.6, 0.5))
    page.wait(lambda: "Drawn in" in page.text() and window_of(page) != (0, N))
    assert page.complaints() == []


def test_points_that_are_chosen_show_their_rows(page: Page, link: str) -> None:
    opened(page, link)
    drag(page, 3, (0.97, 0.95), (0.03, 0.06))
    page.wait(lambda: "of the texts are chosen; their rows are below." in page.text())
    chosen = int(page.text().split(" of the texts are chosen")[0].split()[-1])
    assert 1 <= chosen <= 100  # all that are drawn of a whole stream, before which there is nothing
    assert page.complaints() == []


def test_a_single_detector_says_what_its_budget_rests_on(page: Page, link: str) -> None:
    opened(page, link)
    choose(page, "Detectors", "CUSUM")
    press(page, "What would have fired?")
    page.wait(lambda: "keeps the budget on streams drawn from the first 500 values" in page.text())
    assert "CUSUM: lambda_ " in page.text()
    assert page.complaints() == []


def test_scores_have_a_density(page: Page, link: str) -> None:
    opened(page, link)
    choose(page, "Stream", "margin")
    page.wait(lambda: "mean score" in page.text() and page.drawn_plots() >= 2, timeout_s=60)
    assert "No confidence is known here" in page.text()
    assert page.complaints() == []
