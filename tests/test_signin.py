"""Whoever is not meant to get in does not, and whoever is in gets out at once when their right ends."""

import base64
import hashlib
import hmac
import html
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:authlib", "ignore:authlib.jose")
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")
pytest.importorskip("oidc_provider_mock", reason="needs the extra dev: pip install 'rlhf_workbench[dev]'")

import httpx
import oidc_provider_mock
import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial
from werkzeug.serving import make_server

from rlhf_workbench.core.errors import InputError, MissingError, WorkbenchError
from rlhf_workbench.core.schema import Member
from rlhf_workbench.govern.access import invite, make_token, revoke_member
from rlhf_workbench.serve.guard import local_path
from rlhf_workbench.serve.oidc import OidcSettings, Person, Provider, check_issuer, read_oidc_settings
from rlhf_workbench.serve.signin import SignIn, SignInSettings
from rlhf_workbench.serve.tickets import Tickets
from rlhf_workbench.store.tables import Store, connect

CLIENT, CLIENT_SECRET = "workbench", "the-client-secret-nobody-sees"
ADA = oidc_provider_mock.User(sub="u-ada", claims={"email": "ada@example.org", "email_verified": True})
EVE = oidc_provider_mock.User(sub="u-eve", claims={"email": "ada@example.org", "email_verified": False})
MAL = oidc_provider_mock.User(sub="<img src=x onerror=alert(1)>", claims={})


WEB = httpx.Client(timeout=30)  # what a browser does elsewhere


# ---- tickets


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(st.tuples(st.sampled_from(["issue", "look", "take", "wait"]), st.integers(0, 5)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_tickets_behave_like_a_list_of_names_and_times(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    tickets: Tickets[int] = Tickets(10, idle_s=4, limit=3, clock=clock)
    secrets: list[str] = []
    held: list[tuple[int, float, float]] = []  # number, ends, idle; least recently used first
    for step, n in steps:
        alive = {number for number, ends, idle in held if clock.now < min(ends, idle)}
        if step == "wait":
            clock.now += n
        elif step == "issue":
            secrets.append(tickets.issue(len(secrets)))
            held = [*held, (len(secrets) - 1, clock.now + 10, clock.now + 4)][-3:]
        elif secrets:
            number = n % len(secrets)
            found = tickets.look(secrets[number]) if step == "look" else tickets.take(secrets[number])
            assert found == (number if number in alive else None)
            mine = [entry for entry in held if entry[0] == number]
            held = [entry for entry in held if entry[0] != number]
            if step == "look" and number in alive:
                held.append((number, mine[0][1], clock.now + 4))
    assert len(tickets) <= 3
    assert len(set(secrets)) == len(secrets)


def test_memory_holds_no_secret() -> None:
    tickets: Tickets[str] = Tickets(10)
    secret = tickets.issue("x")
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    assert secret not in repr(vars(tickets))
    assert [tickets.look(None), tickets.look(""), tickets.take("\ud800")] == [None, None, None]


# ---- paths, origins, names


@given(st.text(max_size=30) | st.from_regex(r"[/\\]{1,3}[a-z.@:\t\n\r /\\]{0,12}", fullmatch=True))
def test_a_redirect_never_leaves_this_server(text: str) -> None:
    path = local_path(text)
    seen_by_browser = re.sub(r"[\t\n\r]", "", path).replace("\\", "/")
    assert urlsplit(urljoin("http://127.0.0.1:5006/signin", seen_by_browser)).netloc == "127.0.0.1:5006"
    assert path.startswith("/")
    if re.fullmatch(r"/[a-z]+", text):
        assert path == text


def make_app(doors: SignIn) -> FastAPI:
    """A service as small as can be: a route that says who asks, one that saves, a private websocket."""
    app = FastAPI()
    app.add_middleware(doors.guard, private=("/panel",), public=("/panel/logo",))
    app.include_router(doors.router())

    @app.api_route("/v1/projects/{project}/me", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    def me(request: Request, project: str) -> dict[str, Any]:
        try:
            identity = doors.identity(request, project)
        except WorkbenchError as error:
            return {"denied": str(error)}
        return {"name": identity.name, "role": identity.role} if identity else {}

    @app.get("/panel/{name}")
    def panel(name: str) -> str:
        return name

    @app.websocket("/panel/ws")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                text = await websocket.receive_text()
                app.state.heard.append(text)
                await websocket.send_text(text)
                if text == "push":  # later, the server talks without being asked
                    await run_in_threadpool(app.state.push.wait, 30)
                    await websocket.send_text("news")
        except WebSocketDisconnect:
            app.state.ended.set()

    app.state.push, app.state.ended, app.state.heard = threading.Event(), threading.Event(), list[str]()
    return app


@pytest.fixture
def pilot() -> Iterator[Store]:
    with connect(":memory:") as opened:
        yield opened


@pytest.fixture
def safety() -> Iterator[Store]:
    with connect(":memory:") as opened:
        yield opened


@pytest.fixture
def doors(pilot: Store, safety: Store) -> SignIn:
    return SignIn({"pilot": pilot, "safety": safety}, SignInSettings(attempts=1000))


HERE = "http://127.0.0.1:5006"


def browse(doors: SignIn, base: str = HERE, address: str = "127.0.0.1") -> TestClient:
    return TestClient(make_app(doors), base_url=base, client=(address, 4711), follow_redirects=False)


def enter(doors: SignIn, base: str = HERE) -> TestClient:
    """A browser that came in through a link."""
    browser = browse(doors, base)
    assert browser.get(doors.one_time_link(base)).status_code == 303
    return browser


# ---- the link


def test_a_link_lets_in_once_and_leaves_the_address_bar(doors: SignIn) -> None:
    link, browser = doors.one_time_link(HERE), browse(doors)
    reply = browser.get(link)
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    cookie = reply.headers["set-cookie"].lower()
    assert cookie.startswith("rlhfw_session_5006=")
    assert {"httponly", "samesite=strict", "path=/"} <= set(cookie.split("; "))
    assert "secure" not in cookie
    assert browser.get("/v1/projects/pilot/me").json()["role"] == "admin"
    assert browser.get("/v1/projects/safety/me").json()["role"] == "admin"
    assert "denied" in browser.get("/v1/projects/other/me").json()
    again = browse(doors).get(link)
    assert again.status_code == 403
    assert "set-cookie" not in again.headers


def test_of_many_at_once_only_one_gets_in(doors: SignIn) -> None:
    link, app = doors.one_time_link(HERE), browse(doors).app
    clients = [TestClient(app, base_url=HERE, client=("127.0.0.1", i), follow_redirects=False) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda client: client.get(link).status_code, clients))
    assert sorted(codes) == [303] + [403] * 7


@pytest.mark.parametrize(
    ("address", "headers"),
    [("10.0.0.5", {}), ("127.0.0.1", {"X-Forwarded-For": "10.0.0.5"}), ("127.0.0.1", {"Forwarded": "for=10.0.0.5"})],
)
def test_a_link_works_only_here_and_is_spent_elsewhere(doors: SignIn, address: str, headers: dict[str, str]) -> None:
    link = doors.one_time_link(HERE)
    assert browse(doors, address=address).get(link, headers=headers).status_code == 403
    assert browse(doors).get(link).status_code == 403


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.5:5006", "https://workbench.example", "http://0.0.0.0:5006", "", "http://127.0.0.1.evil.example"],
)
def test_no_link_is_made_for_another_machine(doors: SignIn, url: str) -> None:
    with pytest.raises(InputError, match="only for this machine"):
        doors.one_time_link(url)


def test_a_link_ends(pilot: Store) -> None:
    late = SignIn({"pilot": pilot}, SignInSettings(link_s=0))
    assert browse(late).get(late.one_time_link(HERE)).status_code == 403


# ---- cookies and sessions


@pytest.mark.parametrize(
    ("base", "public_url", "name"),
    [
        (HERE, "", "rlhfw_session_5006"),
        ("http://localhost", "", "rlhfw_session_80"),
        ("https://127.0.0.1:5443", "", "__Host-rlhfw_session"),
        (HERE, "https://workbench.example", "__Host-rlhfw_session"),  # a proxy speaks https for us
    ],
)
def test_a_cookie_is_as_closed_as_the_address_allows(pilot: Store, base: str, public_url: str, name: str) -> None:
    doors = SignIn({"pilot": pilot}, SignInSettings(public_url=public_url))
    cookie = browse(doors, base).get(doors.one_time_link(base)).headers["set-cookie"]
    assert cookie.startswith(f"{name}=")
    assert ("secure" in cookie.lower().split("; ")) == name.startswith("__Host-")
    assert "domain" not in cookie.lower()


def test_a_session_planted_before_is_worth_nothing_after(doors: SignIn) -> None:
    """Session fixation: the thief's own session, put into the browser of somebody who then signs in."""
    thief = enter(doors)
    (name, planted), *_ = thief.cookies.items()
    victim = browse(doors)
    victim.cookies.set(name, planted, "127.0.0.1")
    assert victim.get("/v1/projects/pilot/me").json()["role"] == "admin"
    victim.get(doors.one_time_link(HERE))
    assert victim.cookies[name] != planted
    assert thief.get("/v1/projects/pilot/me").json() == {}
    made_up = browse(doors)
    made_up.cookies.set(name, "A" * 43, "127.0.0.1")
    made_up.get(doors.one_time_link(HERE))
    assert made_up.cookies[name] != "A" * 43


def test_signing_out_ends_the_session_and_not_only_the_cookie(doors: SignIn) -> None:
    browser = enter(doors)
    copy = dict(browser.cookies)
    reply = browser.post("/signout", headers={"Origin": HERE})
    assert reply.status_code == 303
    assert 'rlhfw_session_5006=""; HttpOnly; Max-Age=0' in reply.headers["set-cookie"]
    thief = browse(doors)
    thief.cookies.update(copy)
    assert thief.get("/v1/projects/pilot/me").json() == {}
    assert thief.get("/signout").status_code == 405


@pytest.mark.parametrize(
    ("waits", "is_in"), [([90, 90, 90], True), ([100.5], False), ([90] * 4, False), ([99.5] * 3 + [2], False)]
)
def test_a_session_ends_when_idle_and_in_any_case(pilot: Store, waits: list[float], is_in: bool) -> None:
    doors, clock = SignIn({"pilot": pilot}), Clock()
    doors._sessions = Tickets(300, idle_s=100, clock=clock)
    browser = enter(doors)
    for wait_s in waits:
        clock.now += wait_s
        answer = browser.get("/v1/projects/pilot/me").json()
    assert bool(answer) == is_in


def test_the_default_times_are_those_of_the_settings(doors: SignIn) -> None:
    assert (doors._sessions.idle_s, doors._sessions.lifetime_s, doors._links.lifetime_s) == (7200, 43200, 3600)


# ---- other pages


CROSS = {"Origin": "https://evil.example"}
ORIGINS: list[tuple[dict[str, str], bool]] = [
    ({"Origin": HERE}, True),
    ({"Sec-Fetch-Site": "same-origin"}, True),
    ({"Sec-Fetch-Site": "same-origin", "Origin": HERE}, True),
    ({}, False),
    (CROSS, False),
    ({"Origin": "null"}, False),
    ({"Origin": "http://127.0.0.1:8888"}, False),  # another server of this machine gets the same cookies
    ({"Origin": "http://localhost:5006"}, False),
    ({"Origin": "https://127.0.0.1:5006"}, False),
    ({"Origin": "http://127.0.0.1:5006.evil.example"}, False),
    ({"Origin": "http://[::1"}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False),
    ({"Sec-Fetch-Site": "same-site", "Origin": HERE}, False),
    ({"Sec-Fetch-Site": "none"}, False),
    ({"Sec-Fetch-Site": "same-origin", **CROSS}, False),
]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(("headers", "is_meant"), ORIGINS, ids=lambda v: str(v))
def test_a_change_must_come_from_our_own_page(
    shared_browser: TestClient, method: str, headers: dict[str, str], is_meant: bool
) -> None:
    reply = shared_browser.request(method, "/v1/projects/pilot/me", headers=headers)
    assert reply.status_code == (200 if is_meant else 403)
    if is_meant:
        assert reply.json()["role"] == "admin"
    else:
        assert reply.headers["content-type"] == "application/problem+json"


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[TestClient]:
    with connect(":memory:") as store:
        yield enter(SignIn({"pilot": store}))


def test_reading_is_no_change_and_a_token_is_no_cookie(shared_browser: TestClient) -> None:
    place = "/v1/projects/pilot/me"
    assert shared_browser.get(place, headers=CROSS).json()["role"] == "admin"
    shown = shared_browser.post(place, headers={**CROSS, "Authorization": "Bearer rlhfw_guess"})
    assert (shown.status_code, shown.json()) == (200, {})  # passes, and the session beside it does not count
    basic = shared_browser.post(place, headers={**CROSS, "Authorization": "Basic eDp5"})
    assert basic.status_code == 403  # browsers send that by themselves
    alone = TestClient(shared_browser.app, base_url=HERE).post(place, headers=CROSS)
    assert (alone.status_code, alone.json()) == (200, {})  # no cookie: nothing to protect, and nobody


def test_a_proxys_address_counts_as_our_own(pilot: Store) -> None:
    doors = SignIn({"pilot": pilot}, SignInSettings(public_url="https://workbench.example"))
    session = browse(doors).get(doors.one_time_link(HERE)).headers["set-cookie"].partition(";")[0]
    browser = browse(doors)  # the proxy speaks http to us, and passes the browser's cookie on
    place, outside = "/v1/projects/pilot/me", {"Origin": "https://workbench.example", "Cookie": session}
    assert browser.post(place, headers=outside).json()["role"] == "admin"
    assert browser.get(place, headers=outside | {"Host": "workbench.example"}).json()["role"] == "admin"
    assert browser.post(place, headers=outside | {"Origin": "http://workbench.example"}).status_code == 403
    assert browser.get(place, headers=outside | {"Host": "other.example"}).status_code == 400


@pytest.mark.parametrize("host", ["rebound.example:5006", "127.0.0.1.nip.io:5006", "", "[::1", "127.0.0.1:x", "a@b"])
def test_a_strangers_name_for_this_machine_is_refused(shared_browser: TestClient, host: str) -> None:
    for path in ("/signin", "/v1/projects/pilot/me"):
        assert shared_browser.get(path, headers={"Host": host}).status_code == 400


def test_private_pages_lead_to_the_sign_in_and_back(doors: SignIn) -> None:
    stranger = browse(doors)
    reply = stranger.get("/panel/page?tab=2&x=%2F")
    assert (reply.status_code, reply.headers["location"]) == (303, "/signin?next=/panel/page%3Ftab%3D2%26x%3D%252F")
    assert stranger.get("/panel/logo").json() == "logo"
    assert stranger.get("/panelist").status_code == 404
    assert stranger.post("/panel/page").status_code == 401
    assert enter(doors).get("/panel/page").json() == "page"


def test_too_many_attempts_have_to_wait(pilot: Store) -> None:
    doors = SignIn({"pilot": pilot}, SignInSettings(attempts=3))
    link, guess = doors.one_time_link(HERE), "/signin/link?token=guess"
    browser = browse(doors)
    assert [browser.get(guess).status_code for _ in range(4)] == [403, 403, 403, 429]
    reply = browser.get(link)
    assert reply.status_code == 429
    assert 1 <= int(reply.headers["retry-after"]) <= 20
    assert browse(doors, address="127.0.0.2").get(link).status_code == 403  # shown is spent, also while waiting
    others = [browse(doors, address=f"10.0.0.{i}").get(guess).status_code for i in range(60)]
    assert others.count(403) in range(39, 45)  # 45 altogether, and what refills meanwhile
    assert others[-1] == 429


# ---- a real server, and websockets


@contextmanager
def serving(doors: SignIn, app: FastAPI | None = None) -> Iterator[str]:
    """The service on a free port of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = app or make_app(doors)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        WEB.get(f"{base}/signin")  # the listener queues us until it is up
        yield base
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


def knock(base: str, cookies: dict[str, str], origin: str | None, **headers: str) -> ClientConnection:
    """Open the private websocket."""
    sent = {"Cookie": "; ".join(f"{k}={v}" for k, v in cookies.items())} if cookies else {}
    return dial(base.replace("http", "ws") + "/panel/ws", origin=origin, additional_headers=sent | headers, proxy=None)  # type: ignore[arg-type]


def test_a_websocket_opens_only_for_our_own_page_and_people(doors: SignIn) -> None:
    with serving(doors) as base, httpx.Client() as browser:
        browser.get(doors.one_time_link(base))
        cookies = dict(browser.cookies)
        port = urlsplit(base).port
        with knock(base, cookies, base) as line:
            line.send("hello")
            assert line.recv(30) == "hello"
        refused: list[tuple[dict[str, str], str | None, dict[str, str]]] = [
            (cookies, "https://evil.example", {}),
            (cookies, f"http://localhost:{port}", {}),
            (cookies, "null", {}),
            (cookies, None, {}),
            ({}, base, {}),
            ({next(iter(cookies)): "guess"}, base, {}),
            (cookies, base, {"Authorization": "Bearer rlhfw_guess"}),
        ]
        for given_cookies, origin, headers in refused:
            with pytest.raises(InvalidStatus) as answer:
                knock(base, given_cookies, origin, **headers)
            assert answer.value.response.status_code == 403


@pytest.mark.parametrize("how", ["revoked", "signed out"])
def test_an_open_websocket_ends_with_the_right(doors: SignIn, pilot: Store, how: str) -> None:
    member = invite(pilot, "ada@example.org", "researcher")
    app = make_app(doors)
    with serving(doors, app) as base:
        person = Person("https://id.example", "u-ada", "ada@example.org")
        cookies = {f"rlhfw_session_{urlsplit(base).port}": doors._sessions.issue(person)}
        with knock(base, cookies, base) as line:
            line.send("hello")
            assert line.recv(30) == "hello"
            if how == "revoked":
                revoke_member(pilot, member.id)
            else:
                (session,) = (f"{name}={value}" for name, value in cookies.items())
                WEB.post(f"{base}/signout", headers={"Origin": base, "Cookie": session})
            line.send("still there?")
            with pytest.raises(ConnectionClosed) as end:
                line.recv(30)
            assert end.value.rcvd is not None
            assert end.value.rcvd.code == 1008
        assert app.state.ended.wait(30)
        assert app.state.heard == ["hello"]  # the page never got the second one
        with pytest.raises(InvalidStatus):
            knock(base, cookies, base)


def test_an_open_page_that_only_listens_hears_nothing_more(doors: SignIn, pilot: Store) -> None:
    member = invite(pilot, "ada@example.org", "researcher")
    app = make_app(doors)
    with serving(doors, app) as base:
        person = Person("https://id.example", "u-ada", "ada@example.org")
        cookies = {f"rlhfw_session_{urlsplit(base).port}": doors._sessions.issue(person)}
        with knock(base, cookies, base) as line:
            line.send("push")
            assert line.recv(30) == "push"
            revoke_member(pilot, member.id)
            app.state.push.set()
            with pytest.raises(ConnectionClosed) as end:
                line.recv(30)
            assert end.value.rcvd is not None
            assert end.value.rcvd.code == 1008
        assert app.state.ended.wait(30)  # the page was told that its visitor is gone


def test_a_page_of_panel_ends_with_the_right_in_its_own_project(doors: SignIn, pilot: Store, safety: Store) -> None:
    """Still a member elsewhere is not enough."""
    pytest.importorskip("bokeh_fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")
    from rlhf_workbench.apps.main import build_app
    from rlhf_workbench.serve.callers import Service

    member = invite(pilot, "ada@example.org", "researcher")
    invite(safety, "ada@example.org", "researcher")
    app, _ = build_app(Service({"pilot": pilot, "safety": safety}, doors), doors)
    with serving(doors, app) as base:
        session = doors._sessions.issue(Person("https://id.example", "u-ada", "ada@example.org"))
        cookie = {"Cookie": f"rlhfw_session_{urlsplit(base).port}={session}"}

        def open_page(project: str, origin: str = base) -> ClientConnection:
            """What Bokeh's script does: the page, and the line that belongs to it."""
            text = WEB.get(f"{base}/projects/{project}/label", headers=cookie).text
            (token,) = re.findall(r'"token":\s*"([^"]+)"', text)
            address = f"{base.replace('http', 'ws')}/projects/{project}/label/ws"
            return dial(address, origin=origin, additional_headers=cookie, subprotocols=["bokeh", token], proxy=None)  # type: ignore[arg-type,list-item]

        with pytest.raises(InvalidStatus) as refused:
            open_page("pilot", "https://evil.example")
        assert refused.value.response.status_code == 403
        with open_page("pilot") as mine, open_page("safety") as other:
            assert "ACK" in str(mine.recv(30))
            assert "ACK" in str(other.recv(30))
            revoke_member(pilot, member.id)
            mine.send('{"msgid": "1", "msgtype": "PULL-DOC-REQ"}')
            with pytest.raises(ConnectionClosed) as end:
                while True:  # parts of the greeting may be on their way
                    mine.recv(30)
            assert end.value.rcvd is not None
            assert end.value.rcvd.code == 1008
            for part in ('{"msgid": "1", "msgtype": "PULL-DOC-REQ"}', "{}", "{}"):
                other.send(part)
            assert any("PULL-DOC-REPLY" in str(other.recv(30)) for _ in range(6))
        assert WEB.get(f"{base}/projects/pilot/label", headers=cookie).status_code == 403


# ---- the identity provider


class Counter:
    """A real provider behind a counter that checks PKCE, and that a test may tell to hand out something else."""

    def __init__(self, app: Any):
        self.app, self.challenges = app, dict[str, str]()
        self.swap: str | None = None  # an id token in place of the right one
        self.keys: dict[str, Any] | None = None  # in place of the provider's own
        self.host: str | None = None  # under which name the provider believes to be called when it gives tokens
        self.seen: list[dict[str, list[str]]] = []

    def __call__(self, environ: Any, start_response: Any) -> Any:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/oauth2/authorize" and method == "POST":
            return self._authorize(environ, start_response)
        if path == "/oauth2/token":
            return self._token(environ, start_response)
        if path == "/jwks" and self.keys:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.keys).encode()]
        return self.app(environ, start_response)

    def _authorize(self, environ: Any, start_response: Any) -> Any:
        asked = parse_qs(environ["QUERY_STRING"])

        def note(status: str, headers: Any, *more: Any) -> Any:
            code = parse_qs(urlsplit(dict(headers).get("Location", "")).query).get("code")
            if code and asked.get("code_challenge_method") == ["S256"]:
                self.challenges[code[0]] = asked["code_challenge"][0]
            return start_response(status, headers, *more)

        return self.app(environ, note)

    def _token(self, environ: Any, start_response: Any) -> Any:
        import io

        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        form = parse_qs(body.decode())
        self.seen.append(form)
        verifier = form.get("code_verifier", [""])[0]
        digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        if self.challenges.get(form["code"][0], digest) != digest:
            start_response("400 Bad Request", [("Content-Type", "application/json")])
            return [b'{"error": "invalid_grant"}']
        environ["wsgi.input"] = io.BytesIO(body)
        if self.host:
            environ["HTTP_HOST"] = self.host
        caught: list[Any] = []
        answer = b"".join(self.app(environ, lambda *a: caught.append(a)))
        if self.swap is not None and b"id_token" in answer:
            answer = json.dumps(json.loads(answer) | {"id_token": self.swap}).encode()
        headers = [(k, v) for k, v in caught[0][1] if k.lower() != "content-length"]
        start_response(caught[0][0], headers)
        return [answer]


@contextmanager
def providing(**options: Any) -> Iterator[tuple[str, Counter]]:
    """The provider on a free port of this machine."""
    counter = Counter(oidc_provider_mock.app(user_claims=[ADA, EVE, MAL], **options))
    server = make_server("127.0.0.1", 0, counter, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counter
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


@pytest.fixture(scope="module")
def provider() -> Iterator[tuple[str, Counter]]:
    with providing() as found:
        yield found


@pytest.fixture
def issuer(provider: tuple[str, Counter]) -> str:
    provider[1].swap = provider[1].host = provider[1].keys = None
    return provider[0]


@pytest.fixture
def team(pilot: Store, safety: Store, issuer: str) -> SignIn:
    """A server of a team whose people are at the provider."""
    oidc = OidcSettings(issuer, CLIENT, CLIENT_SECRET)
    return SignIn({"pilot": pilot, "safety": safety}, SignInSettings(oidc=oidc, attempts=1000))


def ask(browser: TestClient, next_path: str = "/") -> str:
    """Begin: the address at the provider to which the browser is sent."""
    reply = browser.get("/signin/start", params={"next": next_path})
    assert reply.status_code == 303
    return reply.headers["location"]


def consent(url: str, sub: str = ADA.sub) -> str:
    """At the provider: the address with which the browser comes back."""
    return WEB.post(url, data={"sub": sub}).headers["location"]


def sign_in(browser: TestClient, sub: str = ADA.sub, next_path: str = "/") -> Any:
    return browser.get(consent(ask(browser, next_path), sub))


def changed(url: str, **parameters: str) -> str:
    """The same address with other parameters."""
    found = httpx.URL(url)
    for name, value in parameters.items():
        found = found.copy_set_param(name, value)
    return str(found)


def expect_refusal(reply: Any, text: str, status: int = 403) -> None:
    """A page that says why, and nothing that lets in."""
    assert reply.status_code == status, reply.text
    assert text in html.unescape(reply.text)
    assert not [c for c in reply.headers.get_list("set-cookie") if "session" in c]


def test_a_member_gets_in_with_the_role_of_each_project(team: SignIn, pilot: Store, safety: Store) -> None:
    invite(pilot, "ada@example.org", "reviewer")
    invite(safety, "u-ada", "annotator", team.settings.oidc.issuer)  # type: ignore[union-attr]
    browser = browse(team)
    reply = sign_in(browser, next_path="/panel/page?tab=2")
    assert (reply.status_code, reply.headers["location"]) == (303, "/panel/page?tab=2")
    session = next(c for c in reply.headers.get_list("set-cookie") if "session" in c).lower()
    assert {"httponly", "samesite=lax", "path=/"} <= set(session.split("; "))
    assert not [name for name in browser.cookies if "asking" in name]
    assert browser.get("/v1/projects/pilot/me").json() == {"name": "ada@example.org", "role": "reviewer"}
    assert browser.get("/v1/projects/safety/me").json() == {"name": "u-ada", "role": "annotator"}
    assert browser.get("/signin/session").json()["roles"] == {"pilot": "reviewer", "safety": "annotator"}
    assert "reviewer of pilot, annotator of safety" in browser.get("/signin").text


def test_the_question_has_state_nonce_and_pkce_each_time_anew(team: SignIn, provider: tuple[str, Counter]) -> None:
    asked = [parse_qs(urlsplit(ask(browse(team))).query) for _ in range(2)]
    for name in ("state", "nonce", "code_challenge"):
        assert asked[0][name] != asked[1][name]
        assert len(asked[0][name][0]) == 43
    assert asked[0]["code_challenge_method"] == ["S256"]
    assert asked[0]["redirect_uri"] == [f"{HERE}/signin/callback"]
    assert set(asked[0]["scope"][0].split()) == {"openid", "email", "profile"}
    assert "client_secret" not in asked[0]


def test_who_is_no_member_is_told_so_and_stays_out(team: SignIn) -> None:
    browser = browse(team)
    expect_refusal(sign_in(browser), "no project here knows you; ask an admin")
    assert browser.get("/v1/projects/pilot/me").json() == {}


def test_an_address_that_nobody_checked_is_nobodys(team: SignIn, pilot: Store) -> None:
    invite(pilot, "ada@example.org", "admin")
    expect_refusal(sign_in(browse(team), EVE.sub), "u-eve")


def test_a_revoked_member_is_out_at_the_next_request(team: SignIn, pilot: Store) -> None:
    member = invite(pilot, "ada@example.org", "reviewer")
    browser = browse(team)
    sign_in(browser)
    assert browser.get("/panel/page").status_code == 200
    revoke_member(pilot, member.id)
    assert "no member" in browser.get("/v1/projects/pilot/me").json()["denied"]
    assert browser.get("/panel/page").status_code == 303
    assert "member of no project now" in browser.get("/signin").text


def test_an_answer_counts_only_in_the_browser_that_asked(team: SignIn, pilot: Store) -> None:
    """Login CSRF: a thief's answer, opened in the victim's browser, must not sign the victim in as the thief."""
    invite(pilot, "ada@example.org", "reviewer")
    answer = consent(ask(browse(team)))
    expect_refusal(browse(team).get(answer), "did not ask")
    victim = browse(team)
    ask(victim)
    expect_refusal(victim.get(answer), "another sign-in")


def test_a_wrong_state_is_refused_and_ends_the_question(team: SignIn, pilot: Store) -> None:
    invite(pilot, "ada@example.org", "reviewer")
    browser = browse(team)
    answer = consent(ask(browser))
    expect_refusal(browser.get(changed(answer, state="guess")), "another sign-in")
    expect_refusal(browser.get(answer), "did not ask")


def test_an_answer_works_once(team: SignIn, pilot: Store) -> None:
    invite(pilot, "ada@example.org", "reviewer")
    browser, copy = browse(team), browse(team)
    answer = consent(ask(browser))
    copy.cookies.update(dict(browser.cookies))  # a browser that never forgets a cookie
    assert browser.get(answer).status_code == 303
    expect_refusal(browser.get(answer), "did not ask")
    expect_refusal(copy.get(answer), "did not ask")


def test_a_used_or_stolen_code_is_worth_nothing(team: SignIn, pilot: Store) -> None:
    invite(pilot, "ada@example.org", "reviewer")
    victim, thief = browse(team), browse(team)
    code = httpx.URL(consent(ask(victim))).params["code"]
    stolen = changed(consent(ask(thief), EVE.sub), code=code)
    expect_refusal(thief.get(stolen), "did not accept")  # the verifier is the thief's, not the victim's
    used = httpx.URL(answer := consent(ask(victim))).params["code"]
    assert victim.get(answer).status_code == 303
    again = changed(consent(ask(victim)), code=used)
    expect_refusal(victim.get(again), "did not accept")


def test_an_answer_to_another_nonce_is_refused(team: SignIn, pilot: Store) -> None:
    invite(pilot, "ada@example.org", "reviewer")
    browser = browse(team)
    expect_refusal(browser.get(consent(changed(ask(browser), nonce="of-yesterday"))), "could not be verified")


def _for_other_client(issuer: str, url: str) -> str:
    """An id token, rightly signed, with our nonce, for another client."""
    asked = httpx.URL(changed(url, client_id="other")).copy_remove_param("code_challenge_method")
    code = httpx.URL(consent(str(asked))).params["code"]
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": f"{HERE}/signin/callback"}
    reply = WEB.post(f"{issuer}/oauth2/token", data=form, auth=("other", "x"))
    return str(reply.json()["id_token"])


def _claims(issuer: str, url: str) -> dict[str, Any]:
    """What a right id token would say."""
    nonce = httpx.URL(url).params["nonce"]
    return {"iss": issuer, "sub": ADA.sub, "aud": [CLIENT], "iat": 1, "exp": 2**33, "nonce": nonce}


def _with_own_key(issuer: str, url: str) -> str:
    """Signed by a stranger who names the provider's key."""
    kid = WEB.get(f"{issuer}/jwks").json()["keys"][0].get("kid")
    header = {"alg": "RS256"} | ({"kid": kid} if kid else {})
    return jwt.encode(header, _claims(issuer, url), RSAKey.generate_key(2048))


def _unsigned(issuer: str, url: str) -> str:
    parts = (json.dumps(part).encode() for part in ({"alg": "none"}, _claims(issuer, url)))
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), ""])


def _with_public_key_as_secret(issuer: str, url: str) -> str:
    """Algorithm confusion: the provider's public key used as a shared secret."""
    key = RSAKey.import_key(WEB.get(f"{issuer}/jwks").json()["keys"][0]).as_pem(private=False)
    signed = _unsigned(issuer, url).removesuffix(".").partition(".")[2]
    head = base64.urlsafe_b64encode(b'{"alg":"HS256"}').decode().rstrip("=")
    mark = hmac.digest(key, f"{head}.{signed}".encode(), "sha256")
    return f"{head}.{signed}.{base64.urlsafe_b64encode(mark).decode().rstrip('=')}"


def _with_client_secret(issuer: str, url: str) -> str:
    return jwt.encode({"alg": "HS256"}, _claims(issuer, url), OctKey.import_key(CLIENT_SECRET))


@pytest.mark.parametrize(
    "forge",
    [
        _for_other_client,
        _with_own_key,
        _unsigned,
        _with_public_key_as_secret,
        _with_client_secret,
        lambda *_: "",
        lambda *_: "a.b.c",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_forged_id_token_is_refused(
    team: SignIn, pilot: Store, provider: tuple[str, Counter], forge: Callable[[str, str], str]
) -> None:
    invite(pilot, "ada@example.org", "reviewer")
    invite(pilot, ADA.sub, "reviewer")
    browser = browse(team)
    url = ask(browser)
    answer = consent(url)
    provider[1].swap = forge(provider[0], url)
    expect_refusal(browser.get(answer), "could not be verified")
    provider[1].swap = None
    assert sign_in(browser).status_code == 303


_KEY = RSAKey.generate_key(2048)
CLAIMS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"aud": CLIENT}, True),
    ({"aud": [CLIENT, "other"], "azp": CLIENT}, True),
    ({"aud": "other", "azp": CLIENT}, False),
    ({"aud": ["other"]}, False),
    ({"aud": [CLIENT], "azp": "other"}, False),
    ({"aud": []}, False),
    ({"aud": None}, False),
    ({"nonce": None}, False),
    ({"nonce": ""}, False),
    ({"nonce": "of-yesterday"}, False),
    ({"exp": None}, False),
    ({"exp": 1_000_000_000}, False),
    ({"exp": "never"}, False),
    ({"nbf": 2**33}, False),
    ({"iat": 2**33}, False),
    ({"iss": None}, False),
    ({"iss": "https://evil.example"}, False),
    ({"sub": None}, False),
    ({"sub": ""}, False),
    ({"at_hash": "bm90IHRoZSBoYXNo"}, False),
]


@pytest.mark.parametrize(("changes", "is_good"), CLAIMS, ids=str)
def test_each_claim_of_a_rightly_signed_id_token_is_checked(
    team: SignIn, pilot: Store, provider: tuple[str, Counter], changes: dict[str, Any], is_good: bool
) -> None:
    invite(pilot, ADA.sub, "reviewer")
    browser = browse(team)
    url = ask(browser)
    answer = consent(url)
    provider[1].keys = {"keys": [_KEY.as_dict(private=False)]}
    claims = {k: v for k, v in (_claims(provider[0], url) | changes).items() if v is not None}
    provider[1].swap = jwt.encode({"alg": "RS256"}, claims, _KEY)
    reply = browser.get(answer)
    if is_good:
        assert reply.status_code == 303
    else:
        expect_refusal(reply, "could not be verified")


def test_another_issuer_in_the_id_token_is_refused(team: SignIn, pilot: Store, provider: tuple[str, Counter]) -> None:
    invite(pilot, ADA.sub, "reviewer")
    provider[1].host = provider[0].replace("http://127.0.0.1", "localhost")  # same key, other name
    expect_refusal(sign_in(browse(team)), "could not be verified")


def test_an_expired_id_token_is_refused(pilot: Store) -> None:
    invite(pilot, ADA.sub, "reviewer")
    with providing(access_token_max_age=timedelta(hours=-2)) as (late, _):
        doors = SignIn({"pilot": pilot}, SignInSettings(oidc=OidcSettings(late, CLIENT, CLIENT_SECRET)))
        expect_refusal(sign_in(browse(doors)), "could not be verified")


def test_who_declines_at_the_provider_stays_out(team: SignIn) -> None:
    browser = browse(team)
    url = ask(browser)
    declined = WEB.post(url, data={"action": "deny"}).headers["location"]
    assert "error=access_denied" in declined
    state = httpx.URL(url).params["state"]
    expect_refusal(browser.get(changed(declined, state=state)), "did not let you in")


def test_an_answer_that_names_another_provider_is_refused(team: SignIn) -> None:
    browser = browse(team)
    expect_refusal(browser.get(changed(consent(ask(browser)), iss="https://evil.example")), "another provider")


def test_a_provider_that_is_gone_or_is_another_is_said_in_words(pilot: Store, issuer: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        silent = OidcSettings(nobody, CLIENT)
        doors = SignIn({"pilot": pilot}, SignInSettings(oidc=silent))
        doors.provider = Provider(silent, timeout_s=0.2)
        expect_refusal(browse(doors).get("/signin/start"), "does not answer", 503)
    other_name = issuer.replace("127.0.0.1", "localhost")
    alias = SignIn({"pilot": pilot}, SignInSettings(oidc=OidcSettings(other_name, CLIENT)))
    assert browse(alias).get("/signin/start").status_code == 303  # this provider goes by the name it is called
    none = SignIn({"pilot": pilot})
    assert browse(none).get("/signin/start").status_code == 404
    assert browse(none).get("/signin/callback?code=x&state=y").status_code == 403


@pytest.mark.parametrize(
    "wanted", ["https://evil.example/", "//evil.example", "/\\evil.example", "/a\r\nSet-Cookie: x=y"]
)
def test_nobody_is_led_elsewhere(team: SignIn, pilot: Store, wanted: str) -> None:
    invite(pilot, ADA.sub, "reviewer")
    browser = browse(team)
    assert sign_in(browser, next_path=wanted).headers["location"] == "/"
    assert "evil" not in browse(team).get("/signin", params={"next": wanted}).text


def test_a_name_with_markup_is_shown_as_text(team: SignIn, pilot: Store) -> None:
    reply = sign_in(browse(team), MAL.sub)
    assert "<img" not in reply.text
    assert "&lt;img" in reply.text
    invite(pilot, MAL.sub, "reviewer")
    browser = browse(team)
    sign_in(browser, MAL.sub)
    assert "<img" not in browser.get("/signin").text


def test_every_page_loads_nothing_and_is_not_kept(team: SignIn, doors: SignIn) -> None:
    places = ["/signin", "/signin/link?token=x", "/signin/callback?code=x", "/signin/start"]
    replies = [browse(which).get(place) for which in (team, doors) for place in places] + [enter(doors).get("/signin")]
    for reply in replies:
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        if reply.status_code == 303:
            continue
        style = re.findall(r"<style>(.*?)</style>", reply.text)
        digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
        policy = reply.headers["content-security-policy"]
        assert f"default-src 'none'; style-src 'sha256-{digest}'" in policy
        assert "frame-ancestors 'none'" in policy
        assert not re.findall(r"<script|<link|<img|src=|url\(|http://|https://", reply.text)


def test_no_secret_is_in_a_log(team: SignIn, pilot: Store, issuer: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for noisy in ("asyncio", "hypothesis"):
        caplog.set_level(logging.WARNING, noisy)
    member = invite(pilot, "ada@example.org", "reviewer")
    browser = browse(team)
    sign_in(browser)
    cookie = next(v for k, v in browser.cookies.items() if "session" in k)
    revoke_member(pilot, member.id)
    sign_in(browser)
    _, token = make_token(pilot, "t", "service")
    ours = "\n".join(
        r.getMessage() for r in caplog.records if r.name.startswith(("rlhf_workbench", "authlib", "httpx"))
    )
    assert "is no member of any project" in ours
    for secret in (CLIENT_SECRET, cookie, token[-43:]):
        assert secret not in caplog.text
    assert "code_verifier" not in ours
    assert CLIENT_SECRET not in repr(team.settings) + repr(vars(team))
    assert pilot.records(Member)[0].subject == "ada@example.org"


# ---- settings


def test_settings_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    base = {"RLHFW_OIDC_ISSUER": "https://id.example/", "RLHFW_OIDC_CLIENT_ID": "w"}
    assert read_oidc_settings({}) is None
    assert read_oidc_settings(base) == OidcSettings("https://id.example", "w")
    file = tmp_path / "secret"
    file.write_text("hush\n")
    found = read_oidc_settings(base | {"RLHFW_OIDC_CLIENT_SECRET_FILE": str(file)})
    assert found is not None
    assert found.client_secret == "hush"
    with pytest.raises(MissingError, match="there is no file"):
        read_oidc_settings(base | {"RLHFW_OIDC_CLIENT_SECRET_FILE": str(tmp_path / "none")})
    with pytest.raises(InputError, match="set both"):
        read_oidc_settings({"RLHFW_OIDC_ISSUER": "https://id.example"})


@pytest.mark.parametrize(
    "address",
    [
        "http://id.example",
        "ftp://id.example",
        "id.example",
        "https://u:p@id.example",
        "https://id.example/?a",
        "http://127.0.0.1.evil.example",
    ],
)
def test_a_provider_without_https_is_refused(address: str) -> None:
    with pytest.raises(InputError):
        check_issuer(OidcSettings(address, "w"))
