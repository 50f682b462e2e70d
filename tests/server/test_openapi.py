"""The server's OpenAPI document: complete, and true of what the server answers to thousands of odd requests."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.routing import Route

from motet.server.describe import OPERATIONS, document
from motet.server.openai import ChatRequest, CompletionRequest

from .fakes import FakeGenerator, House
from .tenants import Platform, platform


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    return platform(tmp_path_factory.mktemp("platform"), FakeGenerator(["a"]))


@pytest.fixture(scope="module")
def api(served: Platform) -> BaseSchema:
    """What the document says."""
    schema = schemathesis.openapi.from_dict(document(served.house.config))
    schema.app = served.house.app

    return schema


def test_every_route_is_described(house: House) -> None:
    routes = {
        f"{method} {route.path.replace(':path', '')}"
        for route in house.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == set(OPERATIONS)


def test_the_document_is_served(house: House) -> None:
    served: dict[str, Any] = house.get("/openapi.json").json()
    assert served["openapi"] == "3.1.0"
    assert len([method for path in served["paths"].values() for method in path]) == len(OPERATIONS)
    chat = served["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert {"model", "messages"} == set(chat["required"])
    assert chat["properties"]["n"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 1,
        "maximum": house.config.max_n,
    }
    assert chat["properties"]["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert "security" not in served["paths"]["/health"]["get"]
    assert served["paths"]["/metrics"]["get"]["security"] == [{"key": []}]


@pytest.mark.parametrize("shape", [ChatRequest, CompletionRequest])
def test_what_is_refused_is_not_described(shape: type[ChatRequest | CompletionRequest], house: House) -> None:
    properties = document(house.config)["components"]["schemas"][shape.__name__]["properties"]
    assert set(properties) < set(shape.__struct_fields__)
    assert not {"tools", "response_format", "chat_template", "echo", "suffix", "best_of"} & set(properties)


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        pytest.param(operation, mode, id=f"{operation} {mode.value}")
        for operation, described in OPERATIONS.items()
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or described.takes  # without input nothing can be wrong
    ],
)
def test_the_server_does_what_it_says(
    served: Platform, api: BaseSchema, operation: str, mode: GenerationMode
) -> None:
    method, path = operation.split()
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        negative_data_rejection,
        unsupported_method,
    ]

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def keeps_its_word(case: schemathesis.Case[Any]) -> None:
        headers = {**dict(case.headers or {}), "Authorization": f"Bearer {served.admin}"}
        case.call_and_validate(headers=headers, checks=checks)

    keeps_its_word()


def test_and_lives_on(served: Platform) -> None:
    """After all that."""
    assert served.chat(served.acme, model="acme/poet").status_code == 200
    assert served.house.generator.running == 0
    assert served.house.app.state.lifecycle.in_flight == 0
