"""Whatever is wrong with a line costs that line alone, and results can always be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import omni_jax
from omni_jax.engine.request import SchedulerConfig
from omni_jax.errors import InputError
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.serving import batch_runner, chat_request
from omni_jax.serving.batch_lines import Line, LineError, make_error, parse_line, read_custom_id, read_lines
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.serving.media_roots import MediaRoots
from tests.serving import requests

CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="module")
def runner(model: omni_jax.OmniModel, media_workers: MediaWorkers) -> BatchRunner:
    locations = FileLocations(MediaRoots((str(requests.MEDIA),)))
    return BatchRunner(model, "m", media_workers, SchedulerConfig(4, 4), locations, RunStatus())


def answer(runner: BatchRunner, lines: Iterable[Line]) -> dict[str | None, dict[str, Any]]:
    results = {}
    for result in runner.run(lines):
        values = json.loads(result.text.encode())  # which is UTF-8, then
        results[values["custom_id"]] = values
    return results


def as_lines(*texts: str) -> list[Line]:
    return [Line(i + 1, text.encode()) for i, text in enumerate(texts)]


def error_of(values: dict[str, Any]) -> str:
    assert values["response"] is None
    return values["error"]["message"]


def content_of(values: dict[str, Any]) -> str:
    assert values["error"] is None, values
    return values["response"]["body"]["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("batch_stop_ids.jsonl", "bad", "stop_token_ids is 4294967296; it must be from 0 to 2147483647"),
        ("batch_top_k.jsonl", "bad", "top_k is 2147483648; it must be from 0 to 2147483647 (0: all tokens)"),
        ("hostile/poison-top_k.jsonl", "bad", "top_k is 3000000000; it must be from 0 to 2147483647"),
        ("hostile/poison-max_pixels.jsonl", "x", "max_pixels is 1000"),
    ],
)
def test_a_number_out_of_range(runner: BatchRunner, name: str, bad: str, message: str) -> None:
    results = answer(runner, read_lines(str(CASES / name)))
    assert message in error_of(results.pop(bad))
    assert len(results) == 2
    for values in results.values():
        content_of(values)


def test_half_a_surrogate_pair(runner: BatchRunner) -> None:
    results = answer(runner, read_lines(str(CASES / "batch_surrogate.jsonl")))
    assert set(results) == {"a\ud83d", "b"}
    for values in results.values():
        content_of(values)
    _, request = parse_line(list(read_lines(str(CASES / "batch_surrogate.jsonl")))[1])
    assert request.messages[0].content == "bad \ufffd text"


def test_a_byte_order_mark(runner: BatchRunner, tmp_path: Path) -> None:
    data = (CASES / "batch_bom.jsonl").read_bytes()
    (tmp_path / "join_path.jsonl").write_bytes(data + data.replace(b'"a"', b'"b"') + b"\xef\xbb\xbf\r\n")
    results = answer(runner, read_lines(str(tmp_path / "join_path.jsonl")))
    assert set(results) == {"a", "b"}
    for values in results.values():
        content_of(values)


def test_null_fields_of_messages(runner: BatchRunner) -> None:
    content_of(answer(runner, read_lines(str(CASES / "batch_null_fields.jsonl")))["a"])


def test_an_answer_can_be_sent_back(runner: BatchRunner) -> None:
    first = answer(runner, as_lines(requests.good(0)))["good-0"]
    message = first["response"]["body"]["choices"][0]["message"]
    assert message["audio"]["data"]
    question = json.loads(requests.good(0))
    question["body"]["messages"] += [message, {"role": "user", "content": "And then?"}]
    content_of(answer(runner, as_lines(json.dumps(question)))["good-0"])


def explode(*_: object, **__: object) -> None:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize(
    "module, name",
    [
        (batch_runner, "parse_line"),
        (MediaRoots, "confine"),
        (batch_runner, "_submit"),
        (batch_runner, "make_body"),
        (batch_runner, "encode_sound"),
    ],
)
def test_an_unknown_exception_costs_its_own_line(
    runner: BatchRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """It comes up in the second of three requests, which are worked on together."""
    original: Callable[..., Any] = getattr(module, name)
    calls = []

    def explode_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise ZeroDivisionError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, explode_once)
    locations = FileLocations(MediaRoots((str(requests.MEDIA),)), str(tmp_path))
    monkeypatch.setattr(runner, "locations", locations)
    results = answer(runner, as_lines(requests.good(0), requests.good(5), requests.good(40)))
    assert set(results) == {"good-0", "good-5", "good-40"} and len(calls) == 3
    errors = [values["error"] for values in results.values() if values["error"] is not None]
    assert errors == [{"code": "failed", "message": "ZeroDivisionError: planted"}]


def test_an_unknown_exception_of_a_media_process(runner: BatchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = runner.media_workers.submit
    calls = []

    def submit_and_fail(*args: Any) -> Any:
        future = submit(*args)
        calls.append(future)
        if len(calls) == 2:
            monkeypatch.setattr(future, "result", explode)
        return future

    monkeypatch.setattr(runner.media_workers, "submit", submit_and_fail)
    results = answer(runner, as_lines(requests.good(5), requests.good(6), requests.good(13)))
    errors = [values["error"] for values in results.values() if values["error"] is not None]
    assert len(results) == 3 and [error["code"] for error in errors] == ["failed"]
    assert "ZeroDivisionError: planted" in errors[0]["message"]


def with_part(custom_id: str, **part: Any) -> str:
    return requests.line(custom_id, [part])


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "text, message",
    [
        (with_part("x", type="video", video=nested(700)), "expected a path or a URL"),
        (requests.line("x", nested(700)), "must be an object with a type"),
        (requests.line("x", "hi", stop=nested(700)), "stop is"),
        (requests.line("x", "hi", metadata=nested(700), top_k=nested(700)), "top_k is"),
        (with_part("x", type="image", image="file://[x/y"), "is not a path that can be read"),
        (with_part("x", type="image", image="a\0b"), "is not a path that can be read"),
        (with_part("x", type="image", image="a\ud83d"), "\\ud83d"),
        (with_part("x", type="image", image={"a": 1}), "expected a path or a URL"),
        (with_part("x", type="image", image="x" * 100_000), "not a path that can be read"),
        (with_part("x", type="image", image="http://[x"), "from the web is off"),
        (requests.line("x", "hi", voice="\ud83d" * 3), "unknown field"),
    ],
)
def test_hostile_lines(runner: BatchRunner, text: str, message: str) -> None:
    results = answer(runner, as_lines(text, requests.line("good", "hi", max_tokens=1)))
    assert message in error_of(results["x"])
    assert len(error_of(results["x"])) < 3000
    content_of(results["good"])


# every kind of value that JSON can hold, with the numbers that are known to hurt
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**400)]),
    st.sampled_from([1e400, -1e400, 1e-46, 1e38, 3.5e38, 2.5, 44100.0, -0.0, 5e-324]),
    st.integers(),
    st.floats(allow_nan=False),
)
TEXTS = st.text(st.characters(codec=None, categories=None), max_size=8)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
BODY_FIELDS = sorted({*chat_request._READERS, *chat_request._NEUTRAL, *chat_request._IGNORED, "messages"})
PART_FIELDS = """image audio video image_url input_audio audio_url video_url text type url path min_pixels max_pixels
    audio_start audio_end sampling_rate use_audio_in_video fps nframes video_start video_end""".split()
THOROUGH = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_line(data: bytes) -> None:
    """A line is read, or refused with an error that can be written."""
    line = Line(1, data)
    try:
        parse_line(line)
    except LineError as error:
        result = make_error(line, read_custom_id(line), error)
        values = json.loads(result.text.encode())
        assert values["custom_id"] == read_custom_id(line) and values["error"]["code"] == "invalid_line"


@THOROUGH
@given(st.dictionaries(st.sampled_from(BODY_FIELDS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_field_of_the_body(fields: dict[str, Any]) -> None:
    line = json.loads(requests.line("x", "hi"))
    line["body"] |= fields
    check_line(json.dumps(line).encode())


@THOROUGH
@given(st.sampled_from(["image", "audio", "video"]), st.dictionaries(st.sampled_from(PART_FIELDS), VALUES, max_size=3))
def test_any_value_of_any_field_of_a_part(kind: str, fields: dict[str, Any]) -> None:
    check_line(requests.line("x", [{"type": kind, kind: "a", **fields}]).encode())


@THOROUGH
@given(
    st.integers(0, 2),
    st.sampled_from(["temperature", "top_k", "top_p", "repetition_penalty", "max_tokens", "seed", "stop_token_ids"]),
    VALUES,
)
def test_any_value_of_any_stage(stage: int, name: str, value: Any) -> None:
    stages: list[dict[str, Any]] = [{}, {}, {}]
    stages[stage][name] = value
    check_line(requests.line("x", "hi", sampling_params_list=stages).encode())


@THOROUGH
@given(st.data())
def test_fuzzed_lines(data: st.DataObject) -> None:
    """Good lines with bytes changed, and bytes that never were a line."""
    if data.draw(st.booleans()):
        check_line(data.draw(st.binary(max_size=60)))
        return
    text = bytearray(requests.good(data.draw(st.integers(0, 6))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    check_line(bytes(text))


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_tokens=2.5),
        dict(max_tokens=10**400),
        dict(stop_token_ids=5),
        dict(stop_token_ids=[-1]),
        dict(stop_token_ids=[True]),
        dict(temperature=float("inf")),
        dict(temperature=True),
        dict(top_p=1e-46),  # which is 0 in float32
        dict(top_p=0),
        dict(repetition_penalty=0),
        dict(repetition_penalty=1e300),
        dict(seed=2**32),
        dict(seed=-1),
        dict(sampling_params_list=[{}, {"seed": 2**32}]),
        dict(sampling_params_list=[{}, {"top_k": 2**31}]),
        dict(sampling_params_list=[{}, {"max_tokens": 0.5}]),
        dict(sampling_params_list=[{}, {}, {"seed": 1.0}]),
        dict(mm_processor_kwargs={"fps": 1e-50}),
        dict(mm_processor_kwargs={"min_pixels": 2**31}),
        dict(frequency_penalty=0.1),
        dict(n=True),
    ],
    ids=str,
)
def test_numbers_that_are_refused(fields: dict[str, Any]) -> None:
    name = next(reversed(fields))
    with pytest.raises(InputError) as caught:
        chat_request.parse_body({"messages": [{"role": "user", "content": "hi"}], **fields})
    field = name if not isinstance(fields[name], dict) else next(iter(fields[name]))
    assert field in str(caught.value)
