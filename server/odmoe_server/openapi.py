"""The OpenAPI document: request bodies, which our routes read themselves, and answers that may also be streams.

Knows FastAPI's document and pydantic's schemas; no field of any API.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: it takes this body."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def streamed(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: with `stream`, its answer is events of this kind."""
    schema = {"$ref": _REF.format(model=chunk.__name__)}
    description = "The answer; with `stream`, events that each have a chunk as data, the last one [DONE]."
    return {200: {"description": description, "content": {"text/event-stream": {"itemSchema": schema}}}}


def describe(app: FastAPI, *bodies: type[BaseModel], secured: bool) -> None:
    """Let the document of `app` define these schemas too, which its routes only name."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies, secured=secured)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI documents it


def _document(app: FastAPI, bodies: tuple[type[BaseModel], ...], *, secured: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema([(kind, "validation") for kind in bodies], ref_template=_REF)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which we never answer with
        schemas.pop(unused, None)
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
