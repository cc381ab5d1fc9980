"""The portal's parts and the labellers, without a browser."""

import base64
import json
import random
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("panel", reason="needs the extra apps: pip install 'rlhf_workbench[apps]'")
pytest.importorskip("bokeh_fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")

from bokeh.protocol.exceptions import ProtocolError
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from rlhf_workbench.apps.annotate import LabelSession, annotate_view, label_widget, progress_text, session_html
from rlhf_workbench.apps.main import build_app
from rlhf_workbench.apps.mount import Visits
from rlhf_workbench.apps.overview import (
    TILES,
    calibration_text,
    drift_plot,
    drift_text,
    format_value,
    models_html,
    plain_label,
    read_overview,
    reliability_plot,
    runs_html,
    table_html,
    tiles_html,
    waiting_html,
)
from rlhf_workbench.apps.portal import StoreWatch, draw_parts, overview_page
from rlhf_workbench.collect.queue import add_items, next_task, submit
from rlhf_workbench.core.errors import StateError
from rlhf_workbench.core.schema import (
    RECORDS,
    Annotation,
    Comparison,
    Consensus,
    DriftEvent,
    Generation,
    Lease,
    Model,
    Prompt,
    Proposal,
    Record,
    Run,
    RunEnd,
    Snapshot,
)
from rlhf_workbench.govern.access import invite
from rlhf_workbench.govern.approval import decide
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.oidc import Person
from rlhf_workbench.serve.signin import SignIn
from rlhf_workbench.store.tables import Store, connect

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
BINS = [{"lo": 0.5, "hi": 1.0, "n": 9, "confidence": 0.8, "accuracy": 0.7, "accuracy_lo": 0.4, "accuracy_hi": 0.9}]
SERIES = {"index": [-2, -1, 0, 1], "value": [0.1, 0.2, 0.5, 0.9], "alarms": [1]}


def finished(store: Store, kind: str, figures: dict[str, Any], status: Any = "done") -> None:
    run = Run(kind=kind, key=kind, seed=0)
    store.append([run, RunEnd(run_id=run.id, status=status, figures=figures)])


def pairs(store: Store, n: int, text: str = "question") -> list[str]:
    """n comparisons; the first answer is called `good`, the second `bad`."""
    for i in range(n):
        prompt = Prompt(text=f"{text} {i}")
        first, second = (Generation(prompt_id=prompt.id, text=t) for t in ("good", "bad"))
        store.append([prompt, first, second, Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)])
    return [c.id for c in store.records(Comparison)]


# What the page reads


def test_newest_finished_run_is_shown_and_failed_ones_are_not() -> None:
    with connect(":memory:") as store:
        finished(store, "calibrate_model", {"ece_after": 0.2})
        finished(store, "calibrate_model", {"ece_after": 0.1})
        finished(store, "calibrate_model", {}, status="failed")
        view = read_overview(store)
        assert view.calibration == {"ece_after": 0.1}
        assert view.runs["status"].tolist() == ["failed", "done", "done"]
        assert 'class="status failed">failed' in runs_html(view)


def test_corrected_votes_count_once_and_decided_proposals_do_not_wait() -> None:
    with connect(":memory:") as store:
        vote = Annotation(comparison_id="c", annotator_id="ada", label="first")
        proposal, other = (Proposal(action="retrain", reason=r, fingerprint=r) for r in ("drift", "error"))
        store.append([vote, Annotation(**vars(vote) | {"id": "x", "replaces": vote.id}), proposal, other])
        decide(store, proposal.id, "rejected", reason="seasonal", actor="ada")
        view = read_overview(store)
        assert view.counts["annotation"] == 1
        assert view.waiting["id"].tolist() == [other.id]


def by_head(store: Store, table: str) -> pd.DataFrame:
    """The current rows of a table, without the truth that stands beside the votes."""
    rows = store.sql(f"SELECT * FROM {table}")
    rows = rows[~rows["id"].isin(rows["replaces"].dropna())]
    return rows if table != "annotation" else rows[~rows["queue"].fillna("").str.endswith("/truth")]


def some_records(draw: random.Random, store: Store) -> list[Record]:
    """A few of everything that has a tile, some of them corrections, written by one of the runs."""
    runs = store.sql("SELECT id FROM run")["id"].tolist()

    def one(kind: type[Record], /, **values: Any) -> Record:
        old = store.sql(f"SELECT id FROM {kind.table}")["id"].tolist()
        corrects = draw.choice(old) if old and draw.random() < 0.4 else None
        return kind(replaces=corrects, run_id=draw.choice([None, *runs]), **values)

    pick = draw.choice
    return [
        one(Prompt, text="x", topic=pick(["a", "b", None])),
        one(Generation, prompt_id="p", text="x", model=pick("mn")),
        one(Comparison, prompt_id="p", first_id="f", second_id="s", dataset=pick("de")),
        *(
            one(
                Annotation, comparison_id="c", annotator_id=pick("uvw"), label="tie", queue=pick([None, "q", "q/truth"])
            )
            for _ in range(draw.randint(1, 4))
        ),
        one(Consensus, comparison_id="c", method=pick("gh"), p_first=1, p_second=0, label="first", n_votes=1),
        one(Snapshot, name=pick("kl"), content_hash="", n_rows=1),
        one(Model, name="m", kind=pick(["reward", "policy"])),
        one(DriftEvent, stream="s", detector="d", index=0, is_confirmed=draw.random() < 0.5),
        *(one(Run, kind=pick(["train", "watch"]), key="k", seed=0) for _ in range(draw.randint(0, 2))),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_page_shows_what_counting_by_head_gives(seed: int) -> None:
    draw = random.Random(seed)
    with connect(":memory:") as store:
        for _ in range(4):
            store.append(some_records(draw, store))
            view = read_overview(store, last=3)
            current = {kind.table: by_head(store, kind.table) for kind in RECORDS}
            assert view.counts == {table: len(rows) for table, rows in current.items() if len(rows)}
            assert list(view.counts) == [kind.table for kind in RECORDS if kind.table in view.counts]
            for table, (_, column, _) in TILES.items():
                values = current[table][column]
                expected = int(values.sum()) if table == "drift_event" else values.nunique()
                assert view.details.get(table, 0) == expected, table
            assert view.runs["run_id"].tolist() == sorted(current["run"]["id"], reverse=True)[:3]
            for run_id, rows in zip(view.runs["run_id"], view.runs["rows"], strict=True):
                written = [store.sql(f"SELECT run_id FROM {k.table}")["run_id"] for k in RECORDS if k is not Run]
                assert rows == sum((ids == run_id).sum() for ids in written)


def test_an_unfinished_run_is_shown_as_such() -> None:
    with connect(":memory:") as store:
        store.append(Run(kind="train_reward", key="k", seed=0))
        assert 'class="status unfinished">unfinished' in runs_html(read_overview(store))


def test_only_the_last_runs_are_read() -> None:
    with connect(":memory:") as store:
        for i in range(30):
            finished(store, f"step_{i}", {"n": i})
        assert read_overview(store, last=5).runs["step"].tolist() == [f"step_{i}" for i in range(29, 24, -1)]


def test_the_empty_store_says_what_to_do_next() -> None:
    with connect(":memory:") as store:
        parts = draw_parts(read_overview(store))
    assert "rlhfw demo" in parts["tiles"][0]
    assert all(len(content) == 1 for content in parts.values())  # no plot


def test_texts_of_strangers_are_escaped_everywhere() -> None:
    with connect(":memory:") as store:
        store.append([Prompt(text=ATTACK, topic=ATTACK), Model(name=ATTACK, kind="reward", figures={ATTACK: ATTACK})])
        store.append([Proposal(action=ATTACK, reason=ATTACK, fingerprint="f")])
        finished(store, ATTACK, {ATTACK: ATTACK})
        finished(store, "calibrate_model", {"ece_before": ATTACK, "temperature": ATTACK})
        finished(store, "watch_drift", {"first_alarm": 3, "confirmed_streams": {ATTACK: 2}, "votes": 9})
        view = read_overview(store)
    texts = [runs_html(view), models_html(view), waiting_html(view), tiles_html(view)]
    texts += [calibration_text(view.calibration), drift_text(view.drift), table_html(view.models, {"name": ATTACK})]
    assert not [text for text in texts if "<script" in text or "<img" in text]
    assert sum("&lt;script&gt;" in text for text in texts) == 6


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (0.071234, "0.0712"), (0, "0"), (1234567, "1,234,567"), (["a"], "['a']")],
)
def test_values_are_short(value: object, shown: str) -> None:
    assert format_value(value) == shown


def test_plots_draw_what_the_figures_say() -> None:
    layers = [type(layer).__name__ for layer in reliability_plot(BINS, BINS)]
    assert layers == ["Curve", *["Curve", "ErrorBars", "Scatter"] * 2]
    plot = drift_plot({"series": {"loud": SERIES, "quiet": SERIES | {"alarms": []}}})
    assert [type(layer).__name__ for layer in plot] == ["VSpan", "Path", "Curve", "Scatter"]
    marks = list(plot)[-1]
    assert marks.dimension_values("at").tolist() == [1]
    assert marks.dimension_values("value").tolist() == [0.9]


def test_an_alarm_about_something_not_drawn_is_a_line() -> None:
    figures = {"series": {"disagreement": SERIES | {"alarms": []}}, "first_alarm": 1, "first_alarm_stream": "topic mix"}
    layers = list(drift_plot(figures))
    assert [layer.label for layer in layers if layer.label] == ["all votes", "alarm: topic mix"]
    assert layers[-1].dimension_values(0).tolist() == [1, 1]


def test_a_legend_is_no_mathematics() -> None:
    assert "$$" not in plain_label("$$\\text{x}$$")
    assert len(plain_label("x" * 200)) == 40


def test_no_alarm_is_good_news() -> None:
    figures = {"first_alarm": None, "confirmed_streams": {}, "votes": 900, "control_confirmed": 1}
    assert drift_text(figures) == "<p><b>No confirmed alarm</b>, in 900 votes; 1 false alarm in the control.</p>"


@pytest.mark.parametrize("figures", [{"reliability_before": [{"confidence": 1}]}, {"reliability_before": "text"}])
def test_figures_of_another_kind_do_not_break_the_page(figures: dict[str, Any]) -> None:
    with connect(":memory:") as store:
        finished(store, "calibrate_model", figures)
        finished(store, "watch_drift", {"series": {"a": {}}})
        parts = draw_parts(read_overview(store))
    assert "not of the kind" in parts["calibration"][1]
    assert "not of the kind" in parts["drift"][1]


# Looking again and again


def test_a_watch_reads_only_what_is_new() -> None:
    with connect(":memory:") as store:
        watch = StoreWatch(store)
        assert watch.look().counts == {}
        before = watch.look()
        assert watch.look() is before
        store.append(Prompt(text="one"))
        assert watch.look().counts == {"prompt": 1}


def test_a_store_out_of_reach_keeps_the_last_view(tmp_path: Path) -> None:
    store = connect(tmp_path / "s.duckdb")
    store.append(Prompt(text="one"))
    watch = StoreWatch(store)
    assert watch.look().notice == ""
    store.close()
    view = watch.look()
    assert view.counts == {"prompt": 1}
    assert view.notice.startswith("The store is out of reach: ")
    assert watch.look() is view
    assert overview_page(watch)
    assert "notice" in draw_parts(view)["tiles"][0]


# Serving


@pytest.fixture
def visits(store: Store) -> Iterator[Callable[[str], TestClient]]:
    """The pages of a project as somebody with a role sees them."""
    signin = SignIn({"pilot": store})
    app, _ = build_app(Service({"pilot": store}, signin), signin)

    def visit(role: str) -> TestClient:
        browser = TestClient(app, base_url=HERE, client=("127.0.0.1", 4711), follow_redirects=False)
        if role == "admin":
            browser.get(signin.one_time_link(HERE))
        elif role:
            invite(store, f"{role}@example.org", role)  # type: ignore[arg-type]
            person = Person("https://id.example", role, f"{role}@example.org")
            browser.cookies.set("rlhfw_session_5006", signin._sessions.issue(person))
        return browser

    with TestClient(app):
        yield visit


HERE = "http://127.0.0.1:5006"


def talking(browser: TestClient) -> dict[str, str]:
    """What a browser sends with a websocket; the test client forgets its base address there."""
    cookies = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    return {"host": HERE.removeprefix("http://"), "cookie": cookies}


PATHS = ("/", "/label", "/drift", "/projects/pilot", "/projects/pilot/label", "/projects/pilot/drift")


@pytest.mark.parametrize("path", PATHS)
def test_who_is_not_signed_in_is_sent_to_the_door(visits: Callable[[str], TestClient], path: str) -> None:
    answer = visits("").get(path)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/signin?next={path}")


@pytest.mark.parametrize(
    ("role", "sees"), [("admin", True), ("reviewer", True), ("auditor", True), ("annotator", False)]
)
def test_the_overview_is_for_those_who_may_read_it(visits: Callable[[str], TestClient], role: str, sees: bool) -> None:
    page = visits(role).get("/")
    assert page.status_code == 200
    title = "<title>RLHF Workbench</title>" if sees else "<title>Queues · RLHF Workbench</title>"
    assert title in page.text
    assert '"token":"' in page.text
    assert "https://" not in page.text


@pytest.mark.parametrize(
    ("role", "status"), [("admin", 200), ("researcher", 200), ("auditor", 200), ("annotator", 403), ("service", 403)]
)
def test_drift_is_for_those_who_may_read_events(visits: Callable[[str], TestClient], role: str, status: int) -> None:
    assert visits(role).get("/drift").status_code == status


def test_who_may_not_answer_gets_no_tasks(visits: Callable[[str], TestClient], store: Store) -> None:
    assert visits("reviewer").get("/label?queue=q").status_code == 403
    assert store.records(Lease) == []
    assert visits("annotator").get("/label?queue=q").status_code == 200
    assert [lease.annotator_id for lease in store.records(Lease)] == ["annotator@example.org"]


def test_the_cookie_is_not_in_the_page(visits: Callable[[str], TestClient]) -> None:
    browser = visits("admin")
    secret = next(iter(browser.cookies.values()))
    page = browser.get("/").text
    (token,) = set(re.findall(r'"token":"([^"]+)"', page))
    payload = base64.urlsafe_b64decode(token.split(".")[0] + "==")
    packed = json.loads(payload)["__bk__zlib_"]
    inside = zlib.decompress(base64.urlsafe_b64decode(packed + "==")).decode()
    assert secret not in page + inside
    assert "cookie" not in inside.lower() or '"cookies": {}' in inside


@pytest.mark.parametrize("path", PATHS)
def test_a_websocket_is_for_our_own_pages_and_visitors(visits: Callable[[str], TestClient], path: str) -> None:
    browser = visits("admin")
    (token,) = set(re.findall(r'"token":"([^"]+)"', browser.get(path).text))

    def opens(who: TestClient, origin: str | None) -> bool:
        headers = talking(who) | ({"origin": origin} if origin else {})
        try:
            with who.websocket_connect(
                f"{path.rstrip('/')}/ws", subprotocols=["bokeh", token], headers=headers
            ) as line:
                return "ACK" in line.receive_text()
        except WebSocketDisconnect:
            return False

    assert opens(browser, HERE)
    assert not opens(browser, "http://evil.example")
    assert not opens(browser, "http://127.0.0.1:8888")
    assert not opens(browser, None)
    assert not opens(visits(""), HERE)


def test_a_line_that_ended_leaves_nothing_behind(store: Store) -> None:
    signin = SignIn({"pilot": store})
    app, _ = build_app(Service({"pilot": store}, signin), signin)
    bokeh = next(m.kwargs["pages"] for m in app.user_middleware if m.cls is Visits)
    with TestClient(app, base_url=HERE, client=("127.0.0.1", 4711)) as browser:
        browser.get(signin.one_time_link(HERE))
        (token,) = set(re.findall(r'"token":"([^"]+)"', browser.get("/").text))
        headers = talking(browser) | {"origin": HERE}
        with browser.websocket_connect("/ws", subprotocols=["bokeh", token], headers=headers) as line:
            line.receive_text()
            assert len(bokeh._clients) == 1
        assert len(bokeh._clients) == 0


def test_a_stranger_makes_no_session_up(visits: Callable[[str], TestClient]) -> None:
    from bokeh.util.token import generate_jwt_token, generate_session_id

    made_up = generate_jwt_token(generate_session_id(signed=False), signed=False, expiration=300)
    browser = visits("admin")
    headers = talking(browser) | {"origin": HERE}
    with (
        pytest.raises(ProtocolError),
        browser.websocket_connect("/ws", subprotocols=["bokeh", made_up], headers=headers) as line,
    ):
        line.receive_text()


# Labelling


def clicks(shell: str, view: Any, name: str) -> None:
    if shell == "widget":
        view.buttons[name].click()
    else:
        view.buttons[name].clicks += 1


@pytest.fixture(params=["widget", "page"])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def labeller(shell: str, store: Store, who: str = "ada") -> Any:
    return (label_widget if shell == "widget" else annotate_view)(store, "q", who)


@pytest.fixture
def store() -> Iterator[Store]:
    with connect(":memory:") as opened:
        add_items(opened, "q", pairs(opened, 3))
        yield opened


def test_what_is_clicked_is_stored_in_the_comparisons_order(shell: str, store: Store) -> None:
    view = labeller(shell, store)
    while view.session.task:
        clicks(shell, view, "left" if view.session.task.left == "good" else "right")
    votes = store.records(Annotation)
    assert [v.label for v in votes] == ["first"] * 3
    assert all(v.annotator_id == "ada" and v.seconds is not None and v.reason is None for v in votes)
    assert all(view.buttons[name].disabled for name in ("left", "tie", "right", "skip"))
    assert "Nothing is left" in session_html(view.session)


def test_the_last_answer_can_be_taken_back_also_at_the_end(shell: str, store: Store) -> None:
    view = labeller(shell, store)
    assert view.buttons["undo"].disabled
    view.reason.value = "clear"
    for name in ("left", "tie", "skip", "undo", "undo", "undo"):
        clicks(shell, view, name)
    assert view.buttons["undo"].disabled
    assert view.reason.value == "clear"
    view.reason.value = "on second thoughts"
    clicks(shell, view, "right")
    assert view.session.task is None  # the other two keep their answers
    assert view.reason.value == ""
    first, *rest = sorted(store.records(Annotation), key=lambda a: a.comparison_id)
    assert first.reason == "on second thoughts"
    assert [a.label for a in rest] == ["tie", "skip"]
    assert store.sql("SELECT count(*) AS n FROM annotation")["n"][0] == 4
    assert progress_text(view.session) == "You have answered 3 · the queue has 2 of 3 answers"


def test_undo_in_the_middle_gives_the_held_task_back(shell: str, store: Store) -> None:
    view = labeller(shell, store)
    clicks(shell, view, "left")
    held = view.session.task
    clicks(shell, view, "undo")
    clicks(shell, view, "tie")
    assert view.session.task.lease_id == held.lease_id


def test_the_texts_are_escaped(shell: str) -> None:
    with connect(":memory:") as store:
        prompt = Prompt(text="x", messages=[{"role": ATTACK, "content": ATTACK}])
        first, second = (Generation(prompt_id=prompt.id, text=ATTACK) for _ in range(2))
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)
        store.append([prompt, first, second, pair])
        add_items(store, "q", [pair.id])
        shown = session_html(labeller(shell, store).session)
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count("&lt;script&gt;") == 4


def test_an_answer_whose_place_was_given_away_is_explained(store: Store) -> None:
    session = LabelSession(store, "q", "ada")
    assert session.task
    lapsed = next_task(store, "q", "ben", lease_s=-1)
    assert lapsed
    session.task = lapsed  # ada's screen shows a task whose lease has lapsed
    taken = next_task(store, "q", "cleo")
    assert taken
    assert taken.comparison_id == lapsed.comparison_id
    submit(store, taken.lease_id, "tie")
    assert session.answer("left") is None
    assert "could not count" in session.notice
    assert "given away" in session_html(session)
    assert session.task
    assert not session.can_undo


def test_two_people_label_at_once(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        add_items(store, "q", pairs(store, 20), overlap=1)

        def work(who: str) -> None:
            session = LabelSession(store, "q", who)
            while session.task:
                session.answer("tie")

        workers = [threading.Thread(target=work, args=(who,)) for who in ("ada", "ben", "cleo")]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        votes = store.records(Annotation)
        assert len(votes) == len({v.comparison_id for v in votes}) == 20
        assert store.verify().is_intact


def test_nothing_left_and_nothing_to_undo_are_errors(store: Store) -> None:
    session = LabelSession(store, "empty", "ada")
    with pytest.raises(StateError, match="nothing left for ada"):
        session.answer("left")
    with pytest.raises(StateError, match="no answer to take back"):
        session.undo()
