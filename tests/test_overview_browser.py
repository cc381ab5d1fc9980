"""The portal and the labelling page in headless Chromium."""

import getpass
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("panel", reason="needs the extra apps: pip install 'rlhf_workbench[apps]'")
pytest.importorskip("bokeh_fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")
pytest.importorskip("frouros", reason="needs the extra monitor: pip install 'rlhf_workbench[monitor]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'rlhf_workbench[dev]'")

from rlhf_workbench.apps.overview import format_value
from rlhf_workbench.collect.queue import add_items
from rlhf_workbench.core.schema import (
    Annotation,
    Comparison,
    Generation,
    Model,
    Prediction,
    Preference,
    Prompt,
    Proposal,
    utc_now,
)
from rlhf_workbench.monitor import model_calibration
from rlhf_workbench.monitor.drift import watch_drift
from rlhf_workbench.monitor.report import WrittenReport
from rlhf_workbench.store.registry import run_once
from rlhf_workbench.store.tables import Store, connect

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.server,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]
ATTACK = "<script>alert(1)</script>"
RLHFW = "from rlhf_workbench.cli import main; raise SystemExit(main())"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WALK = "const all = n => [...n.querySelectorAll('*')].flatMap(e => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);"


# A store with a past


def vote(store: Store, n_control: int = 60, n_after: int = 40) -> None:
    """Six annotators in two batches; the attacker turns in the second."""
    rng, start = np.random.default_rng(0), utc_now() - timedelta(days=2)
    people = {"ada": 4, "ben": 4, "cleo": 4, "dan": 3, "eve": 3, ATTACK: 4}
    rows: list[Any] = []
    for i in range(n_control + n_after):
        queue = "batch-1" if i < n_control else "batch-2"
        prompt = Prompt(text=f"question {i}", topic=str(rng.choice(["nature", "law", ATTACK])))
        first, second = (Generation(prompt_id=prompt.id, text=f"answer {i}{x}", model=ATTACK) for x in "ab")
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)
        rows += [prompt, first, second, pair]
        difference = rng.normal()
        for j, (name, slope) in enumerate(people.items()):
            is_first = (rng.random() < 1 / (1 + np.exp(-slope * difference))) != (queue == "batch-2" and name == ATTACK)
            when = start + timedelta(minutes=i, seconds=j)
            made = {"comparison_id": pair.id, "annotator_id": name, "queue": queue, "submitted_at": when}
            rows.append(Annotation(label="first" if is_first else "second", **made))
    store.append(rows)


def predict(store: Store) -> str:
    """A model that is too sure of itself; its id."""
    rng, model = (
        np.random.default_rng(1),
        Model(name=ATTACK, kind="reward", snapshot_id="s", figures={"accuracy": 0.71}),
    )
    rows: list[Any] = [model]
    for i, pair in enumerate(store.records(Comparison)):
        logit, split = rng.normal() * 1.5, "test" if i % 2 else "calibration"
        order = (
            (pair.first_id, pair.second_id)
            if rng.random() < 1 / (1 + np.exp(-logit))
            else (pair.second_id, pair.first_id)
        )
        chosen, rejected = (store.get(Generation, answer).text for answer in order)
        said = {"comparison_id": pair.id, "split": split}
        rows.append(Preference(snapshot_id="s", prompt=[], chosen=chosen, rejected=rejected, p_chosen=1.0, **said))
        rows.append(Prediction(model_id=model.id, p_first=float(1 / (1 + np.exp(-2 * logit))), **said))
    store.append(rows)
    return model.id


def name_the_attacker(store: Store, *, run_id: str, seed: int) -> dict[str, Any]:
    """A step whose figure is an attack."""
    return {ATTACK: ATTACK}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with votes, a calibrated model, an alarm and a proposal, made by the steps themselves."""
    path = tmp_path_factory.mktemp("store") / "demo.duckdb"
    with connect(path) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_calibration, "write_report", lambda *_, **__: WrittenReport({}, {}, {})
        )  # Evidently takes ten seconds
        vote(store)
        run_once(store, name_the_attacker, seed=0)
        run_once(store, model_calibration.calibrate_model, seed=0, model_id=predict(store))
        run_once(store, watch_drift, seed=0, queues=["batch-1", "batch-2"])
        store.append(Proposal(action="retrain", reason=f"drift: {ATTACK}", fingerprint="f"))
    return path


# A server and a browser


@contextmanager
def served(page: "Page", *stores: Path) -> Iterator[str]:
    """The address of a running service in which the browser is signed in."""
    words = [word for store in stores for word in ("--store", str(store))]
    command = [sys.executable, "-c", RLHFW, "serve", *words, "--port", "0", "--no-open", "--json"]
    process = subprocess.Popen(command, stdout=-1, text=True)
    assert process.stdout
    try:
        said = json.loads(process.stdout.readline())
        page.driver.get(said["link"])
        yield said["url"]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def link(page: "Page", store_path: Path) -> Iterator[str]:
    with served(page, store_path) as url:
        yield url


class Page:
    """A browser with one page open, and what a test asks of it."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, link: str, width: int = 1280) -> float:
        """Seconds until everything is drawn."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        start = time.perf_counter()
        self.driver.get(link)
        self.wait(lambda: "Waiting for a decision" in self.text() and "rlhfw approve" in self.text())
        self.wait(lambda: self.drawn_plots() == 2)
        return time.perf_counter() - start

    def wait(self, is_true: Callable[[], bool], timeout_s: float = 20) -> None:
        end = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        return self.driver.execute_script(f"{WALK} return {expression}")

    def text(self) -> str:
        """All text of the page, that of the shadow trees too."""
        trees = "all(document.body).flatMap(e => e.shadowRoot ? [...e.shadowRoot.children] : [])"
        seen = "e => /^(SCRIPT|STYLE|LINK)$/.test(e.tagName) ? '' : e.innerText"
        return " ".join(str(self.ask(f"[document.body, ...{trees}].map({seen}).join(' ')")).split())

    def drawn_plots(self) -> int:
        """Plots with more than one colour in them."""
        big = "all(document.body).filter(e => e.tagName === 'CANVAS' && e.width > 200)"
        data = "new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        return int(self.ask(f"{big}.filter(c => c.width && c.height && {data} > 20).length"))

    def complaints(self) -> list[str]:
        """Errors in the console."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def hosts(self) -> set[str]:
        """Who was asked for anything, by this page's requests and sockets."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        asked += [e["params"]["url"] for e in events if e["method"] == "Network.webSocketCreated"]
        return {url.split("/")[2].split(":")[0] for url in asked if url.startswith(("http", "ws"))}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield Page(driver)
    finally:
        driver.quit()


# The portal


def test_it_loads_with_the_stores_numbers_and_no_complaint(page: Page, link: str, store_path: Path) -> None:
    page.complaints()  # what earlier pages said
    first = page.open(link)
    again = page.open(link)
    print(f"loaded in {first:.2f} s, and again in {again:.2f} s")
    assert again < 6  # about one second on a quiet machine
    with connect(store_path) as store:
        counts = store.counts()
        figures = run_once(store, watch_drift, seed=0, queues=["batch-1", "batch-2"]).figures
        votes = store.sql("SELECT figures FROM run_end ORDER BY id")["figures"].tolist()
    text = page.text()
    for table, label in (("prompt", "Prompts"), ("generation", "Answers"), ("annotation", "Votes"), ("run", "Runs")):
        assert f"{counts[table]:,} {label}" in text
    ece = [json.loads(f).get("ece_after") for f in votes]
    assert f"{format_value(next(e for e in ece if e is not None))} with temperature" in text
    assert f"the first {figures['first_alarm']} values after the control" in text
    assert page.complaints() == []
    assert page.hosts() == {"127.0.0.1"}


def test_texts_of_strangers_are_text(page: Page, link: str) -> None:
    page.open(link)
    text = page.text()
    assert text.count(ATTACK) >= 5  # a run, its figure, a model, an alarm, a proposal
    assert (
        page.ask("all(document.body).filter(e => e.tagName === 'SCRIPT' && e.textContent === 'alert(1)').length") == 0
    )
    assert page.driver.title == "RLHF Workbench"  # an open alert would raise here


def test_a_tooltip_shows_text_too(page: Page, link: str) -> None:
    page.open(link)
    place = """(() => { const figures = [...Bokeh.documents[0]._all_models.values()].filter(m => m.type === 'Figure');
        const view = Bokeh.index.find_one(figures.find(f => f.renderers.some(r => r.glyph?.marker?.value === 'diamond')));
        const marks = view.model.renderers.find(r => r.glyph?.marker?.value === 'diamond').data_source.data;
        const box = view.canvas_view.el.getBoundingClientRect();
        const x = view.frame.x_scale.compute(marks.at[0]), y = view.frame.y_scale.compute(marks.value[0]);
        return [box.x + x, box.y + y]; })()"""
    x, y = page.ask(place)
    for shift in (3, 0):
        move = {"type": "mouseMoved", "x": x + shift, "y": y, "button": "none"}
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", move)
    page.wait(lambda: "after the control:" in page.text())
    assert f"disagreement of {ATTACK}" in page.text()
    assert page.complaints() == []


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_sticks_out(page: Page, link: str, width: int) -> None:
    page.open(link, width)
    assert page.ask("document.documentElement.scrollWidth") <= width
    cut = f"all(document.querySelector('main')).filter(e => e.getBoundingClientRect().right > {width}).length"
    assert page.ask(cut) == 0


def test_what_somebody_else_writes_appears_by_itself(page: Page, link: str, store_path: Path) -> None:
    page.open(link)
    before = page.ask("all(document.body).find(e => e.className === 'tile').textContent")
    with connect(store_path) as store:  # joins the service
        store.append(Prompt(text="one more"))
    n = int(before.split("Prompts")[0])
    page.wait(lambda: f"{n + 1} Prompts" in page.text())
    assert page.drawn_plots() == 2
    assert page.complaints() == []


def test_a_signed_out_browser_sees_the_door_and_gets_nothing_more(page: Page, store_path: Path, tmp_path: Path) -> None:
    connect(tmp_path / "own.duckdb").close()
    with served(page, tmp_path / "own.duckdb") as url:
        page.driver.get(url)
        page.wait(lambda: "rlhfw demo" in page.text())
        page.driver.delete_all_cookies()
        page.driver.get(url)
        page.wait(lambda: "Open the link that the server printed" in page.text())
        assert page.driver.current_url == f"{url}/signin?next=/"


def test_an_empty_store_says_what_to_do(page: Page, tmp_path: Path) -> None:
    page.complaints()
    connect(tmp_path / "empty.duckdb").close()
    connect(tmp_path / "other.duckdb").close()
    with served(page, tmp_path / "empty.duckdb", tmp_path / "other.duckdb") as url:
        for path in ("/", "/projects/other"):
            page.driver.get(url + path)
            page.wait(lambda: "rlhfw demo" in page.text())
            assert "Nothing has run in this store yet" in page.text()
        assert page.complaints() == []


# Labelling on a page


def test_a_person_labels_with_mouse_and_keyboard(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "label.duckdb"
    with connect(path) as store:
        for i in range(4):
            prompt = Prompt(text=f"{ATTACK} {i}")
            first, second = (Generation(prompt_id=prompt.id, text=f"{ATTACK} {x}") for x in "ab")
            store.append(
                [prompt, first, second, Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)]
            )
        add_items(store, "q", [c.id for c in store.records(Comparison)])
    page.complaints()
    with served(page, path) as url:
        page.driver.get(f"{url}/label")
        page.wait(lambda: "0 of 4 answers are there" in page.text())
        page.ask("all(document.body).find(e => e.tagName === 'A' && e.textContent === 'q').click()")
        page.wait(lambda: "You have answered 0" in page.text())
        assert f"{ATTACK} a" in page.text()
        page.ask("all(document.body).find(e => e.tagName === 'BUTTON' && /Left/.test(e.textContent)).click()")
        page.wait(lambda: "You have answered 1 " in page.text())
        body = page.driver.find_element("tag name", "body")
        for n, key in enumerate(("\ue014", "t", "s"), start=2):
            body.send_keys(key)
            page.wait(lambda n=n: f"You have answered {n} " in page.text())  # type: ignore[misc]
        page.wait(lambda: "Nothing is left for you" in page.text())
        body.send_keys("u")
        page.wait(lambda: "Answer again" in page.text())
        body.send_keys("t")
        page.wait(lambda: "the queue has 4 of 4 answers" in page.text())
        assert page.complaints() == []
        assert page.hosts() == {"127.0.0.1"}
    with connect(path) as store:
        assert [vote.label for vote in store.records(Annotation)][-2:] == ["tie", "tie"]
        assert {vote.annotator_id for vote in store.records(Annotation)} == {getpass.getuser()}
        assert store.verify().is_intact
