"""The OpenAPI description of the server, at /openapi.json: bodies from `protocol`, answers in outline."""

from typing import Any

from pydantic.json_schema import models_json_schema

from kvq_core.server.protocol import IGNORED, NEUTRAL, ChatRequest, CompletionRequest

REF = "#/components/schemas/{model}"
STATUSES = {
    "400": "The request is wrong, or its tokens don't fit.",
    "401": "The API key is wrong or missing.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "429": "As many requests as the server takes are open.",
    "500": "The engine died while it worked on this.",
    "503": "The server is shutting down, or its engine died.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def description() -> dict[str, Any]:
    """OpenAPI 3.1 of every route."""
    _, schemas = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=REF
    )
    components = schemas["$defs"] | {"Error": ERROR}
    for name in ("CompletionRequest", "ChatRequest"):
        components[name]["properties"] |= {field: {} for field in sorted(IGNORED)}
        components[name]["properties"] |= {
            field: {"enum": [None, *values]} for field, values in NEUTRAL.items()
        }
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    key: dict[str, Any] = {"security": [{"key": []}, {}]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvq", "version": "1"},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "paths": {
            "/health": {"get": _operation("Whether the server takes requests.", "503")},
            "/metrics": {"get": _operation("Figures for Prometheus.", kind="text/plain")},
            "/v1/models": {"get": key | _operation("The one model.", "401")},
            "/v1/models/{model}": {
                "get": key | _operation("The model.", "401", "404") | {"parameters": [model]}
            },
            "/v1/completions": {"post": key | _generation("CompletionRequest", "Continue prompts.")},
            "/v1/chat/completions": {"post": key | _generation("ChatRequest", "Answer a conversation.")},
        },
    }


def _operation(summary: str, *statuses: str, kind: str = "application/json") -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    done = {"200": {"description": "Done.", "content": {kind: {}}}}
    return {
        "summary": summary,
        "responses": done | {s: {"description": STATUSES[s], "content": error} for s in statuses},
    }


def _generation(body: str, summary: str) -> dict[str, Any]:
    operation = _operation(summary, *STATUSES)
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    schema = {"schema": {"$ref": REF.format(model=body)}}
    return operation | {"requestBody": {"required": True, "content": {"application/json": schema}}}
