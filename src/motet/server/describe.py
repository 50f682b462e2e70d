"""The server's own OpenAPI document, made from the types that requests are parsed into and answers are made of.

What OpenAI documents and this server refuses is left out of the schemas, which allow no other fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec

from motet.config import ServerConfig
from motet.server.admin import LoadRequest, UnloadRequest
from motet.server.failures import ErrorBody
from motet.server.gate import PUBLIC, RULES
from motet.server.openai import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    ModelCard,
    ModelList,
)
from motet.server.prefetch import AdapterState, AdapterStates
from motet.server.sampling import ABOVE_ZERO, RANGES

Schema = dict[str, Any]
_JSON = "application/json"


class Status(msgspec.Struct, frozen=True):
    status: str


class Version(msgspec.Struct, frozen=True):
    version: str


@dataclass(frozen=True)
class Operation:
    """What a route takes and answers; `streams` is the type of its events, `fails` are its error statuses."""

    summary: str
    answers: Any
    takes: Any = None
    streams: Any = None
    fails: tuple[int, ...] = ()


_BODY = (400, 408, 413, 415)
_GENERATE = (*_BODY, 404, 429, 500, 503, 504)
OPERATIONS = {
    "POST /v1/chat/completions": Operation(
        "Answer a conversation, whole or as events",
        Answer[ChatChoice],
        ChatRequest,
        Answer[ChatChunkChoice],
        _GENERATE,
    ),
    "POST /v1/completions": Operation(
        "Continue one text or several, whole or as events",
        Answer[CompletionChoice],
        CompletionRequest,
        Answer[CompletionChoice],
        _GENERATE,
    ),
    "GET /v1/models": Operation("The base model and the adapters that the key may use", ModelList),
    "GET /v1/models/{model}": Operation("One of them", ModelCard, fails=(404,)),
    "POST /v1/load_lora_adapter": Operation(
        "Serve an adapter of the server's disk under a name",
        ModelCard,
        LoadRequest,
        fails=(*_BODY, 409, 422, 500, 503, 507),
    ),
    "POST /v1/unload_lora_adapter": Operation(
        "Stop serving a name; requests under way finish", ModelCard, UnloadRequest, fails=(*_BODY, 404, 503)
    ),
    "GET /v1/adapters": Operation("Where the adapters are", AdapterStates, fails=(503,)),
    "POST /v1/adapters/{model}/prefetch": Operation(
        "Load an adapter soon, if there is room that nobody wants", AdapterState, fails=(400, 404, 503)
    ),
    "POST /v1/adapters/{model}/pin": Operation("Never evict an adapter", AdapterState, fails=(400, 404, 503)),
    "POST /v1/adapters/{model}/unpin": Operation("Do so again", AdapterState, fails=(400, 404, 503)),
    "GET /health": Operation("Whether the server is alive", Status, fails=(503,)),
    "GET /ready": Operation("Whether the server wants requests", Status, fails=(503,)),
    "GET /version": Operation("The server's version", Version),
    "GET /metrics": Operation("Prometheus metrics", str),
    "GET /openapi.json": Operation("This document", dict[str, Any]),
}
"""By method and path, parameters as OpenAPI writes them."""


def document(config: ServerConfig) -> Schema:
    """OpenAPI 3.1 of a server with this config."""
    types = {
        shape: None for op in OPERATIONS.values() for shape in (op.takes, op.answers, op.streams) if shape
    }
    types[ErrorBody] = None
    found, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(types, found, strict=True))
    for component in components.values():
        _without_unsupported(component)
    for name in ("ChatRequest", "CompletionRequest"):
        _bound(components[name]["properties"], config)
    paths: dict[str, Schema] = {}
    for key, operation in OPERATIONS.items():
        method, path = key.split()
        paths.setdefault(path, {})[method.lower()] = _operation(key, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Motet", "version": version("motet")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(key: str, operation: Operation, schemas: dict[Any, Schema]) -> Schema:
    public = RULES[key.replace("{model}", "{model:path}")] is PUBLIC
    text = operation.answers is str
    content = {"text/plain" if text else _JSON: {"schema": schemas[operation.answers]}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}, "x-events": schemas[operation.streams]}
    responses: Schema = {"200": {"description": "Done", "content": content}}
    for status in sorted({*operation.fails, *(() if public else (401, 403))}):
        responses[str(status)] = {
            "description": "Refused",
            "content": {_JSON: {"schema": schemas[ErrorBody]}},
        }
    described: Schema = {"summary": operation.summary, "responses": responses}
    if not public:
        described["security"] = [{"key": []}]
    if operation.takes:
        described["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": schemas[operation.takes]}},
        }
    if "{model}" in key:
        parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        described["parameters"] = [parameter]
    return described


def _without_unsupported(component: Schema) -> None:
    """Fields of any type are those that are refused."""
    properties: Schema = component.get("properties", {})
    for name in [name for name, schema in properties.items() if schema == {}]:
        del properties[name]


def _bound(properties: Schema, config: ServerConfig) -> None:
    """The ranges that sampling fields are held to."""
    logprobs = "logprobs" if "prompt" in properties else "top_logprobs"
    for name, (low, high) in {**RANGES, "n": (1, config.max_n), logprobs: (0, config.max_logprobs)}.items():
        for branch in properties.get(name, {}).get("anyOf", ()):
            if branch["type"] != "null":
                branch["exclusiveMinimum" if name in ABOVE_ZERO else "minimum"] = low
                branch["maximum"] = high
