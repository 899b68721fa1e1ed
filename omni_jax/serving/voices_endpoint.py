"""The voices that the server speaks in: those of the checkpoint, and clips that are added with consent."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from omni_jax.checks import check_names
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.serving.added_voices import AddedVoice
from omni_jax.serving.http_requests import form_file, form_text, read_form, until_disconnected
from omni_jax.serving.service import Service

_FIELDS = ("name", "audio_sample", "consent", "ref_text")


async def list_voices(request: Request) -> Response:
    """GET /v1/audio/voices."""
    service: Service = request.app.state.service
    voices: list[dict[str, Any]] = []
    if service.speaks:
        voices = [{"id": name, "object": "audio.voice", "name": name, "added": False} for name in service.model.voices]
        voices += [_describe(added) for added in service.voices.list()]
    return JSONResponse({"object": "list", "data": voices, "voices": [voice["id"] for voice in voices]})


async def add_voice(request: Request) -> Response:
    """POST /v1/audio/voices."""
    service: Service = request.app.state.service
    with service.admit():
        if not service.speaks:
            raise InputError("this model does not speak, so that it has no voices")
        if service.spec.replicas > 1 and service.spec.voices_dir is None:
            raise InputError("this server has several replicas, which share voices through --voices-dir; it has none")
        async with read_form(request, service.spec.max_body_bytes) as form:
            check_names("field of the form", form, _FIELDS)
            name = service.voices.check(form_text(form, "name"), form_text(form, "consent"))
            consent = form_text(form, "consent") or ""
            text = form_text(form, "ref_text")
            data = await form_file(form, "audio_sample")
        clip = await until_disconnected(request, service.read_clip(data))
        # another one may have been faster
        service.voices.check(name, consent)
        return JSONResponse(_describe(service.voices.add(name, consent, ClonedVoice(data, text or None), clip)))


async def delete_voice(request: Request) -> Response:
    """DELETE /v1/audio/voices/{name}."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    service.voices.delete(name)
    return JSONResponse({"id": name, "object": "audio.voice.deleted", "deleted": True})


def _describe(added: AddedVoice) -> dict[str, Any]:
    values: dict[str, Any] = {"id": added.name, "object": "audio.voice", "name": added.name, "added": True}
    return {**values, "created_at": added.created, "consent": added.consent}
