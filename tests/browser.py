"""A running service and a headless Chromium, for tests that look at pages."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_workbench.core.schema import Comparison, Generation, Prompt

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'rlhf_workbench[dev]'")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
RLHFW = "from rlhf_workbench.cli import main; raise SystemExit(main())"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WALK = "const all = n => [...n.querySelectorAll('*')].flatMap(e => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);"
NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.server,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]


def asked(questions: Sequence[str]) -> list[Any]:  # a prompt, two answers and their comparison each
    """Pairs of answers that a page can show."""
    rows: list[Any] = []
    for i, question in enumerate(questions):
        prompt = Prompt(text=question)
        first, second = (Generation(prompt_id=prompt.id, text=f"answer {i} {x}") for x in "ab")
        rows += [prompt, first, second, Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)]
    return rows


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


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A fresh browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield Page(driver)
    finally:
        driver.quit()


def window_of(page: Page) -> tuple[int, int]:
    """From where to where the drift page says that it looks."""
    found = re.search(r"Values ([\d,]+) to ([\d,]+) of", page.text())
    assert found, page.text()
    begin, end = (int(number.replace(",", "")) for number in found.groups())
    return begin, end


def columns(page: Page, name: str) -> list[dict[str, Any]]:
    """What is drawn: the data of all glyphs that have a column of this name."""
    found: list[dict[str, Any]] = page.ask(
        f"""Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.renderers && m.x_range)
        .flatMap(m => m.renderers).map(r => r.data_source).filter(s => s && s.columns().includes({name!r}))
        .map(s => Object.fromEntries(s.columns().map(c => [c, [...s.get_column(c)]])))"""
    )
    return found


def choose(page: Page, label: str, text: str) -> None:
    """Choose in the list under a label, as a person does."""
    page.ask(
        f"""(() => {{ const list = all(document.body).filter(e => e.tagName === 'SELECT')
        .find(e => e.getRootNode().textContent.includes({label!r}));
        const one = [...list.options].find(o => o.textContent.includes({text!r}));
        [...list.options].forEach(o => {{ o.selected = o === one }});
        list.dispatchEvent(new Event('change')); }})()"""
    )


def press(page: Page, label: str) -> None:
    page.ask(f"all(document.body).find(e => e.tagName === 'BUTTON' && e.textContent.includes({label!r})).click()")


def place_of(page: Page, plot: int, share: tuple[float, float]) -> tuple[float, float]:
    """Where in the window a place of a plot is, given as shares of its width and height."""
    left, top, width, height = page.ask(
        f"""(() => {{ const plot = all(document.body).filter(e => e.classList && e.classList.contains('bk-Canvas'))[{plot}];
        plot.scrollIntoView({{block: 'center'}}); const r = plot.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }})()"""
    )
    return left + share[0] * width, top + share[1] * height


def drag(page: Page, plot: int, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw with the mouse on a plot, from one place to another, as `place_of` takes them."""
    middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2)
    steps = (("mousePressed", begin), ("mouseMoved", middle), ("mouseMoved", end), ("mouseReleased", end))
    mouse(page, *((kind, *place_of(page, plot, share)) for kind, share in steps))


def mouse(page: Page, *steps: tuple[str, float, float]) -> None:
    """What a mouse does, where in the window."""
    for kind, x, y in steps:
        event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def outside(page: Page, name: str) -> list[tuple[float, float]]:
    """Points of the glyphs with a column of this name that lie outside of their axes, and so are not seen."""
    found: list[tuple[float, float]] = page.ask(
        f"""Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.renderers && m.x_range)
        .flatMap(m => m.renderers.filter(r => r.data_source?.columns().includes({name!r}) && r.glyph.x?.field)
        .flatMap(r => [...r.data_source.get_column(r.glyph.x.field)].map((x, i) => [x, r.data_source.get_column(r.glyph.y.field)[i]])
        .filter(([x, y]) => x < m.x_range.start || x > m.x_range.end || y < m.y_range.start || y > m.y_range.end)))"""
    )
    return found
