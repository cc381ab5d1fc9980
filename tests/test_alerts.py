"""An alert is raised once a cause, moves only forward, and says who moved it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.schema import Alert, DriftEvent, Proposal, Run
from rlhf_workbench.govern.alerts import acknowledge, open_alerts, present_alert, raise_alert, resolve
from rlhf_workbench.govern.approval import decide
from rlhf_workbench.govern.triggers import propose_retraining
from rlhf_workbench.store.tables import Store, connect


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with connect(tmp_path / "s.duckdb", actor="tester") as opened:
        yield opened


def _drift(store: Store, run_id: str, *events: DriftEvent) -> dict[str, object]:
    store.append(Run(id=run_id, kind="watch_drift", key="", seed=0, params={"queue": "q"}))
    store.append(list(events))
    return propose_retraining(store, run_id=f"t-{run_id}", seed=0, drift_run=run_id)


def _event(run_id: str, stream: str = "Eve", is_confirmed: bool = True, **metadata: str) -> DriftEvent:
    return DriftEvent(
        stream=stream, detector="DDM", index=1, is_confirmed=is_confirmed, run_id=run_id, metadata=metadata
    )


def test_confirmed_drift_raises_one_alert_that_names_its_event(store: Store) -> None:
    false_alarm, true_alarm = _event("a", "other", period="control"), _event("a")
    found = _drift(store, "a", false_alarm, true_alarm)
    _drift(store, "b", _event("b"))
    (alert,) = open_alerts(store)
    assert (alert.title, alert.severity) == ("Confirmed drift in Eve", "warning")
    assert (alert.source_id, alert.run_id) == (true_alarm.id, "t-a")
    assert str(found["proposal_id"]) in alert.text


def test_unconfirmed_drift_and_false_alarms_raise_none(store: Store) -> None:
    _drift(store, "a", _event("a", is_confirmed=False), _event("a", period="control"))
    assert store.counts().get("alert", 0) == 0


def test_a_rejected_cause_raises_no_second_alert_after_the_first_is_resolved(store: Store) -> None:
    proposal = str(_drift(store, "a", _event("a"))["proposal_id"])
    resolve(store, open_alerts(store)[0].id, actor="ada", reason="she left")
    decide(store, proposal, "rejected", reason="she left", actor="ada")
    _drift(store, "b", _event("b"))
    assert open_alerts(store) == []
    assert len(store.records(Proposal)) == 1


STEPS = st.lists(st.tuples(st.sampled_from(["raise", "ack", "resolve"]), st.sampled_from("abc")), max_size=25)


@settings(max_examples=20, deadline=None)
@given(steps=STEPS)
def test_whatever_happens_one_alert_a_cause_stands_and_none_moves_back(steps: list[tuple[str, str]]) -> None:
    with connect(":memory:") as store:
        state: dict[str, str] = {}
        first_ids: dict[str, str] = {}
        for step, cause in steps:
            if step == "raise":
                alert = raise_alert(store, "info", cause, fingerprint=cause)
                if state.get(cause, "resolved") == "resolved":
                    state[cause], first_ids[cause] = "open", alert.id
            elif cause in state:
                expected = {"ack": "acknowledged", "resolve": "resolved"}[step]
                allowed = state[cause] != "resolved" and state[cause] != expected
                move = acknowledge if step == "ack" else resolve
                if allowed:
                    move(store, first_ids[cause], actor="ada", reason="so")
                    state[cause] = expected
                else:
                    with pytest.raises(StateError):
                        move(store, first_ids[cause], actor="bob", reason="so")
        standing = sorted((alert.fingerprint, alert.status) for alert in open_alerts(store))
        assert standing == sorted((cause, now) for cause, now in state.items() if now != "resolved")
        assert all(present_alert(store, first_ids[cause]).status == now for cause, now in state.items())
        assert store.verify().is_intact


def test_every_id_of_an_alert_names_it_and_history_stays(store: Store) -> None:
    first = raise_alert(store, "critical", "disk", fingerprint="d")
    second = acknowledge(store, first.id, actor="ada")
    third = resolve(store, first.id, actor="bob", reason="bigger disk")
    assert {present_alert(store, one.id).id for one in (first, second, third)} == {third.id}
    assert (third.metadata["acknowledged"]["by"], third.metadata["resolved"]["reason"]) == ("ada", "bigger disk")
    assert store.get(Alert, first.id).status == "open"


def test_mistakes_are_named(store: Store) -> None:
    alert = raise_alert(store, "info", "x")
    with pytest.raises(InputError, match="needs a title"):
        raise_alert(store, "info", "  ")
    with pytest.raises(InputError, match="needs a reason"):
        resolve(store, alert.id, actor="ada", reason=" ")
    with pytest.raises(MissingError, match="no alert nobody"):
        acknowledge(store, "nobody", actor="ada")
    with pytest.raises(InputError, match="severity"):
        raise_alert(store, "loud", "x")  # type: ignore[arg-type]


def test_many_threads_raise_one(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: raise_alert(store, "info", "same", fingerprint="f").id, range(40)))
    assert len(found) == 1
    assert store.counts()["alert"] == 1


def test_the_urgent_come_first(store: Store) -> None:
    taken = raise_alert(store, "critical", "critical, taken")
    for severity in ("info", "warning", "critical"):
        raise_alert(store, severity, severity)  # type: ignore[arg-type]
    acknowledge(store, taken.id, actor="ada")
    assert [alert.title for alert in open_alerts(store)] == ["critical", "critical, taken", "warning", "info"]
