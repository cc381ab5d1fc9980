"""Every event reaches every webhook that wants it, signed, whatever the receiver or the machine does."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from receiver import LOOPBACK, Receiver
from standardwebhooks import Webhook as Verifier

from rlhf_workbench.cli import main
from rlhf_workbench.core.errors import DeniedError, InputError, MissingError, StateError
from rlhf_workbench.core.schema import (
    PRIVATE,
    RECORDS,
    Alert,
    Annotation,
    Delivery,
    Member,
    Prompt,
    Rating,
    Record,
    Token,
    Webhook,
    new_id,
    utc_now,
)
from rlhf_workbench.govern import dispatch
from rlhf_workbench.govern.alerts import open_alerts, raise_alert
from rlhf_workbench.govern.delivery import (
    MAX_IDS,
    SCHEDULE_S,
    after_attempt,
    attempt,
    deliver_due,
    due_deliveries,
    queue_events,
    replay,
    send_test,
    sender,
)
from rlhf_workbench.govern.dispatch import Dispatcher, delivery_counts
from rlhf_workbench.govern.outbound import Answer
from rlhf_workbench.govern.webhooks import (
    EVENTS,
    MAX_WEBHOOKS,
    add_webhook,
    endpoints,
    find_endpoint,
    revoke_webhook,
    rotate_secret,
    signed_headers,
)
from rlhf_workbench.store.tables import Store, connect

SEND = sender(LOOPBACK, timeout_s=20)
IMPATIENT = sender(LOOPBACK, timeout_s=0.3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with connect(tmp_path / "pilot.duckdb", actor="tester") as opened:
        yield opened


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as one:
        yield one
        assert one.wrong == []


def _listen(store: Store, receiver: Receiver, *events: str) -> Webhook:
    """Add a webhook for the receiver, which knows its secret from now on."""
    made = add_webhook(store, receiver.url, events or ["prompt.created"], rules=LOOPBACK)
    receiver.secret = made.secret
    return made


def _states(store: Store) -> list[tuple[int, str]]:
    return [(one.attempt, one.status) for one in store.records(Delivery)]


def test_a_failing_receiver_gets_the_same_event_until_it_takes_it(store: Store, receiver: Receiver) -> None:
    _listen(store, receiver)
    receiver.plan = [500, 503, 500, 200]
    store.append(Prompt(text="marker of a person"))
    now, draw = utc_now(), random.Random(7).random
    for n, longest in enumerate(SCHEDULE_S[:3], start=1):
        (row,) = deliver_due(store, now, send=SEND, draw=draw)
        assert (row.attempt, row.status) == (n, "failed")
        assert now <= row.next_at <= now + timedelta(seconds=longest)
        assert deliver_due(store, row.next_at - timedelta(microseconds=1), send=SEND) == [], "it came too early"
        now = row.next_at
    assert [row.status for row in deliver_due(store, now, send=SEND)] == ["delivered"]
    assert deliver_due(store, now + timedelta(days=9), send=SEND) == []
    assert len(receiver.got) == 4
    assert len({message.event_id for message in receiver.got}) == 1
    assert "marker" not in json.dumps([message.payload for message in receiver.got])
    attempts = store.sql("SELECT attempt, response_code FROM delivery ORDER BY id").astype(object)
    assert attempts.where(attempts.notna(), 0).values.tolist() == [[0, 0], [1, 500], [2, 503], [3, 500], [4, 200]]
    assert store.verify().is_intact


def test_the_message_is_what_is_documented(store: Store, receiver: Receiver) -> None:
    _listen(store, receiver, "annotation.created")
    first = Annotation(comparison_id="c", annotator_id="ada", label="first", reason="marker")
    store.append(first)
    second = replace(first, id=new_id(), replaces=first.id, label="tie")
    store.append(second)
    assert [row.status for row in deliver_due(store, utc_now(), send=SEND)] == ["delivered"] * 2
    data = [message.payload["data"] for message in receiver.got]
    assert data[0] == {
        **{"project": "pilot", "table": "annotation", "seq": 2, "ids": [first.id], "n_rows": 1, "replaces": {}},
    }
    assert (data[1]["ids"], data[1]["replaces"]) == ([second.id], {second.id: first.id})
    assert {message.payload["type"] for message in receiver.got} == {"annotation.created"}
    assert datetime.fromisoformat(receiver.got[0].payload["timestamp"]).tzinfo


def test_a_bulk_of_rows_is_one_message_with_some_ids(store: Store, receiver: Receiver) -> None:
    _listen(store, receiver)
    ids = store.append([Prompt(text="x") for _ in range(MAX_IDS + 70)])
    deliver_due(store, utc_now(), send=SEND)
    (message,) = receiver.got
    assert message.payload["data"]["ids"] == ids[:MAX_IDS]
    assert message.payload["data"]["n_rows"] == MAX_IDS + 70


@pytest.mark.parametrize(
    ("act", "code", "error"),
    [
        ("hang", None, "no answer within 0.3 s"),
        ("drip", None, "no answer within 0.3 s"),
        ("reset", None, "the connection broke off (ReadError)"),
        ("garbage", None, "the connection broke off (RemoteProtocolError)"),
        ((301, {"Location": "/elsewhere"}), 301, "HTTP 301"),
        (403, 403, "HTTP 403"),
    ],
)
def test_a_failure_is_written_down_and_tried_again(
    act: Any, code: int | None, error: str, store: Store, receiver: Receiver
) -> None:
    _listen(store, receiver)
    receiver.plan = [act]
    store.append(Prompt(text="x"))
    (row,) = deliver_due(store, utc_now(), send=IMPATIENT)
    assert (row.status, row.response_code, row.error) == ("failed", code, error)
    assert [row.status for row in deliver_due(store, row.next_at, send=SEND)] == ["delivered"]
    assert [message.path for message in receiver.got] == [receiver.path] * 2


def test_gone_switches_the_webhook_off(store: Store, receiver: Receiver) -> None:
    hook = _listen(store, receiver, "prompt.created", "alert.created")
    store.append([Prompt(text="one"), Alert(severity="info", title="two")])
    receiver.plan = [410]
    deliver_due(store, utc_now(), send=SEND)
    store.append(Prompt(text="three"))
    deliver_due(store, utc_now() + timedelta(days=1), send=SEND)
    assert len(receiver.got) == 2, "it went on after 410"
    assert not find_endpoint(store, hook.id).is_active
    assert [alert.title for alert in open_alerts(store)] == ["A webhook was switched off", "two"]
    with pytest.raises(StateError, match="switched off"):
        replay(store, store.records(Delivery)[0].id)


def test_what_waits_for_a_revoked_webhook_is_dead_and_never_sent(store: Store, receiver: Receiver) -> None:
    hook = _listen(store, receiver)
    store.append(Prompt(text="x"))
    queue_events(store)
    revoke_webhook(store, hook.id)
    (row,) = deliver_due(store, utc_now(), send=SEND)
    assert (row.status, row.error, row.next_at) == ("dead", "the webhook is switched off", None)
    assert receiver.got == []


def test_patience_is_kept_for_all_messages_of_that_receiver_and_of_no_other(store: Store, receiver: Receiver) -> None:
    with Receiver() as other:
        _listen(store, receiver)
        _listen(store, other)
        receiver.plan = [(429, {"Retry-After": "3600"})]
        store.append(Prompt(text="one"))
        now = utc_now()
        deliver_due(store, now, send=SEND)
        store.append(Prompt(text="two"))
        deliver_due(store, now + timedelta(seconds=3599), send=SEND)
        assert (len(receiver.got), len(other.got)) == (1, 2)
        (held,) = store.records(Delivery, status="failed")
        assert held.next_at == now + timedelta(hours=1)
        assert held.error == "HTTP 429, Retry-After 3600 s"
        deliver_due(store, now + timedelta(seconds=3601), send=SEND)
        assert (len(receiver.got), len(other.got)) == (3, 2)
        assert other.wrong == []


def test_after_the_last_attempt_it_is_dead_and_can_be_replayed(store: Store, receiver: Receiver) -> None:
    hook = _listen(store, receiver)
    receiver.plan = [500] * (len(SCHEDULE_S) + 1)
    store.append(Prompt(text="x"))
    now = utc_now()
    for _ in range(30):
        for row in deliver_due(store, now, send=SEND):
            now = row.next_at or now
    assert _states(store) == [(10, "dead")]
    assert len(receiver.got) == 10
    (alert,) = open_alerts(store)
    assert (alert.title, alert.source_id) == ("A webhook cannot be reached", store.records(Delivery)[0].id)
    first_row = str(store.sql("SELECT id FROM delivery ORDER BY id")["id"][0])
    (again,) = replay(store, first_row)
    assert (again.attempt, again.status, again.error, again.response_code) == (0, "waiting", None, None)
    with pytest.raises(StateError, match="is waiting"):
        replay(store, first_row)
    assert [row.status for row in deliver_due(store, utc_now(), send=SEND)] == ["delivered"]
    assert len({message.event_id for message in receiver.got}) == 1
    assert delivery_counts(store) == {hook.id: {"delivered": 1}}


def test_replay_since_takes_the_dead_and_on_request_the_delivered(store: Store) -> None:
    hook = add_webhook(store, "https://one.example/", ["prompt.created"])
    other = add_webhook(store, "https://two.example/", ["prompt.created"])
    store.append(Prompt(text="old"))
    deliver_due(store, utc_now(), send=lambda *_: Answer(204))
    middle = utc_now()
    store.append(Prompt(text="new"))
    for row in deliver_due(store, utc_now(), send=lambda *_: Answer(410, "HTTP 410") if "one" in _[0] else Answer(204)):
        assert row.status == ("dead" if row.webhook_id == hook.id else "delivered")
    assert replay(store, since=middle) == [], "the dead one's webhook is switched off"
    assert [one.webhook_id for one in replay(store, since=middle, also_delivered=True)] == [other.id]
    assert replay(store, since=middle, also_delivered=True, webhook_id=other.id) == [], "it waits already"
    with pytest.raises(InputError, match="not both"):
        replay(store)
    with pytest.raises(MissingError, match="no webhook nobody"):
        replay(store, since=middle, webhook_id="nobody")


DUE = datetime(2026, 1, 1, tzinfo=UTC)
CODES = st.sampled_from([None, 200, 204, 302, 400, 408, 410, 429, 500, 503])


@given(codes=st.lists(CODES, max_size=14), luck=st.floats(0, 1), waits=st.none() | st.integers(0, 10**6).map(str))
def test_every_wait_is_within_the_schedule_and_every_way_ends(
    codes: list[int | None], luck: float, waits: str | None
) -> None:
    row, ended = Delivery(webhook_id="w", event_id="e", event="x", status="waiting"), False
    for n, code in enumerate(codes, start=1):
        ok = code is not None and code < 300
        row = after_attempt(row, Answer(code, None if ok else "wrong", waits), DUE, lambda: luck)
        ended = ok or code == 410 or n > len(SCHEDULE_S)
        assert row.status == ("delivered" if ok else "dead" if ended else "failed")
        assert (row.next_at is None) == ended
        if row.next_at:
            longest = min(float(waits), 86400) if waits and waits != "0" else SCHEDULE_S[n - 1]
            assert DUE <= row.next_at <= DUE + timedelta(seconds=longest)
        if ended:
            return


MAKERS: dict[str, Any] = {
    "prompt": lambda: Prompt(text="x"),
    "rating": lambda: Rating(generation_id="g", annotator_id="a", value=1.0),
    "alert": lambda: Alert(severity="info", title="x"),
    "member": lambda: Member(subject="ada@example.org", role="admin"),
    "token": lambda: Token(name="t", role="admin", secret_hash="h"),
    "delivery": lambda: Delivery(webhook_id="gone", event_id="e", event="x", status="delivered"),
}
WRITES = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(MAKERS)), min_size=1, max_size=3), st.booleans()), max_size=8
)


@settings(max_examples=12, deadline=None)
@given(writes=WRITES, limit=st.integers(1, 5), hinted=st.booleans())
def test_each_webhook_is_told_once_of_what_it_wants_in_order(
    writes: list[tuple[list[str], bool]], limit: int, hinted: bool
) -> None:
    with connect(":memory:") as store:
        wanted = {"": (), "p": ("prompt.created",), "ra": ("rating.created", "alert.created"), "*": ("*",)}
        hooks = {add_webhook(store, f"https://{n}.example/", e).id: set(e) for n, e in enumerate(wanted.values())}
        seen: int | None = None
        for names, look in writes:
            store.append([MAKERS[name]() for name in names])
            if look:
                seen = queue_events(store, seen if hinted else None, limit)
        late = add_webhook(store, "https://late.example/").id
        while seen != (seen := queue_events(store, seen if hinted else None, limit)):
            pass
        queue_events(store, 0)  # as a second dispatcher would that knows nothing of the first
        log = store.sql("SELECT seq, table_name FROM audit WHERE table_name NOT IN ('delivery', 'webhook', 'token')")
        for hook, events in hooks.items():
            told = [d.payload["data"]["seq"] for d in store.records(Delivery, webhook_id=hook)]
            free = not events or "*" in events
            assert told == [s for s, t in log.itertuples(index=False) if free or f"{t}.created" in events]
        assert store.records(Delivery, webhook_id=late) == []
        assert store.verify().is_intact


def test_the_list_of_events_is_every_table_without_secrets() -> None:
    hidden = {kind.table for kind in (*PRIVATE, Delivery)}
    assert {event.removesuffix(".created") for event in EVENTS} == {kind.table for kind in RECORDS} - hidden


def test_during_a_rotation_both_secrets_are_good_and_later_only_the_new(store: Store, receiver: Receiver) -> None:
    old = _listen(store, receiver)
    new = rotate_secret(store, old.id)
    newest = rotate_secret(store, new.id)
    store.append(Prompt(text="x"))
    for secret in (old.secret, new.secret, newest.secret):
        receiver.secret = secret
        deliver_due(store, utc_now(), send=SEND)
        replay(store, store.records(Delivery)[0].id)
    assert (len(receiver.got), receiver.wrong) == (3, [])
    later = endpoints(store, utc_now() + timedelta(hours=24, seconds=1))
    assert [one.secrets for one in later] == [(newest.secret,)]
    body = b'{"type":"x"}'
    headers = signed_headers(later[0].secrets, "evt_1", body, utc_now())
    assert headers["webhook-signature"].count("v1,") == 1
    with pytest.raises(Exception, match="No matching signature"):
        Verifier(old.secret).verify(body, headers)


def test_a_change_of_one_byte_or_id_or_time_breaks_the_signature() -> None:
    secret = "whsec_" + "YWJj" * 8
    body = b'{"type":"x"}'
    headers = signed_headers([secret], "evt_1", body, utc_now())
    assert Verifier(secret).verify(body, headers) == {"type": "x"}
    later = str(int(headers["webhook-timestamp"]) + 1)
    for spoiled in ({"webhook-id": "evt_2"}, {"webhook-timestamp": later}, {"webhook-signature": "v1,AAAA"}):
        with pytest.raises(Exception, match="signature"):
            Verifier(secret).verify(body, headers | spoiled)
    with pytest.raises(Exception, match="signature"):
        Verifier(secret).verify(body.replace(b"x", b"y"), headers)


def test_there_is_a_limit_of_webhooks(store: Store) -> None:
    made = [add_webhook(store, f"https://a.example/{n}") for n in range(MAX_WEBHOOKS)]
    with pytest.raises(StateError, match="revoke one"):
        add_webhook(store, "https://a.example/more")
    rotate_secret(store, made[3].id)
    revoke_webhook(store, made[0].id)
    add_webhook(store, "https://a.example/more")
    assert len({one.secret for one in store.records(Webhook)}) == MAX_WEBHOOKS + 1


def test_two_senders_at_once_write_one_outcome(store: Store) -> None:
    hook = add_webhook(store, "https://a.example/", ["prompt.created"])
    store.append(Prompt(text="x"))
    queue_events(store)
    (row,) = due_deliveries(store, utc_now())
    endpoint, both = find_endpoint(store, hook.id), threading.Barrier(2)

    def send(*_: object) -> Answer:
        both.wait(30)
        return Answer(500, "HTTP 500")

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: attempt(store, row, endpoint, send=send), range(2)))
    assert done[0].id == done[1].id
    assert _states(store) == [(1, "failed")]


def test_a_receiver_that_hangs_delays_only_itself(store: Store, receiver: Receiver) -> None:
    with Receiver(plan=["hang"] * 100) as stuck:
        _listen(store, stuck)
        _listen(store, receiver)
        with Dispatcher(store, send=SEND, poll_s=0.02, parallel=2, seed=1):
            for n in range(20):
                store.append(Prompt(text=str(n)))
            receiver.wait_for(lambda got: len({message.event_id for message in got}) == 20)
            stuck.wait_for(lambda got: len(got) == 2)
            assert not stuck.release.is_set()
            stuck.release.set()
        assert len(stuck.got) <= 2 + 20
        assert stuck.wrong == []


def test_a_dispatcher_in_single_file_keeps_the_order_and_loses_nothing(store: Store, receiver: Receiver) -> None:
    _listen(store, receiver, "*")
    with Dispatcher(store, send=SEND, poll_s=0.02, parallel=1, seed=1), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: store.append([Prompt(text=str(n)), Alert(severity="info", title="x")]), range(30)))
        receiver.wait_for(lambda got: len({message.seq for message in got}) == 60)
    seqs = [message.seq for message in receiver.got]
    assert seqs == sorted(set(seqs)), "out of order, or told twice without need"
    assert {status for _, status in _states(store)} == {"delivered"}


def test_what_cannot_be_written_down_is_not_sent_again_and_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, told = [], threading.Event()

    def send(url: str, *_: object) -> Answer:
        sent.append(url)
        if sum("good" in one for one in sent) == 5:
            told.set()
        return Answer(204)

    for name in ("bad", "good"):
        add_webhook(store, f"https://{name}.example/", ["prompt.created"])
    bad = endpoints(store)[0].id
    append = Store.append

    def full_disk(self: Store, records: Record | list[Record]) -> list[str]:
        if isinstance(records, Delivery) and records.webhook_id == bad:
            raise OSError(28, "No space left on device")
        return append(self, records)

    monkeypatch.setattr(Store, "append", full_disk)
    with Dispatcher(store, send=send, poll_s=0.01, parallel=1):
        for n in range(5):
            store.append(Prompt(text=str(n)))
        assert told.wait(60)
    assert sum("bad" in one for one in sent) == 1


CHILD = """
import sys
from ipaddress import ip_network
from rlhf_workbench.core.schema import Annotation, Prompt
from rlhf_workbench.govern.delivery import sender
from rlhf_workbench.govern.dispatch import Dispatcher
from rlhf_workbench.govern.outbound import SendRules
from rlhf_workbench.store.tables import connect

rules = SendRules(networks=(ip_network("127.0.0.0/8"),), ports=frozenset(), allow_http=True)
store = connect(sys.argv[1])
Dispatcher(store, send=sender(rules), poll_s=0.01, parallel=2, seed=0).start()
while True:
    store.append([Prompt(text="x"), Annotation(comparison_id="c", annotator_id="a", label="tie")])
"""


def test_a_killed_dispatcher_loses_nothing(tmp_path: Path, receiver: Receiver) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        _listen(store, receiver)
    lot = random.Random(3)
    for _ in range(4):
        before = len(receiver.got)
        receiver.plan = [lot.choice([204, 204, 500, "reset"]) for _ in range(400)]
        enough = before + lot.randrange(1, 25)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], env=os.environ | {"RLHFW_THREADS": "1"}
        ) as child:
            try:
                receiver.wait_for(lambda got, enough=enough: len(got) >= enough)
            finally:
                child.send_signal(signal.SIGKILL)
    receiver.plan = []
    with connect(path) as store:
        now = utc_now() + timedelta(days=1)
        while deliver_due(store, now, send=SEND):
            pass
        log = store.sql("SELECT seq, hash FROM audit WHERE table_name = 'prompt'")
        expected = {seq: f"evt_{name[:32]}" for seq, name in log.itertuples(index=False)}
        assert len(expected) > 10
        assert {message.seq: message.event_id for message in receiver.got} == expected
        assert len({(message.seq, message.event_id) for message in receiver.got}) == len(expected)
        assert {status for _, status in _states(store)} == {"delivered"}
        assert store.verify().is_intact


def test_secrets_are_in_no_log_and_no_failure(
    store: Store, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    old = _listen(store, receiver)
    new = rotate_secret(store, old.id)
    receiver.plan = [500, 204]
    store.append(Prompt(text="x"))
    queue_events(store)
    with Dispatcher(store, send=SEND, poll_s=0.02):
        receiver.wait_for(lambda got: len(got) == 1)
    send_test(store, old.id, send=SEND)
    deliver_due(store, utc_now() + timedelta(days=1), send=SEND)
    rows = store.sql("SELECT * FROM delivery").to_json() + store.sql("SELECT * FROM alert").to_json()
    said = caplog.text + rows + repr(endpoints(store)) + repr(store.records(Webhook))
    assert "webhook" in caplog.text
    for secret in (old.secret, new.secret):
        assert secret.removeprefix("whsec_") not in said
    assert receiver.url not in caplog.text


def _run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """What a command prints for programs, and everything that it prints."""
    assert main([*words, "--json"]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if out else {}), out + err


def test_the_commands_from_add_to_revoke_show_the_secret_once(
    tmp_path: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ALLOW": "127.0.0.0/8", "PORTS": str(receiver.port), "HTTP": "1"}.items():
        monkeypatch.setenv(f"RLHFW_WEBHOOK_{name}", value)
    monkeypatch.setenv("RLHFW_STORE", str(tmp_path / "s.duckdb"))
    connect(tmp_path / "s.duckdb").close()
    made, _ = _run(capsys, "webhook", "add", receiver.url, "--event", "prompt.created", "--as", "ada")
    receiver.secret = made["secret"]
    others = []
    tested, said = _run(capsys, "webhook", "test", made["id"])
    assert (tested["status"], len(receiver.got)) == ("delivered", 1)
    receiver.plan = [500]
    others += [said, _run(capsys, "webhook", "test", made["id"], code=1)[1]]
    rotated, _ = _run(capsys, "webhook", "rotate", made["id"])
    assert rotated["id"] == made["id"]
    listed, said = _run(capsys, "webhook", "list")
    assert [(one["id"], one["delivered"], one["dead"]) for one in listed["webhooks"]] == [(made["id"], 1, 1)]
    dead, more = _run(capsys, "webhook", "log", "--status", "dead", "--webhook", made["id"])
    assert [one["error"] for one in dead["deliveries"]] == ["HTTP 500"]
    queued, again = _run(capsys, "webhook", "replay", dead["deliveries"][0]["id"])
    assert len(queued["queued"]) == 1
    since, _ = _run(capsys, "webhook", "replay", "--since", "2020-01-01", "--delivered")
    assert len(since["queued"]) == 1
    _, gone = _run(capsys, "webhook", "revoke", made["id"])
    others += [said, more, again, gone, _run(capsys, "webhook", "test", made["id"], code=2)[1]]
    assert main(["webhook", "list"]) == 0
    others.append(capsys.readouterr().out)
    for secret in (made["secret"], rotated["secret"]):
        assert secret.removeprefix("whsec_") not in "".join(others)
    assert made["secret"] != rotated["secret"]
    with connect(tmp_path / "s.duckdb", read_only=True) as store:
        assert {one.actor for one in store.records(Webhook, revoked_at=None)} == set()
        assert store.get(Webhook, made["id"]).actor == "ada"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["webhook", "add", "http://a.example/"], "must be https"),
        (["webhook", "add", "https://127.0.0.1/"], "no public address"),
        (["webhook", "add", "https://a.example/", "--event", "delivery.created"], "there is no event"),
        (["webhook", "revoke", "nobody"], "there is no webhook nobody"),
        (["webhook", "replay"], "give a delivery"),
        (["webhook", "replay", "nobody"], "there is no delivery nobody"),
        (["webhook", "log", "--status", "lost"], "lost"),
        (["alert", "resolve", "nobody", "--reason", "x"], "there is no alert nobody"),
        (["alert", "resolve", "nobody"], "--reason"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connect(tmp_path / "s.duckdb").close()
    assert main([*words, "--store", str(tmp_path / "s.duckdb")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_alerts_are_taken_on_and_ended_from_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHFW_STORE", str(tmp_path / "s.duckdb"))
    with connect(tmp_path / "s.duckdb") as store:
        name = raise_alert(store, "critical", "disk").id
    assert [one["id"] for one in _run(capsys, "alert", "list")[0]["alerts"]] == [name]
    assert _run(capsys, "alert", "ack", name, "--as", "ada")[0]["status"] == "acknowledged"
    assert _run(capsys, "alert", "resolve", name, "--reason", "bigger", "--as", "bob")[0]["status"] == "resolved"
    assert _run(capsys, "alert", "list")[0]["alerts"] == []
    (over,) = _run(capsys, "alert", "list", "--all")[0]["alerts"]
    assert (over["metadata"]["acknowledged"]["by"], over["metadata"]["resolved"]["reason"]) == ("ada", "bigger")


def test_a_refused_address_is_not_kept(store: Store) -> None:
    with pytest.raises(DeniedError, match="no public address"):
        add_webhook(store, "https://169.254.169.254/")
    assert store.counts() == {}


def test_a_change_wakes_the_dispatcher_which_else_sleeps(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    _listen(store, receiver)
    looks: list[datetime] = []

    def noted(*args: Any) -> list[Delivery]:
        looks.append(utc_now())
        return due_deliveries(*args)

    def sleeps() -> bool:
        return utc_now() - looks[-1] > timedelta(seconds=0.5)

    monkeypatch.setattr(dispatch, "due_deliveries", noted)
    with Dispatcher(store, send=SEND, poll_s=3600):
        prompts = []
        for n in range(1, 4):
            prompts.append(Prompt(text="x"))
            store.append(prompts[-1])
            receiver.wait_for(lambda got, n=n: len(got) == n)
            until = utc_now() + timedelta(seconds=30)
            while not sleeps():
                assert utc_now() < until, f"it looked {len(looks)} times"
                time.sleep(0.05)
    assert [message.payload["data"]["ids"] for message in receiver.got] == [[prompt.id] for prompt in prompts]
    assert receiver.wrong == []


def test_the_terminal_joins_the_process_that_serves(
    tmp_path: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ALLOW": "127.0.0.0/8", "PORTS": str(receiver.port), "HTTP": "1"}.items():
        monkeypatch.setenv(f"RLHFW_WEBHOOK_{name}", value)
    path = tmp_path / "s.duckdb"
    connect(path).close()
    child = "from rlhf_workbench.cli import main; import sys; sys.exit(main(sys.argv[1:]))"

    def rlhfw(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-c", child, *words, "--store", str(path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with connect(path) as store, Dispatcher(store, poll_s=0.2):
        made = rlhfw("webhook", "add", receiver.url, "--event", "prompt.created")
        receiver.secret = made["secret"]
        store.append(Prompt(text="x"))
        receiver.wait_for(lambda got: len(got) == 1)
        assert rlhfw("webhook", "test", made["id"])["status"] == "delivered"
        (tested,) = [one for one in rlhfw("webhook", "log")["deliveries"] if one["event"] == "webhook.test"]
        rlhfw("webhook", "replay", tested["id"])
        receiver.wait_for(lambda got: len(got) == 3)
        assert [one["is_active"] for one in rlhfw("webhook", "list")["webhooks"]] == [True]
        rlhfw("webhook", "revoke", made["id"])
    assert receiver.got[1].event_id == receiver.got[2].event_id
