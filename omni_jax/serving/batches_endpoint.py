"""OpenAI's files and batches."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from omni_jax.checks import check_names, shown
from omni_jax.errors import InputError
from omni_jax.serving.batch_lines import URL
from omni_jax.serving.file_store import StoredFile
from omni_jax.serving.http_requests import form_file, form_text, read_form, read_json
from omni_jax.serving.service import Service

_FILE_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
_BATCH_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
_MAX_METADATA = 16  # keys, as OpenAI has it
_MAX_METADATA_TEXT = 512  # characters of each value


async def refuse_files(request: Request) -> Response:
    """Any request for files and batches, where several replicas have files of their own."""
    raise InputError(
        "this server has several replicas, which do not share files: run batches with serve.py batch --engine ray"
    )


async def upload_file(request: Request) -> Response:
    """POST /v1/files."""
    service: Service = request.app.state.service
    with service.admit():
        return JSONResponse((await _store_upload(request, service)).describe())


async def _store_upload(request: Request, service: Service) -> StoredFile:
    async with read_form(request, service.spec.max_body_bytes) as form:
        check_names("field of the form", form, _FILE_FIELDS)
        purpose = form_text(form, "purpose")
        if purpose != "batch":
            raise InputError(f"purpose is {shown(purpose)}; only 'batch' is supported")
        data = await form_file(form, "file")
        file = form["file"]
        name = file.filename if isinstance(file, UploadFile) else None
    return service.files.add(name or "file", purpose, data)


async def list_files(request: Request) -> Response:
    """GET /v1/files."""
    service: Service = request.app.state.service
    return JSONResponse(_list([file.describe() for file in service.files.list()]))


async def get_file(request: Request) -> Response:
    """GET /v1/files/{id}."""
    service: Service = request.app.state.service
    return JSONResponse(service.files.find(request.path_params["id"]).describe())


async def get_file_content(request: Request) -> Response:
    """GET /v1/files/{id}/content."""
    service: Service = request.app.state.service
    file = service.files.find(request.path_params["id"])
    return StreamingResponse(file.read(), media_type="application/octet-stream")


async def delete_file(request: Request) -> Response:
    """DELETE /v1/files/{id}."""
    service: Service = request.app.state.service
    file_id = request.path_params["id"]
    service.files.delete(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def create_batch(request: Request) -> Response:
    """POST /v1/batches."""
    service: Service = request.app.state.service
    body = await read_json(request, service.spec.max_body_bytes)
    values = {name: value for name, value in body.items() if value is not None}
    check_names("field of the body", values, _BATCH_FIELDS)
    for name, expected in (("endpoint", URL), ("completion_window", "24h")):
        if values.get(name) != expected:
            raise InputError(f"body: {name} is {shown(values.get(name))}; it must be {expected!r}")
    file_id = values.get("input_file_id")
    if not isinstance(file_id, str):
        raise InputError(f"body: input_file_id is {shown(file_id)}; it must be the id of a file")
    return JSONResponse(service.batches.create(file_id, _read_metadata(values.get("metadata"))).describe())


async def list_batches(request: Request) -> Response:
    """GET /v1/batches."""
    service: Service = request.app.state.service
    return JSONResponse(_list([batch.describe() for batch in service.batches.list()]))


async def get_batch(request: Request) -> Response:
    """GET /v1/batches/{id}."""
    service: Service = request.app.state.service
    return JSONResponse(service.batches.find(request.path_params["id"]).describe())


async def cancel_batch(request: Request) -> Response:
    """POST /v1/batches/{id}/cancel."""
    service: Service = request.app.state.service
    return JSONResponse(service.batches.cancel(request.path_params["id"]).describe())


def _list(data: list[dict[str, Any]]) -> dict[str, Any]:
    ids = [values["id"] for values in data]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": False}


def _read_metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MAX_METADATA:
        raise InputError(f"body: metadata is {shown(value)}; it must be an object of up to {_MAX_METADATA} texts")
    for text in value.values():
        if not isinstance(text, str) or len(text) > _MAX_METADATA_TEXT:
            raise InputError(
                f"body: metadata has {shown(text)}; each must be a text of up to {_MAX_METADATA_TEXT} characters"
            )
    return value
