"""Nothing is sent into our own network, however the address is dressed up."""

import datetime
import ipaddress
import socket
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from receiver import LOOPBACK, Receiver

from rlhf_workbench.core.errors import DeniedError, InputError, WorkbenchError
from rlhf_workbench.govern.outbound import (
    SendRules,
    allowed_addresses,
    is_public,
    post,
    read_target,
    retry_after_s,
    rules_from_environment,
)

NAMES = {
    "private.example": ["10.1.2.3"],
    "loop.example": ["127.0.0.1"],
    "mixed.example": ["9.9.9.9", "192.168.0.1"],
    "six.example": ["fd00::1"],
    "mapped.example": ["::ffff:169.254.169.254"],
    "zone.example": ["fe80::1%2"],
    "cloud.example": ["169.254.169.254"],
    "nothing.example": [],
    "public.example": ["9.9.9.9"],
}
HOSTILE = [
    *("https://127.0.0.1/", "https://127.1/", "https://127.0.1/", "https://2130706433/", "https://0x7f000001/"),
    *("https://0x7f.0.0.1/", "https://0177.0.0.1/", "https://017700000001/", "https://127.0.0.1./", "https://0/"),
    *("https://0.0.0.0/", "https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.1.1/", "https://100.64.0.1/"),
    *("https://169.254.169.254/latest/meta-data/", "https://168.63.129.16/", "https://224.0.0.1/"),
    *("https://255.255.255.255/", "https://240.0.0.1/", "https://198.18.0.1/", "https://192.0.0.170/"),
    *("https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/"),
    *("https://[0:0:0:0:0:ffff:a00:1]/", "https://[::ffff:9.9.9.9]/", "https://[::127.0.0.1]/", "https://[fe80::1]/"),
    *("https://[fe80::1%25eth0]/", "https://[fc00::1]/", "https://[fec0::1]/", "https://[ff02::1]/"),
    *("https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://[2001:0:7f00:1::]/", "https://[2001:db8::1]/"),
    *("https://[::1", "https://[127.0.0.1]/", "https://[v1.x]/", "https://localhost/", "https://LOCALHOST/"),
    *("https://a.localhost/", "https://metadata.google.internal/", "https://printer.local/", "https://x.onion/"),
    *("https://private.example/", "https://loop.example/", "https://mixed.example/", "https://six.example/"),
    *("https://mapped.example/", "https://zone.example/", "https://cloud.example/", "https://nothing.example/"),
    *("https://public.example@127.0.0.1/", "https://user:word@public.example/", "https://@public.example/"),
    *(
        "https://127.0.0.1\\@public.example/",
        "https://public.example\\@127.0.0.1/",
        "https://127.0.0.1%00.public.example/",
    ),
    *("https://127.0.0.1#@public.example/", "https://public.example#x", "https://public.example:443@127.0.0.1/"),
    *(
        "https://loc\u0430lhost/",
        "https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
        "https://①②⑦.⓪.⓪.①/",
        "https://127。0。0。1/",
        "https://пример.example/",
    ),
    *(
        "https://public.example\u200b/",
        "https://%6c%6f%63%61%6c%68%6f%73%74/",
        "https://public_example/",
        "https://-a.example/",
    ),
    *("http://public.example/", "ftp://public.example/", "file:///etc/passwd", "gopher://public.example:443/"),
    *("javascript:alert(1)", "data:text/plain,x", "unix:///run/docker.sock", "//public.example/", "public.example", ""),
    *("https:public.example", "https:/public.example", "https:///public.example", "https://", "https://:443/"),
    *(
        "https://public.example:22/",
        "https://public.example:0/",
        "https://public.example:6379/",
        "https://public.example:/",
    ),
    *("https://public.example:99999/", "https://public.example:4٤3/", "https://public.example:-1/"),
    *(
        "https://public.example/\r\nX-Evil: 1",
        "https://public.example/ x",
        " https://public.example/",
        "https://public.example/\t",
    ),
    "https://public.example/" + "x" * 2000,
    "https://" + "a." * 140 + "example/",
]
FRIENDLY = [
    *(
        "https://public.example/",
        "https://public.example:8443/hook?token=x%20y",
        "https://9.9.9.9/",
        "HTTPS://Public.Example/",
    ),
    *("https://[2620:fe::fe]/", "https://xn--e1afmkfd.public.example/"),
]


def _names(host: str, port: int) -> list[str]:
    return NAMES.get(host, ["9.9.9.9"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every connection that was tried; none succeeds."""
    tried: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        tried.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def test_the_table_is_long_enough() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) >= 40


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_address_is_refused_before_any_connection(url: str, calls: list[tuple[str, int]]) -> None:
    answer = post(url, b"{}", {}, rules=SendRules(), resolve=_names)
    assert answer.code is None
    assert answer.error
    assert calls == []


@pytest.mark.parametrize("url", FRIENDLY)
def test_a_friendly_address_is_called_where_it_was_found(url: str, calls: list[tuple[str, int]]) -> None:
    answer = post(url, b"{}", {}, rules=SendRules(), resolve=_names)
    assert "Connection refused" in str(answer.error)
    target = read_target(url, SendRules())
    assert calls == [(allowed_addresses(target, SendRules(), _names)[0], target.port)]


def test_a_name_that_changes_its_mind_gains_nothing(calls: list[tuple[str, int]]) -> None:
    answers = iter([["9.9.9.9"], ["127.0.0.1"], ["127.0.0.1"]])
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    post("https://rebind.example/", b"{}", {}, rules=SendRules(), resolve=rebinding)
    assert asked == ["rebind.example"]
    assert calls == [("9.9.9.9", 443)]


def test_the_system_resolver_is_the_one_that_is_checked(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def name_service(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.7.7", port))]

    monkeypatch.setattr(socket, "getaddrinfo", name_service)
    assert "192.168.7.7" in str(post("https://intra.example/", b"{}", {}, rules=SendRules()).error)
    assert calls == []


PRIVATE_V4 = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"]
PRIVATE_V4 += ["192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3", "192.0.2.0/24"]
ADDRESS = st.sampled_from(PRIVATE_V4).flatmap(lambda network: st.ip_addresses(v=4, network=network))


@given(address=ADDRESS)
def test_no_dress_of_a_private_address_is_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for network in ("::/96", "::ffff:0:0/96", "64:ff9b::/96"):
        assert not is_public(str(ipaddress.IPv6Address(int(ipaddress.ip_network(network)[0]) | number)))
    assert not is_public(str(ipaddress.IPv6Address(0x2002 << 112 | number << 80)))
    octal = ".".join(f"0{int(part):o}" for part in str(address).split("."))
    for host in (str(address), str(number), hex(number), f"0{number:o}", octal):
        with pytest.raises(WorkbenchError):
            read_target(f"https://{host}/", SendRules())


@given(address=st.ip_addresses(v=6))
def test_no_ipv6_address_outside_the_public_block_is_public(address: ipaddress.IPv6Address) -> None:
    if int(address) >> 125 != 1:
        assert not is_public(str(address))


def test_the_operator_can_allow_a_host_a_network_a_port_and_http() -> None:
    rules = SendRules(frozenset({"loop.example"}), (ipaddress.ip_network("10.0.0.0/8"),), frozenset({9000}), True)
    for url in ("http://loop.example:9000/", "https://private.example:9000/", "http://10.1.1.1:9000/"):
        assert allowed_addresses(read_target(url, rules), rules, _names)
    with pytest.raises(DeniedError, match=r"169\.254\.169\.254"):
        allowed_addresses(read_target("https://cloud.example:9000/", rules), rules, _names)
    with pytest.raises(DeniedError, match="port 443"):
        read_target("https://loop.example/", rules)


def test_rules_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rules_from_environment() == SendRules()
    monkeypatch.setenv("RLHFW_WEBHOOK_ALLOW", "Hooks.intra, 10.2.0.0/16")
    monkeypatch.setenv("RLHFW_WEBHOOK_PORTS", "443, 9000")
    monkeypatch.setenv("RLHFW_WEBHOOK_HTTP", "1")
    networks = (ipaddress.ip_network("10.2.0.0/16"),)
    assert rules_from_environment() == SendRules(frozenset({"hooks.intra"}), networks, frozenset({443, 9000}), True)
    for name, value in [
        ("ALLOW", "10.2.0.1/16"),
        ("ALLOW", "a b/c"),
        ("ALLOW", "127.1"),
        ("PORTS", "http"),
        ("PORTS", "0"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(InputError, match=f"RLHFW_WEBHOOK_{name}"):
            patch.setenv(f"RLHFW_WEBHOOK_{name}", value)
            rules_from_environment()


@pytest.mark.parametrize(
    ("act", "code", "error"),
    [
        (204, 204, None),
        (500, 500, "HTTP 500"),
        (404, 404, "HTTP 404"),
        ((302, {"Location": "/elsewhere"}), 302, "HTTP 302"),
        ((307, {"Location": "http://127.0.0.1/elsewhere"}), 307, "HTTP 307"),
        ("reset", None, "the connection broke off (ReadError)"),
        ("garbage", None, "the connection broke off (RemoteProtocolError)"),
        ("hang", None, "no answer within 0.4 s"),
        ("drip", None, "no answer within 0.4 s"),
        ("endless", 200, None),
    ],
)
def test_whatever_a_receiver_does_is_an_answer(act: object, code: int | None, error: str | None) -> None:
    with Receiver(plan=[act]) as receiver:
        answer = post(
            receiver.url, b"{}", {"content-type": "application/json"}, rules=LOOPBACK, timeout_s=0.4 if error else 30
        )
        assert (answer.code, answer.error) == (code, error)
        assert len(receiver.got) == 1, "a redirect was followed"
        assert receiver.wrong == []


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        assert "cannot connect" in str(post(url, b"{}", {}, rules=LOOPBACK).error)


def test_no_proxy_and_no_netrc_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ada password marker\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with Receiver() as receiver:
        assert post(receiver.url, b"{}", {"content-type": "application/json"}, rules=LOOPBACK).code == 204
        assert "authorization" not in receiver.got[0].headers


def _certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for a name, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False).sign(key, hashes.SHA256())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return folder / "cert.pem", server


def test_the_certificate_is_checked_against_the_name_although_the_address_is_pinned(tmp_path: Path) -> None:
    trusted, server = _certificate(tmp_path, "hooks.example")
    client = ssl.create_default_context(cafile=str(trusted))
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)  # type: ignore[assignment]
    with Receiver(context=server) as receiver:

        def send(host: str, context: ssl.SSLContext | None = client) -> str:
            url = f"https://{host}:{receiver.port}{receiver.path}"
            headers = {"content-type": "application/json"}
            return str(
                post(url, b"{}", headers, rules=LOOPBACK, resolve=lambda *_: ["127.0.0.1"], context=context).error
            )

        assert send("hooks.example") == "None"
        assert receiver.got[0].headers["host"] == f"hooks.example:{receiver.port}"
        assert "CERTIFICATE_VERIFY_FAILED" in send("other.example")
        assert "CERTIFICATE_VERIFY_FAILED" in send("hooks.example", None)
        assert asked == ["hooks.example", "other.example", "hooks.example"]
        assert len(receiver.got) == 1


NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@given(text=st.text(max_size=40) | st.integers(-10, 10**9).map(str))
def test_retry_after_is_a_time_within_a_day_or_nothing(text: str) -> None:
    seconds = retry_after_s(text, NOW)
    assert seconds is None or 0 <= seconds <= 86400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        ("999999999", 86400),
        ("-1", None),
        ("1.5", None),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30),
        ("Wed, 31 Dec 2025 00:00:00 GMT", 0),
        ("٣", None),
        ("", None),
    ],
)
def test_retry_after_is_read_as_written(text: str, seconds: float | None) -> None:
    assert retry_after_s(text, NOW) == seconds
