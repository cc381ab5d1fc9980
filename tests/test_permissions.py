"""Every operation of the service × every role × own, foreign and unknown project: allowed exactly when the table says so."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest

fastapi = pytest.importorskip(
    "fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'"
)

from anyio.from_thread import start_blocking_portal
from argon2 import PasswordHasher
from fastapi.testclient import TestClient

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.core.schema import Annotation, Role
from rlhf_workbench.govern import access
from rlhf_workbench.govern.access import PERMISSIONS, make_token, revoke_token
from rlhf_workbench.serve.api import all_routers, create_app
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.limits import Limits
from rlhf_workbench.serve.running import add_parts
from rlhf_workbench.serve.web import GuardedRoute, routes
from rlhf_workbench.store.tables import connect

ROLES = get_args(Role)
GENEROUS = Limits(rate=1e6, burst=1e6, stranger_rate=1e6, stranger_burst=1e6)
SERVICE = Service({"own": connect(":memory:"), "foreign": connect(":memory:")}, limits=GENEROUS)
APP = create_app(SERVICE)
add_parts(APP, SERVICE)
CLIENT = TestClient(APP, raise_server_exceptions=False)
TOKENS = {role: make_token(SERVICE.projects["own"], role, role) for role in ROLES}
OPERATIONS = [
    pytest.param(method, path, operation, id=operation["operationId"])
    for path, methods in APP.openapi()["paths"].items()
    for method, operation in methods.items()
]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Thousands of requests: one event loop for all, and a cheap hash where a secret is unknown."""
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("nobody")
    with start_blocking_portal() as CLIENT.portal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(access, "_decoy", lambda: cheap)
        yield


def ask(method: str, path: str, operation: dict[str, Any], secret: str | None, project: str) -> tuple[int, str]:
    """Status and detail of the answer to a request with the operation's own example."""
    address = re.sub(r"\{[^}]+\}", "none", path.replace("{project}", project))
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        headers["Content-Type"] = next(iter(content))
    answer = CLIENT.request(method, address, headers=headers, content=b"{}" if content else None)
    is_problem = answer.headers.get("content-type", "").startswith("application/problem+json")
    return answer.status_code, answer.json()["detail"] if is_problem else ""


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_operation_has_one_rule(method: str, path: str, operation: dict[str, Any]) -> None:
    assert ("x-permission" in operation) != ("x-public" in operation)
    assert operation.get("x-permission", "prompt:read") in PERMISSIONS["admin"]
    assert ("x-permission" in operation) == ("{project}" in path), "a permission holds in a project"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_allowed_exactly_when_the_table_says_so(method: str, path: str, operation: dict[str, Any], role: Role) -> None:
    status, detail = ask(method, path, operation, TOKENS[role][1], "own")
    permission = operation.get("x-permission")
    is_denied = status == 403 and f"may not {permission} in project own" in detail
    assert status != 401
    assert status < 500 or status == 503, detail
    assert is_denied == (permission is not None and permission not in PERMISSIONS[role]), (status, detail)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path", "operation"), [p for p in OPERATIONS if "x-permission" in p.values[2]])
def test_a_foreign_project_looks_like_none(method: str, path: str, operation: dict[str, Any], role: Role) -> None:
    foreign, unknown = (ask(method, path, operation, TOKENS[role][1], project) for project in ("foreign", "unknown"))
    assert foreign[0] == 404
    assert (foreign[0], foreign[1].replace("foreign", "unknown")) == unknown


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_strangers_get_only_what_is_public(method: str, path: str, operation: dict[str, Any]) -> None:
    answers = {ask(method, path, operation, None, project) for project in ("own", "unknown")}
    if "x-public" in operation:
        assert {status for status, _ in answers} <= {200, 401, 403, 503}
    else:
        assert len(answers) == 1
        assert {status for status, _ in answers} == {401}


def test_a_made_up_token_learns_nothing() -> None:
    made_up = "rlhfw_" + "0" * 32 + "_" + "A" * 43
    answers = [
        CLIENT.get(f"/v1/projects/{project}/prompts", headers={"Authorization": f"Bearer {made_up}"})
        for project in ("own", "unknown")
    ]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].json() == answers[1].json()
    assert "invalid_token" in answers[0].headers["www-authenticate"]


def test_scopes_narrow_a_role() -> None:
    _, secret = make_token(SERVICE.projects["own"], "narrow", "admin", scopes=["prompt:read"])
    headers = {"Authorization": f"Bearer {secret}"}
    assert CLIENT.get("/v1/projects/own/prompts", headers=headers).status_code == 200
    assert CLIENT.get("/v1/projects/own/generations", headers=headers).status_code == 403
    assert CLIENT.post("/v1/projects/own/prompts", headers=headers, json={"text": "a"}).status_code == 403


def test_a_revoked_token_ends_at_once() -> None:
    token, secret = make_token(SERVICE.projects["own"], "short", "researcher")
    headers = {"Authorization": f"Bearer {secret}"}
    assert CLIENT.get("/v1/projects/own/prompts", headers=headers).status_code == 200
    revoke_token(SERVICE.projects["own"], token.id)
    assert CLIENT.get("/v1/projects/own/prompts", headers=headers).status_code == 401


def test_annotators_see_nobodys_answers() -> None:
    vote = Annotation(comparison_id="c", annotator_id="zed", label="first", reason="a-marker-of-zed")
    SERVICE.projects["own"].append(vote)
    for param in OPERATIONS:
        method, path, _ = param.values
        if method != "get" or "{project}" not in path:
            continue
        address = re.sub(r"\{[^}]+\}", vote.id, path.replace("{project}", "own"))
        answer = CLIENT.get(address, headers={"Authorization": f"Bearer {TOKENS['annotator'][1]}"})
        assert "a-marker-of-zed" not in answer.text, path


def test_no_secret_of_a_token_is_ever_shown() -> None:
    for param in OPERATIONS:
        method, path, _ = param.values
        if method == "get":
            address = re.sub(r"\{[^}]+\}", TOKENS["admin"][0].id, path.replace("{project}", "own"))
            text = CLIENT.get(address, headers={"Authorization": f"Bearer {TOKENS['admin'][1]}"}).text
            assert "argon2" not in text, path
            assert TOKENS["admin"][1] not in text, path


def test_a_route_without_a_rule_cannot_be_made() -> None:
    router = routes("test")

    def forgotten() -> None:
        """Somebody forgot the rule."""

    with pytest.raises(InputError, match="needs either a caller"):
        router.get("/forgotten")(forgotten)


def test_no_route_goes_around_the_guard() -> None:
    kinds = {type(route) for router in all_routers() for route in router.routes}
    assert kinds == {GuardedRoute}
