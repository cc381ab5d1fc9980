"""The OpenAPI is complete: what goes in and comes out has an example that fits, and waiting is explained."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'")
jsonschema = pytest.importorskip("jsonschema", reason="the extra `dev` is not installed")

from rlhf_workbench.serve.api import create_app
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.limits import Limits
from rlhf_workbench.serve.running import add_parts
from rlhf_workbench.store.tables import connect

SERVICE = Service({"pilot": connect(":memory:")}, limits=Limits())
APP = create_app(SERVICE)
add_parts(APP, SERVICE)
DOCUMENT = APP.openapi()
PARTS = DOCUMENT["components"]


def _is_json(form: str) -> bool:
    return form == "application/json" or form.endswith("+json")


def _contents() -> Iterator[Any]:
    """Every JSON body and every JSON answer of a success."""
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            places = {"body": operation.get("requestBody", {})}
            places |= {code: answer for code, answer in operation["responses"].items() if code.startswith("2")}
            for place, found in places.items():
                for form, content in found.get("content", {}).items():
                    if _is_json(form):
                        yield pytest.param(content, id=f"{method} {path} {place}")


CONTENTS = list(_contents())


def test_all_operations_are_walked() -> None:
    assert len(CONTENTS) > 150
    assert sum("body" in str(case.id) for case in CONTENTS) > 25


@pytest.mark.parametrize("content", CONTENTS)
def test_what_goes_in_and_comes_out_has_an_example_that_fits(content: dict[str, Any]) -> None:
    assert set(content["schema"]) - {"title"}, "the schema says nothing; give the route a response_model"
    assert "example" in content
    schema = {**content["schema"], "components": PARTS}
    checker = jsonschema.FormatChecker(formats=["date-time"])
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    assert [error.message for error in validator.iter_errors(content["example"])] == []


def test_who_must_wait_is_told_where_it_says_how_long() -> None:
    n_found = 0
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            if "429" in operation["responses"]:
                header = operation["responses"]["429"]["headers"]["Retry-After"]
                assert header["schema"]["type"] == "integer"
                n_found += 1
    assert n_found > 150


def test_a_shape_in_the_document_is_one_that_exists() -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    named = {reference.rpartition("/")[2] for reference in references(DOCUMENT)}
    assert named <= set(PARTS["schemas"])
