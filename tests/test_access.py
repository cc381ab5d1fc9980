"""Nobody gets more than their row says, and nobody gets it for longer."""

import ast
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.cli import main
from rlhf_workbench.core.errors import DeniedError, InputError, MissingError
from rlhf_workbench.core.schema import PRIVATE, RECORDS, Member, Role, Token, new_id, utc_now
from rlhf_workbench.govern import access
from rlhf_workbench.govern.access import (
    PERMISSIONS,
    Identity,
    find_identity,
    invite,
    make_token,
    may,
    member_identity,
    permission_table,
    readable_tables,
    require,
    revoke_member,
    revoke_token,
    right_table,
)
from rlhf_workbench.store.tables import Store, connect

PACKAGE = Path(access.__file__).parent.parent
ROLES = get_args(Role)
ALL = sorted(PERMISSIONS["admin"])
VERBS = sorted({permission.partition(":")[2] for permission in ALL})
SUBSETS = st.frozensets(st.sampled_from(ALL), max_size=6)
EMPTY = connect(":memory:")
WRITES = {p for p in ALL if p.endswith((":write", ":manage", ":run", ":answer", ":freeze", ":backup", ":export"))}


@pytest.fixture
def store() -> Iterator[Store]:
    with connect(":memory:", actor="root") as opened:
        yield opened


def _used_permissions() -> set[tuple[str, str]]:
    """Every string of the package that has the form of a permission, and where it stands."""
    form, found = re.compile(rf"[a-z_]+:({'|'.join(VERBS)})"), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and form.fullmatch(node.value):
                found.add((node.value, str(path.relative_to(PACKAGE))))
    return found


def test_every_permission_that_the_package_names_is_in_the_table() -> None:
    used = _used_permissions()
    assert len(used) > 15
    assert not [(text, place) for text, place in used if text not in PERMISSIONS["admin"]]


def test_every_table_and_every_role_is_in_the_table() -> None:
    assert set(PERMISSIONS) == set(ROLES)
    assert {f"{kind.table}:{verb}" for kind in RECORDS for verb in ("read", "write")} <= PERMISSIONS["admin"]
    shown = permission_table()
    assert list(shown.columns) == list(PERMISSIONS)
    assert set(shown.index) == PERMISSIONS["admin"]


@pytest.mark.parametrize("role", [role for role in ROLES if role != "admin"])
def test_only_an_admin_gives_rights_sees_secrets_or_copies_the_store(role: Role) -> None:
    reserved = {"token:manage", "member:manage", "webhook:manage", "store:backup", "token:write", "member:write"}
    reserved |= {f"{kind.table}:{verb}" for kind in PRIVATE for verb in ("read", "write")}
    assert not PERMISSIONS[role] & reserved
    assert PERMISSIONS[role] < PERMISSIONS["admin"]


def test_each_role_has_what_it_is_for_and_no_more() -> None:
    assert PERMISSIONS["annotator"] == {"queue:answer", "queue:read"}
    assert not PERMISSIONS["auditor"] & WRITES
    assert {"audit:verify", "annotation:read", "member:read"} <= PERMISSIONS["auditor"]
    assert PERMISSIONS["reviewer"] & WRITES == {"decision:write", "alert:write"}
    assert not PERMISSIONS["service"] & {"decision:write", "sql:read", "job:run", "audit:read", "member:read"}
    closed = {"token", "webhook", "member"}
    missing = {p for p in PERMISSIONS["admin"] - PERMISSIONS["researcher"] if p.partition(":")[0] not in closed}
    assert missing == {"store:backup"}


@given(st.sampled_from(ROLES), SUBSETS, st.sampled_from(ALL), st.sampled_from(["pilot", "safety", ""]))
def test_scopes_only_narrow_and_a_foreign_project_is_always_closed(
    role: Role, scopes: frozenset[str], permission: str, project: str
) -> None:
    whole, narrow = Identity("x", role, "pilot"), Identity("x", role, "pilot", scopes)
    assert may(narrow, permission, project) <= may(whole, permission, project)
    assert not (scopes and permission not in scopes and may(narrow, permission, project))
    if project != "pilot":
        assert not may(whole, permission, project)
    assert readable_tables(narrow, project) <= readable_tables(whole, project)
    if may(narrow, permission, project):
        require(narrow, permission, project)
    else:
        with pytest.raises(DeniedError, match=permission):
            require(narrow, permission, project)


@given(st.text(max_size=20))
def test_a_misspelt_permission_stops_instead_of_deciding(text: str) -> None:
    if text not in PERMISSIONS["admin"]:
        with pytest.raises(InputError, match="no permission"):
            may(Identity("x", "admin", "pilot"), text, "pilot")


def test_a_token_is_who_it_was_made_for_and_only_in_its_store(store: Store) -> None:
    token, secret = make_token(store, "nightly", "service", scopes=["prompt:write", "prompt:read"])
    found = find_identity(store, secret, "pilot")
    assert found == Identity("nightly", "service", "pilot", frozenset({"prompt:write", "prompt:read"}), token.id)
    with connect(":memory:") as other, pytest.raises(DeniedError, match="unknown here"):
        find_identity(other, secret, "safety")


@pytest.mark.parametrize(
    ("name", "role", "options", "complaint"),
    [
        ("", "service", {}, "name"),
        ("a\nb", "service", {}, "name"),
        ("x" * 101, "service", {}, "name"),
        ("x", "root", {}, "role must be"),
        ("x", "annotator", {"scopes": ["prompt:read"]}, "only narrow"),
        ("x", "admin", {"scopes": ["prompts:read"]}, "only narrow"),
        ("x", "admin", {"lifetime_s": 0}, "lifetime"),
        ("x", "admin", {"lifetime_s": -1}, "lifetime"),
        ("x", "admin", {"lifetime_s": float("nan")}, "lifetime"),
        ("x", "admin", {"lifetime_s": float("inf")}, "lifetime"),
    ],
)
def test_a_token_that_makes_no_sense_is_not_made(
    store: Store, name: str, role: Any, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        make_token(store, name, role, **options)
    assert store.counts() == {}


def test_a_revoked_token_ends_at_once_also_when_it_was_remembered(store: Store) -> None:
    token, secret = make_token(store, "nightly", "service")
    find_identity(store, secret, "pilot")
    find_identity(store, secret, "pilot")
    gone = revoke_token(store, token.id)
    with pytest.raises(DeniedError, match="revoked"):
        find_identity(store, secret, "pilot")
    assert gone.revoked_at
    assert gone.replaces == token.id
    assert gone.actor == "root"
    assert revoke_token(store, token.id) == revoke_token(store, gone.id) == gone  # a second time changes nothing
    assert store.counts() == {"token": 2}
    assert store.verify().is_intact
    with pytest.raises(MissingError, match="token list"):
        revoke_token(store, "nobody")


def test_no_request_that_begins_after_a_revocation_gets_in(store: Store) -> None:
    """Eight threads ask all the time; the moment of revocation is between two of their calls."""
    token, secret = make_token(store, "nightly", "service")
    is_revoked, warm = threading.Event(), threading.Barrier(9)

    def ask() -> list[bool]:
        wins, after = [], 0
        find_identity(store, secret, "pilot")
        warm.wait(30)
        while after < 5:
            late = is_revoked.is_set()
            after += late
            try:
                find_identity(store, secret, "pilot")
                wins.append(late)
            except DeniedError:
                pass
        return wins

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        warm.wait(30)
        revoke_token(store, token.id)
        is_revoked.set()
        late_wins = [late for answer in asked for late in answer.result(60) if late]
    assert not late_wins


def test_a_token_expires_to_the_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    token, secret = make_token(store, "guest", "reviewer", lifetime_s=3600)
    end = token.expires_at
    assert end
    assert abs(end - utc_now() - timedelta(hours=1)) < timedelta(minutes=5)
    monkeypatch.setattr(access, "utc_now", lambda: end - timedelta(microseconds=1))
    assert find_identity(store, secret, "pilot").name == "guest"
    monkeypatch.setattr(access, "utc_now", lambda: end)
    with pytest.raises(DeniedError, match="expired"):
        find_identity(store, secret, "pilot")


class CountingHasher:
    """The real hasher, counted: how often it worked, and how many threads at once."""

    def __init__(self, real: Any):
        self.real, self.calls, self.at_once, self.most = real, 0, 0, 0
        self.lock = threading.Lock()

    def hash(self, secret: str) -> str:
        return str(self.real.hash(secret))

    def verify(self, known: str, secret: str) -> bool:
        with self.lock:
            self.calls, self.at_once = self.calls + 1, self.at_once + 1
            self.most = max(self.most, self.at_once)
        try:
            return bool(self.real.verify(known, secret))
        finally:
            with self.lock:
                self.at_once -= 1


@pytest.fixture
def hasher(monkeypatch: pytest.MonkeyPatch) -> CountingHasher:
    counting = CountingHasher(access._hasher())
    monkeypatch.setattr(access, "_hasher", lambda: counting)
    access._matched.clear()
    return counting


def _work(hasher: CountingHasher, call: Callable[[], Any]) -> tuple[int, str]:
    """How many hashes a call cost, and what it said."""
    before = hasher.calls
    try:
        call()
    except DeniedError as error:
        return hasher.calls - before, str(error)
    return hasher.calls - before, ""


def test_unknown_wrong_and_revoked_cost_and_say_the_same(store: Store, hasher: CountingHasher) -> None:
    _, right = make_token(store, "a", "service")
    dead, revoked = make_token(store, "b", "service")
    revoke_token(store, dead.id)
    wrong = right[:-1] + ("A" if right[-1] != "A" else "B")
    unknown = f"rlhfw_{new_id().replace('-', '')}_{right[-43:]}"
    answers = {_work(hasher, lambda s=s: find_identity(store, s, "p")) for s in (wrong, unknown, revoked)}
    assert len(answers) == 1
    assert answers.pop()[0] == 1


def test_a_right_secret_is_hashed_once_and_a_wrong_one_never_remembered(store: Store, hasher: CountingHasher) -> None:
    _, secret = make_token(store, "a", "service")
    assert [_work(hasher, lambda: find_identity(store, secret, "p"))[0] for _ in range(3)] == [1, 0, 0]
    make_token(store, "b", "service")  # the table changed; what this secret hashes to did not
    assert _work(hasher, lambda: find_identity(store, secret, "p"))[0] == 0
    wrong = secret[:-5] + "AAAAA"
    assert [_work(hasher, lambda: find_identity(store, wrong, "p"))[0] for _ in range(2)] == [1, 1]


def test_what_was_right_in_one_project_proves_nothing_in_another(store: Store, hasher: CountingHasher) -> None:
    """A row with the same id and another hash, or one that was written as revoked."""
    token, secret = make_token(store, "a", "service")
    find_identity(store, secret, "p")
    for row in (replace(token, secret_hash=hasher.hash("another")), replace(token, revoked_at=utc_now())):
        with connect(":memory:") as other:
            other.append(row)
            with pytest.raises(DeniedError, match="unknown here"):
                find_identity(other, secret, "q")
    assert find_identity(store, secret, "p").name == "a"


def test_at_most_two_hashes_are_computed_at_once(store: Store, hasher: CountingHasher) -> None:
    _, secret = make_token(store, "a", "service")
    wrong = [f"{secret[:-3]}{i:03d}" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(_work, hasher, lambda s=s: find_identity(store, s, "p")) for s in wrong]
        assert all(answer.result(60)[1] for answer in answers)
    assert hasher.calls == 12
    assert hasher.most == 2


def test_what_is_remembered_is_bounded(store: Store, hasher: CountingHasher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_REMEMBERED", 3)
    made = [make_token(store, f"t{i}", "service") for i in range(6)]
    assert [find_identity(store, secret, "p").name for _, secret in made] == [f"t{i}" for i in range(6)]
    assert len(access._matched) == 3
    assert find_identity(store, made[0][1], "p").name == "t0"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=100) | st.from_regex(r"rlhfw_[0-9a-f]{32}_[A-Za-z0-9_-]{42}[^A-Za-z0-9_-]", fullmatch=True))
def test_garbage_is_refused_without_work(text: str) -> None:
    with pytest.raises(DeniedError, match="unknown here"):
        find_identity(EMPTY, text, "pilot")


def test_a_secret_is_in_no_file_no_repr_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with connect(tmp_path / "s.duckdb") as store:
        token, secret = make_token(store, "nightly", "service")
        who = find_identity(store, secret, "pilot")
        with pytest.raises(DeniedError) as wrong:
            find_identity(store, secret[:-1] + "!", "pilot")
        inside = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    after = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    random = secret[-43:]
    assert len(secret) == 82
    assert re.fullmatch(r"rlhfw_[0-9a-f]{32}_[\w-]{43}", secret)
    for text in (repr(token), repr(who), str(wrong.value), caplog.text, repr(access._matched)):
        assert random not in text
        assert random[:-1] not in text
    assert random.encode() not in inside + after
    assert token.secret_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


def test_two_tokens_never_share_a_secret(store: Store) -> None:
    secrets = [make_token(store, "same", "service")[1] for _ in range(20)]
    assert len({secret[-43:] for secret in secrets}) == 20


HERE, THERE = "https://id.example", "https://other.example"


@pytest.mark.parametrize(
    ("invited", "issuer", "claims", "is_in"),
    [
        ("ada@x.org", "", (HERE, "u-1", "ada@x.org"), True),
        ("Ada@X.org", "", (HERE, "u-1", "aDA@x.ORG"), True),
        ("ada@x.org", HERE, (HERE, "u-1", "ada@x.org"), True),
        ("ada@x.org", HERE + "/", (HERE, "u-1", "ada@x.org"), True),  # a slash at the end means nothing
        ("ada@x.org", HERE, (THERE, "u-1", "ada@x.org"), False),  # vouched for by a stranger
        ("ada@x.org", "", (HERE, "u-1", None), False),  # the address was not verified
        ("ada@x.org", "", (HERE, "ada@x.org", None), False),  # an address as a name proves nothing
        ("ada@x.org", HERE, (HERE, "ada@x.org", None), True),  # unless this provider's names were meant
        ("ada@x.org", HERE, (THERE, "ada@x.org", None), False),
        ("u-1", HERE, (HERE, "u-1", None), True),
        ("u-1", "", (HERE, "u-1", None), True),
        ("u-1", HERE, (THERE, "u-1", None), False),
        ("u-1", HERE, (HERE, "U-1", None), False),  # a provider's names are exact
        ("u-1", HERE, (HERE, "u-2", "u-1"), False),
        ("ada@x.org", "", (HERE, "u-1", "ada@x.org.evil"), False),
    ],
)
def test_an_invitation_is_for_one_person(
    store: Store, invited: str, issuer: str, claims: tuple[str, str, str | None], is_in: bool
) -> None:
    invite(store, invited, "reviewer", issuer)
    if is_in:
        assert member_identity(store, *claims, "pilot") == Identity(invited, "reviewer", "pilot")
    else:
        with pytest.raises(DeniedError, match="no member of project pilot"):
            member_identity(store, *claims, "pilot")


def test_a_member_is_revoked_at_once_and_may_come_back_with_another_role(store: Store) -> None:
    member = invite(store, "ada@x.org", "reviewer")
    with pytest.raises(InputError, match="member already"):
        invite(store, "ADA@x.org", "admin")
    assert member_identity(store, HERE, "u-1", "ada@x.org", "pilot").role == "reviewer"
    revoke_member(store, member.id)
    with pytest.raises(DeniedError):
        member_identity(store, HERE, "u-1", "ada@x.org", "pilot")
    invite(store, "ada@x.org", "annotator")
    assert member_identity(store, HERE, "u-1", "ada@x.org", "pilot").role == "annotator"
    assert [m.revoked_at is None for m in store.records(Member)] == [False, True]


def test_nobody_gets_the_name_of_another(store: Store) -> None:
    """What people do is recorded under their name; two with one name could not be told apart."""
    invite(store, "ada@x.org", "reviewer", name="judge-1")
    invite(store, "bob@x.org", "annotator")
    for name in ("judge-1", "bob@x.org", "a\nb"):
        with pytest.raises(InputError, match="name"):
            invite(store, "eve@x.org", "annotator", name=name)
    with pytest.raises(InputError, match="another name"):
        invite(store, "judge-1", "annotator")
    assert member_identity(store, HERE, "u-1", "ada@x.org", "pilot").name == "judge-1"
    invite(store, "eve@x.org", "annotator", name="judge-2")
    assert right_table(store, Member)["name"].tolist() == ["judge-1", "", "judge-2"]


def test_commands_show_a_secret_once_and_say_what_is_wrong_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pilot.duckdb"
    assert main(["token", "new", "x", "--role", "service", "--store", str(file)]) == 2
    assert not file.exists()  # a slip in the name makes no new store
    connect(file).close()
    rest = ["--store", str(file), "--as", "root"]
    capsys.readouterr()
    assert main(["token", "new", "nightly", "--role", "annotator", "--scope", "prompt:read", *rest]) == 2
    assert re.fullmatch(r"rlhfw: scopes only narrow .*\n", capsys.readouterr().err)
    assert main(["token", "new", "nightly", "--role", "service", "--days", "30", *rest]) == 0
    secret = capsys.readouterr().out.rstrip().rpartition(" ")[2]
    with connect(file) as store:
        (token,) = store.records(Token)
        assert find_identity(store, secret, "pilot").token_id == token.id
        assert token.actor == "root"
        assert token.expires_at
        assert abs(token.expires_at - utc_now() - timedelta(days=30)) < timedelta(minutes=5)
    for words in (["token", "list"], ["token", "revoke", token.id], ["token", "list", "--json"]):
        assert main([*words, *(rest if "revoke" in words else rest[:2])]) == 0
    said = capsys.readouterr().out
    assert "nightly" in said
    assert "revoked" in said
    assert secret[-43:] not in said
    assert "argon2" not in said
    assert main(["member", "invite", "ada@x.org", "--role", "root", *rest]) == 2
    with connect(file) as store, pytest.raises(DeniedError):
        find_identity(store, secret, "pilot")


def test_the_list_of_rights_says_what_holds_and_no_secret(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, _ = make_token(store, "dead", "service")
    late, _ = make_token(store, "late", "reviewer", lifetime_s=60)
    make_token(store, "good", "service", scopes=["prompt:read"])
    revoke_token(store, dead.id)
    monkeypatch.setattr(access, "utc_now", lambda: utc_now() + timedelta(minutes=2))
    table = right_table(store, Token)
    assert table[["name", "state"]].values.tolist() == [["dead", "revoked"], ["late", "expired"], ["good", "good"]]
    assert table["id"].tolist()[:2] == [dead.id, late.id]  # the ids with which they were made
    assert "argon2" not in table.to_csv()
    revoke_token(store, table["id"][0])
    assert right_table(store, Member).empty


def test_a_change_past_the_functions_counts_at_once(tmp_path: Path) -> None:
    """Whoever corrects the row, the memory notices."""
    with connect(tmp_path / "s.duckdb") as one:
        token, secret = make_token(one, "a", "service")
        find_identity(one, secret, "p")
        fresh = replace(token, id=new_id(), replaces=token.id, revoked_at=utc_now())
        one.append(fresh)  # not through revoke_token
        with pytest.raises(DeniedError):
            find_identity(one, secret, "p")
        assert one.records(Token) == [fresh]
