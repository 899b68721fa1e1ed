"""What signs somebody in at a URL reaches no error, no result and no file of rejects."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from omni_jax.checks import redact, shown
from omni_jax.errors import InputError
from omni_jax.processing.sources import describe_source
from omni_jax.serving.batch_lines import Line, make_error, parse_line

URLS = [
    "https://a.example/x.png?X-Goog-Signature=s3cret&X-Goog-Date=1",
    "https://alice:s3cret@a.example/x.png",
    "HTTPS://s3cret@a.example/x.png",
    "https://a.example/x.png#s3cret",
    "https:a.example/x.png?s3cret",
    "http:/a.example/x.png?s3cret",
    "gs://b/x.png?generation=s3cret",
    "s3://alice:s3cret@b/x.png?s3cret",
    "ftp://alice:s3cret@a.example/x.png",
    "https://proxy.example/https://alice:s3cret@a.example/x.png",
    "http:/http://alice:s3cret@a.example/x.png",
]


@pytest.mark.parametrize("url", URLS)
def test_only_the_place_is_named(url: str) -> None:
    long = url.replace("x.png", "deep/" * 40 + "x.png")
    for text in (
        redact(url),
        redact(f"cannot fetch '{url}': refused, see {url}"),
        describe_source(url),
        describe_source(long),
        shown(url),
        shown(long),
        shown({"url": [url]}),
    ):
        assert "s3cret" not in text and "alice" not in text
    assert "x.png" in describe_source(url)


def test_other_texts_stay_as_they_are() -> None:
    for text in ("what? why# a:b", "call-12:30.wav", "https://a.example/x@2x.png", "file:///a/b", "body: n is 2", ""):
        assert redact(text) == text
    assert redact("(image 'https://a.example/x?y=1'): no") == "(image 'https://a.example/x?...'): no"
    assert redact("https://u:p@a.example/x?y=1#z b") == "https://...@a.example/x?... b"


@pytest.mark.parametrize(
    "text", ["a." * 500_000, "a" * 1_000_000, "http:" * 200_000, "a://" * 250_000, "a://" + "b" * 10**6]
)
def test_no_text_takes_long(text: str) -> None:
    begin = time.thread_time()
    redact(text)
    assert time.thread_time() - begin < 10


@pytest.mark.parametrize("url", URLS)
def test_results(url: str) -> None:
    for error in (InputError(f"{url}: no"), RuntimeError(f"of some library, about {url}")):
        text = make_error(Line(1, b""), "a", error).text
        assert "s3cret" not in text and "alice" not in text


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["image", "image_url", "url", "other"])
def test_lines_that_are_refused(url: str, key: str) -> None:
    parts: list[Any] = [
        {"type": "image", key: url, "min_pixels": "x"},
        {"type": "image", "image": "a", key: [url]},
        url,
    ]
    for part in parts:
        body = {"messages": [{"role": "user", "content": [part]}], "seed": url}
        line = Line(
            1, json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
        )
        with pytest.raises(InputError) as caught:
            parse_line(line)
        text = make_error(line, "a", caught.value).text
        assert "s3cret" not in text and "alice" not in text
