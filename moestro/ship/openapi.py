"""The OpenAPI 3.1 document, made from the same list as the routes, so that the two cannot differ."""

import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moestro import __version__

Table = dict[str, Any]
MEDIA = {"json": "application/json", "bytes": "application/octet-stream", "text": "text/plain"}
REASONS = {
    400: "a value is wrong",
    401: "the token is missing, unknown or expired",
    403: "the token lacks the right",
    404: "unknown",
    409: "not now: missing parts, or there already",
    410: "revoked",
    413: "too large",
    416: "outside the file",
    422: "the content is wrong",
    429: "too often; see Retry-After",
}
BODIES: dict[str, Table] = {
    "publish": {
        "type": "object",
        "required": ["manifest"],
        "properties": {
            "manifest": {"type": "string", "contentEncoding": "base64"},
            "signature": {"type": "string", "contentEncoding": "base64"},
        },
    },
    "open_upload": {
        "type": "object",
        "required": ["package_id", "root", "size", "hash", "chunk_size"],
        "properties": {
            "package_id": {"type": "string"},
            "root": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "size": {"type": "integer", "minimum": 0},
            "hash": {"enum": ["sha256", "blake3", "sm3"]},
            "chunk_size": {"type": "integer"},
        },
    },
    "report": {
        "type": "object",
        "required": ["package_id", "sequence", "state"],
        "properties": {
            "package_id": {"type": "string"},
            "sequence": {"type": "integer", "minimum": 1},
            "state": {"type": "string"},
            "weights_root": {"type": "string"},
        },
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """A method on a path."""

    method: str
    path: str
    """As Starlette writes it: `{name}` or `{name:int}`."""
    handler: Callable[..., Awaitable[Any]]
    status: int = 200
    query: tuple[str, ...] = ()
    body: str = ""
    """`json`, `bytes` or nothing."""
    answer: str = "json"
    errors: tuple[int, ...] = ()
    open: bool = False
    """Needs no token."""


def document(operations: Sequence[Operation]) -> Table:
    """The description of all of them."""
    paths: dict[str, Table] = {}
    for item in operations:
        path = re.sub(r":int\}", "}", item.path)
        paths.setdefault(path, {})[item.method.lower()] = _operation(item)
    problem = {"type": "object", "properties": {name: {"type": "string"} for name in ("type", "title", "detail")}}
    problem["properties"]["status"] = {"type": "integer"}  # type: ignore[index]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "moestro package store",
            "version": __version__,
            "description": "Packages as manifests and content-addressed files in verified chunks.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Problem": problem},
        },
    }


def _operation(item: Operation) -> Table:
    name = item.handler.__name__
    table: Table = {
        "operationId": f"{item.method.lower()}_{name}",
        "summary": inspect.getdoc(item.handler),
        "parameters": _parameters(item),
        "responses": _responses(item),
        "security": [] if item.open else [{"token": []}, {}],
    }
    if item.body:
        schema = BODIES.get(name, {}) if item.body == "json" else {}
        table["requestBody"] = {"required": True, "content": {MEDIA[item.body]: {"schema": schema}}}
    return table


def _parameters(item: Operation) -> list[Table]:
    places = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "integer" if kind else "string"}}
        for name, kind in re.findall(r"\{(\w+)(:int)?\}", item.path)
    ]
    return places + [{"name": name, "in": "query", "schema": {"type": "string"}} for name in item.query]


def _responses(item: Operation) -> Table:
    content: Table = (
        {} if item.status == 204 or item.method == "HEAD" else {"content": {MEDIA[item.answer]: {"schema": {}}}}
    )
    responses: Table = {str(item.status): {"description": "done", **content}}
    if item.handler.__name__ == "blob":
        responses |= {"206": {"description": "a range", **content}, "304": {"description": "unchanged"}}
    refused = () if item.open else (401, 429)
    for status in sorted({*item.errors, *refused, *((400,) if item.query else ())}):
        responses[str(status)] = {
            "description": REASONS[status],
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    return responses
