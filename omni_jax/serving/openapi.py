"""The OpenAPI description of the server, and a page that shows it."""

from __future__ import annotations

import html
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from omni_jax.serving.http_page import PAGE_HEADERS
from omni_jax.serving.openapi_schemas import SCHEMAS
from omni_jax.serving.service import Service

_JSON = "application/json"
_FORM = "multipart/form-data"
_EVENTS = "text/event-stream"
_ERRORS = {
    400: "What was sent cannot be served; the message names it and the limit.",
    401: "The key is missing or wrong.",
    403: "A page of this origin may not ask.",
    404: "There is nothing of this name.",
    409: "There is something of this name already, or it is in another state.",
    413: "The body is over the limit.",
    503: "There is no room for another request, or the server is about to end; try again.",
}
_ALWAYS = (401, 403)


def describe_api(service: Service) -> dict[str, Any]:
    """The description, an object of OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "omni_jax",
            "version": "1",
            "description": f"The model {service.spec.model_name} behind OpenAI's API; docs/http.md says what differs.",
        },
        "paths": PATHS,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


async def get_description(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(describe_api(request.app.state.service))


async def get_documentation(request: Request) -> Response:
    """GET /docs."""
    description = describe_api(request.app.state.service)
    return HTMLResponse(_render(description), headers=PAGE_HEADERS)


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(name: str, content_type: str = _JSON) -> dict[str, Any]:
    return {"required": True, "content": {content_type: {"schema": _reference(name)}}}


def _operation(
    name: str,
    about: str,
    answer: dict[str, Any] | None,
    *,
    body: dict[str, Any] | None = None,
    errors: tuple[int, ...] = (),
    parameters: tuple[str, ...] = (),
    is_open: bool = False,
) -> dict[str, Any]:
    """An operation.

    Args:
      name: of it.
      about: in a sentence.
      answer: by content type, the schema of what comes with status 200.
      body: of the request.
      errors: statuses that it may have beside those that all have.
      parameters: of the path.
      is_open: whether it needs no key.
    """
    content = {kind: {"schema": schema} for kind, schema in (answer or {}).items()}
    responses: dict[str, Any] = {"200": {"description": "As asked.", "content": content}}
    for status in sorted({*errors, *_ALWAYS}):
        schema = {_JSON: {"schema": _reference("Error")}}
        responses[str(status)] = {"description": _ERRORS[status], "content": schema}
    values: dict[str, Any] = {"operationId": name, "summary": about, "responses": responses}
    if body is not None:
        values["requestBody"] = body
    if parameters:
        values["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for parameter in parameters
        ]
    if not is_open:
        values["security"] = [{"key": []}, {}]
    return values


def _object(name: str) -> dict[str, Any]:
    return {_JSON: _reference(name)}


_ANY_TEXT = {"type": "string"}
# of each, as OpenAPI has it from 3.2 on
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_BYTES = {"type": "string", "format": "binary"}
_MADE = (400, 404, 413, 503)

PATHS: dict[str, Any] = {
    "/v1/chat/completions": {
        "post": _operation(
            "createChatCompletion",
            "Answers a dialogue in text, and in speech if modalities ask for it; with stream, piece by piece.",
            {_JSON: _reference("ChatCompletion"), _EVENTS: _EVENT},
            body=_body("ChatRequest"),
            errors=_MADE,
        )
    },
    "/v1/audio/speech": {
        "post": _operation(
            "createSpeech",
            "Speaks a text; its bytes come as they are made.",
            {"audio/*": _BYTES, _EVENTS: _EVENT},
            body=_body("SpeechRequest"),
            errors=_MADE,
        )
    },
    "/v1/audio/transcriptions": {
        "post": _operation(
            "createTranscription",
            "Writes down what is said in a file.",
            {_JSON: _reference("Transcription"), "text/plain": _ANY_TEXT, _EVENTS: _EVENT},
            body=_body("TranscriptionRequest", _FORM),
            errors=_MADE,
        )
    },
    "/v1/audio/voices": {
        "get": _operation("listVoices", "The voices.", _object("VoiceList")),
        "post": _operation(
            "createVoice",
            "Adds the voice of a recording, whose speaker has agreed to it.",
            _object("Voice"),
            body=_body("VoiceRequest", _FORM),
            errors=(400, 409, 413, 503),
        ),
    },
    "/v1/audio/voices/{name}": {
        "delete": _operation(
            "deleteVoice",
            "Forgets a voice that was added.",
            _object("Deleted"),
            errors=(404, 409),
            parameters=("name",),
        )
    },
    "/v1/files": {
        "get": _operation("listFiles", "The files.", _object("FileList")),
        "post": _operation(
            "createFile",
            "Keeps a file of requests for a batch.",
            _object("File"),
            body=_body("FileRequest", _FORM),
            errors=(400, 413, 503),
        ),
    },
    "/v1/files/{id}": {
        "get": _operation("retrieveFile", "A file.", _object("File"), errors=(404,), parameters=("id",)),
        "delete": _operation("deleteFile", "Removes a file.", _object("Deleted"), errors=(404,), parameters=("id",)),
    },
    "/v1/files/{id}/content": {
        "get": _operation(
            "downloadFile",
            "What is in a file.",
            {"application/octet-stream": _BYTES},
            errors=(404,),
            parameters=("id",),
        )
    },
    "/v1/batches": {
        "get": _operation("listBatches", "The batches.", _object("BatchList")),
        "post": _operation(
            "createBatch",
            "Answers the requests of a file beside everything else.",
            _object("Batch"),
            body=_body("BatchRequest"),
            errors=(400, 404, 409, 413),
        ),
    },
    "/v1/batches/{id}": {
        "get": _operation("retrieveBatch", "A batch.", _object("Batch"), errors=(404,), parameters=("id",))
    },
    "/v1/batches/{id}/cancel": {
        "post": _operation(
            "cancelBatch",
            "Ends a batch after the requests that are worked on.",
            _object("Batch"),
            errors=(404, 409),
            parameters=("id",),
        )
    },
    "/v1/models": {"get": _operation("listModels", "The model, and its adapters.", _object("ModelList"))},
    "/v1/models/{name}": {
        "get": _operation("retrieveModel", "A model.", _object("Model"), errors=(404,), parameters=("name",))
    },
    "/health": {
        "get": _operation(
            "getHealth", "Whether the engine runs.", {_JSON: {"type": "object"}}, errors=(503,), is_open=True
        )
    },
    "/ready": {
        "get": _operation(
            "getReady", "Whether a request would be taken.", {_JSON: {"type": "object"}}, errors=(503,), is_open=True
        )
    },
    "/metrics": {"get": _operation("getMetrics", "Counters for Prometheus.", {"text/plain": _ANY_TEXT}, is_open=True)},
}


def _render(description: dict[str, Any]) -> str:
    """The description as a page without scripts."""
    info = description["info"]
    parts = [f"<h1>{html.escape(info['title'])}</h1><p>{html.escape(info['description'])}</p>"]
    parts.append('<p>As a file: <a href="/openapi.json">/openapi.json</a></p>')
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                parts.append(_render_schema(_follow(content["schema"])))
            statuses = ", ".join(operation["responses"])
            parts.append(f"<p>Answers with {html.escape(statuses)}.</p>")
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>omni_jax: API</title>'
    head += '<link rel="stylesheet" href="/page/style.css">'
    return f'<!doctype html><html lang="en"><head>{head}</head><body class="document"><main>{body}</main></body></html>'


def _follow(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return SCHEMAS[name] if name else schema


def _render_schema(schema: dict[str, Any]) -> str:
    rows = []
    for name, value in schema.get("properties", {}).items():
        needed = " (needed)" if name in schema.get("required", ()) else ""
        about = html.escape(_follow(value).get("description", ""))
        rows.append(f"<tr><th scope='row'><code>{html.escape(name)}</code>{needed}</th><td>{about}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
