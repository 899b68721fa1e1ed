"""The server against its own OpenAPI description: whatever fits it, and whatever does not, is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from omni_jax.serving.openapi import PATHS
from tests.serving.http_client import serve_http

EXAMPLES = 12  # of each operation
SECONDS = 10.0  # that none may take
OPERATIONS = [(path, method, GenerationMode.POSITIVE) for path, methods in PATHS.items() for method in methods]
# what has no body cannot be wrong
OPERATIONS += [
    (path, method, GenerationMode.NEGATIVE)
    for path, methods in PATHS.items()
    for method, operation in methods.items()
    if "requestBody" in operation
]


@pytest.fixture(scope="module")
def address(tiny_model: Path) -> Iterator[str]:
    with serve_http(tiny_model, "--name", "omni") as address:
        # so that the compiler's seconds are none of a request's
        httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=60)
        speech = {"input": "Good morning.", "max_tokens": 40, "response_format": "wav"}
        httpx.post(f"{address}/v1/audio/speech", json=speech, timeout=120)
        yield address


@pytest.fixture(scope="module")
def api(address: str) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_whatever_comes_is_answered(
    api: schemathesis.schemas.BaseSchema, path: str, method: str, mode: GenerationMode
) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            # long replies, and long sounds of them, are for others to test
            case.body.update({name: 8 for name in ("max_tokens", "max_completion_tokens") if name in case.body})
        response = case.call(timeout=SECONDS)
        if response.status_code == 503:
            return
        checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
        case.validate_response(response, checks=checks)

    check()


def test_the_description_is_shown(address: str) -> None:
    page = httpx.get(f"{address}/docs").text
    assert "POST /v1/chat/completions" in page and "return_token_ids" in page and "<script" not in page
