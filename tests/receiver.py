"""A webhook receiver on loopback that checks every message with the specification's own library, and misbehaves on request."""

import secrets
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from typing import Any

from standardwebhooks import Webhook

from rlhf_workbench.govern.outbound import SendRules

LOOPBACK = SendRules(networks=(ip_network("127.0.0.0/8"),), ports=frozenset(), allow_http=True)


@dataclass
class Message:
    """One message as it came."""

    path: str
    headers: dict[str, str]
    payload: dict[str, Any]

    @property
    def event_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def seq(self) -> int:
        return self.payload["data"]["seq"]


@dataclass
class Receiver:
    """Answers by a plan: status numbers, or words for what goes wrong; then 204."""

    path: str = field(default_factory=lambda: f"/hook/{secrets.token_hex(8)}")  # ports are used again, paths are not
    secret: str = ""  # empty: signatures are not checked
    plan: list[Any] = field(default_factory=list)
    context: ssl.SSLContext | None = None
    got: list[Message] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what broke the protocol
    changed: threading.Condition = field(default_factory=threading.Condition)
    release: threading.Event = field(default_factory=threading.Event)  # ends what hangs

    def __enter__(self) -> "Receiver":
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._take(self)

            def do_GET(self) -> None:
                receiver.wrong.append("GET: a redirect was followed")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if self.context:
            self.server.socket = self.context.wrap_socket(self.server.socket, server_side=True)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def wait_for(self, condition: Callable[[list[Message]], bool], timeout_s: float = 60.0) -> None:
        """Until the messages fulfil a condition; the time is a guard, not a measurement."""
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.got), timeout_s), f"only {len(self.got)} messages came"

    def _take(self, handler: BaseHTTPRequestHandler) -> None:
        """Check a message, keep it, answer it."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", "0")))
        if handler.path != self.path:  # meant for one who had this port before
            handler.send_error(410)
            return
        headers = {name.lower(): value for name, value in handler.headers.items()}
        try:
            payload = Webhook(self.secret).verify(body, headers) if self.secret else {}
        except Exception as error:
            self.wrong.append(f"signature: {error}")
            payload = {}
        if headers.get("content-type") != "application/json":
            self.wrong.append("content-type")
        if self.secret and (set(payload) != {"type", "timestamp", "data"} or headers["webhook-id"][:4] != "evt_"):
            self.wrong.append(f"not the form of a message: {sorted(payload)}")
        with self.changed:
            self.got.append(Message(handler.path, headers, payload))
            act = self.plan.pop(0) if self.plan else 204
            self.changed.notify_all()
        self._answer(handler, act)

    def _answer(self, handler: BaseHTTPRequestHandler, act: Any) -> None:
        """A status (with headers), or a misdeed."""
        match act:
            case int():
                self._head(handler, act, [])
            case (int() as code, dict() as headers):
                self._head(handler, code, headers.items())
            case "hang":
                self.release.wait(60)
            case "reset":
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                handler.connection.close()
            case "garbage":
                handler.wfile.write(b"<script>alert('stranger')</script>\r\n\r\n")
            case "drip":
                self._drip(handler, b"HTTP/1.1 200 OK\r\nX-Drip: ", b"x")
            case "endless":
                self._drip(handler, b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096)
        handler.close_connection = True

    def _head(self, handler: BaseHTTPRequestHandler, code: int, headers: Iterable[tuple[str, str]]) -> None:
        handler.send_response(code)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0" if code in (204, 304) else "8")
        handler.end_headers()
        if code not in (204, 304):
            handler.wfile.write(b"stranger")

    def _drip(self, handler: BaseHTTPRequestHandler, start: bytes, more: bytes) -> None:
        """Write without end, until the other side hangs up."""
        handler.wfile.write(start)
        while not self.release.wait(0.02):
            handler.wfile.write(more)
