"""Whatever fits the OpenAPI (and some of what does not) is answered with a documented status, as each role."""

from typing import Any, get_args

import pytest

schemathesis = pytest.importorskip(
    "schemathesis", reason="the extra `dev` is not installed: pip install 'rlhf_workbench[dev]'"
)

from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from rlhf_workbench.core.schema import Role
from rlhf_workbench.govern.access import make_token
from rlhf_workbench.serve.api import create_app
from rlhf_workbench.serve.bulk import ARROW, LINES
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.limits import Limits
from rlhf_workbench.serve.running import add_parts
from rlhf_workbench.store.tables import connect

ROLES = get_args(Role)
LIMITS = Limits(rate=1e6, burst=1e6, stranger_rate=1e6, stranger_burst=1e6)
SERVICE = Service({"pilot": connect(":memory:")}, limits=LIMITS)
APP = create_app(SERVICE)
add_parts(APP, SERVICE)
SECRETS = {role: make_token(SERVICE.projects["pilot"], role, role)[1] for role in ROLES}
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
BOUNDED = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@schemathesis.serializer(ARROW, LINES, "application/octet-stream")
def send_bytes(_: Any, value: Any) -> Any:
    """Bodies that are no JSON go as they are."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@SCHEMA.exclude(path_regex="/events$").parametrize()  # a line that stays open
@BOUNDED
def test_every_answer_is_documented(case: Any) -> None:
    if "project" in (case.path_parameters or {}):
        case.path_parameters["project"] = "pilot"
    for role in ROLES:
        case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {SECRETS[role]}"})
