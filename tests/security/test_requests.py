"""Lines of requests that strangers wrote: each costs itself, and the memory of the process is bounded."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
import types
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax.engine.outputs import Event, Reply
from omni_jax.errors import InputError
from omni_jax.processing import worker_pool
from omni_jax.processing.layout import Prompt, Usage
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.processor import Processor
from omni_jax.processing.worker_pool import MediaLimits, PreparationError, WorkerStartError
from omni_jax.serving import batch_lines, batch_runner, chat_request
from omni_jax.serving.batch_lines import Line, make_error, parse_line, read_custom_id, read_lines
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.serving.media_roots import MediaRoots
from tests.security.conftest import MEDIA
from tests.security.test_isolation import Unpickled
from tests.serving import requests

BODY_FIELDS = sorted({*chat_request._READERS, *chat_request._NEUTRAL, *chat_request._IGNORED, "messages"})
STAGE_FIELDS = "temperature top_k top_p repetition_penalty max_tokens seed stop stop_token_ids".split()
MEDIA_FIELDS = "use_audio_in_video fps min_pixels max_pixels".split()
PART_FIELDS = """image audio video image_url input_audio audio_url video_url text type url path min_pixels max_pixels
    audio_start audio_end sampling_rate use_audio_in_video fps nframes video_start video_end""".split()
MESSAGE_FIELDS = "role content audio name".split()


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = {
    "a number of 400 digits": 10**400,
    "a negative one": -(10**400),
    "one of 4000 digits": 10**4000,
    "3e9": 3_000_000_000,
    "infinity": float("1e999"),
    "a URL that cannot be split": "file://[x/y",
    "a list nested 700 deep": nested(700),
    "an object nested 300 deep": json.loads('{"a":' * 300 + "1" + "}" * 300),
    "half a surrogate pair": "\ud83d",
    "a zero byte": "a\0b",
    "a name of 100,000 letters": "x" * 100_000,
}


def read_line(data: bytes) -> InputError | None:
    """What is said of a line: up to where its media would be opened, as a run does it."""
    line = Line(1, data)
    try:
        _, request = parse_line(line)
        MediaRoots((str(MEDIA),)).confine(request.messages)
    except InputError as error:
        result = make_error(line, read_custom_id(line), error)
        values = json.loads(result.text.encode())  # in UTF-8
        assert values["error"]["message"] and len(result.text) < 20_000 + len(data)
        return error
    return None


def with_body(**fields: Any) -> bytes:
    values = json.loads(requests.line("x", "hi"))
    values["body"] |= fields
    return json.dumps(values).encode()


def place_everywhere(value: Any) -> dict[str, bytes]:
    """Lines that hold a value in one field each."""
    lines = {name: with_body(**{name: value}) for name in BODY_FIELDS}
    for stage in range(3):
        for name in STAGE_FIELDS:
            stages: list[dict[str, Any]] = [{}, {}, {}]
            stages[stage][name] = value
            lines[f"sampling_params_list[{stage}].{name}"] = with_body(sampling_params_list=stages)
    for name in MEDIA_FIELDS:
        lines[f"mm_processor_kwargs.{name}"] = with_body(mm_processor_kwargs={name: value})
    for kind in ("image", "audio", "video"):
        for name in PART_FIELDS:
            lines[f"{kind}.{name}"] = requests.line("x", [{"type": kind, kind: "a", name: value}]).encode()
        lines[f"{kind}_url.url"] = requests.line("x", [{"type": f"{kind}_url", f"{kind}_url": {"url": value}}]).encode()
    for name in ("data", "format"):
        part = {"type": "input_audio", "input_audio": {"data": "AAAA", name: value}}
        lines[f"input_audio.{name}"] = requests.line("x", [part]).encode()
    for name in MESSAGE_FIELDS:
        lines[f"message.{name}"] = with_body(messages=[{"role": "assistant", "content": "hi", name: value}])
    for name in ("custom_id", "method", "url", "body"):
        lines[name] = json.dumps({**json.loads(requests.line("x", "hi")), name: value}).encode()
    return lines


# what takes any value: it is read by nobody
FREE = {*chat_request._IGNORED}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_value_of_any_field_costs_its_line(value: Any) -> None:
    for name, data in place_everywhere(value).items():
        # as text that JSON allows
        error = read_line(data.replace(b"Infinity", b"1e999"))
        if isinstance(value, int | float) and name not in FREE:
            assert error is not None or value == 3_000_000_000, name


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**400, 2**31, 2**32, 2**63]),
        st.floats(allow_nan=False),
        st.text(st.characters(codec=None, categories=None), max_size=8),
        st.sampled_from(["file://[x/y", "data:,", "gs://", "http://[", "\0", "/", ".."]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(PART_FIELDS), inner)),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(BODY_FIELDS), VALUES, min_size=1, max_size=4))
def test_any_values_of_the_body(fields: dict[str, Any]) -> None:
    read_line(with_body(**fields))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from([*PART_FIELDS, *MESSAGE_FIELDS]), VALUES, max_size=4), max_size=3))
def test_any_parts(parts: list[dict[str, Any]]) -> None:
    read_line(requests.line("x", parts).encode())


@pytest.mark.parametrize(
    "data",
    [
        requests.line("x", "hi").encode("utf-16"),
        requests.line("x", "hi").encode("utf-32-le"),
        requests.line("x", "hi").encode().replace(b"hi", b"caf\xe9"),
        requests.line("x", "hi").encode().replace(b"hi", b"\xed\xa0\x80"),  # half a surrogate pair
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"custom_id": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00",
    ],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_json_costs_its_line(data: bytes) -> None:
    assert "the line is" in str(read_line(data))


# --- the memory of the process ---


def test_a_line_of_over_64_mib_is_passed_over(tmp_path: Path) -> None:
    assert batch_lines.MAX_LINE_BYTES == 64 << 20
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # a line of zeros, which take no room on the disk
        file.seek(0, 2)
        file.write(b"\n" + requests.line("good", "hi").encode() + b"\n")
    tracemalloc.start()
    try:
        long_line, good = read_lines(str(path))
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(InputError, match="the line is longer than 67108864 bytes"):
        parse_line(long_line)
    assert parse_line(good)[0] == "good"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}] * 40_000,
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * 40_000}],
        [{"role": "user", "content": [{"type": "video", "video": ["a"] * 39_999}]}],
    ],
    ids=["messages", "parts", "frames"],
)
def test_parts_are_bounded(messages: list[Any]) -> None:
    assert "messages have 40000 parts, over the limit of 32768" in str(read_line(with_body(messages=messages)))


class WaitingWorkers:
    """Media processes that never get done."""

    def submit(self, *_: Any) -> Future[Any]:
        return Future()


def make_runner(processor: Processor, workers: Any = None) -> BatchRunner:
    scheduler = types.SimpleNamespace(busy=workers is None, num_waiting=0, num_running=0, utilization=None, step=list)
    model: Any = types.SimpleNamespace(
        config=processor.config,
        processor=processor,
        check=lambda options: None,
        scheduler=lambda config: scheduler,
    )
    locations = FileLocations(MediaRoots((str(MEDIA),)))
    workers = workers or WaitingWorkers()
    config: Any = types.SimpleNamespace(thinker_slots=16)
    return BatchRunner(model, "m", workers, config, locations, RunStatus())


def count_taken(runner: BatchRunner, text: str, lines: int = 100) -> int:
    """How many lines are taken while none is done."""
    taken = []

    def give() -> Any:
        for number in range(1, lines + 1):
            taken.append(number)
            yield Line(number, text.replace("NUMBER", str(number)).encode())

    run = batch_runner._Run(runner, give(), None)  # type: ignore[arg-type]
    run.step()
    run.step()
    held = [active.line.data for active in run._preparing.values()]
    assert not any(held)  # the line itself, in which media may be, is held by nobody
    return len(taken)


def test_bytes_in_flight_are_counted_whole(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are being prepared count with what they can become, and not only those that are done."""
    runner = make_runner(processor)
    context = processor.config.thinker_config.text_config.max_position_embeddings
    assert runner.max_prompt_bytes == (context - 1) * 4 * 1176 * 4
    text = requests.line("NUMBER", "hi")
    picture = requests.line("NUMBER", [{"type": "image", "image": "picture.jpg"}])
    assert count_taken(runner, text) == 64
    assert count_taken(runner, picture) == -(-(8 << 30) // (runner.max_prompt_bytes + len(picture)))
    # what stands in the line itself counts as well
    monkeypatch.setattr(batch_runner, "_MAX_BYTES", 10_000_000)
    assert count_taken(runner, requests.line("NUMBER", "x" * 1_000_000)) == 10
    # one is always taken, however large
    monkeypatch.setattr(batch_runner, "_MAX_BYTES", 1)
    assert count_taken(runner, picture) == 1


class FinishedScheduler:
    """Answers whatever it is given at its next step, with seconds of speech."""

    utilization = None
    num_waiting = num_running = 0

    def __init__(self, seconds: int) -> None:
        self.submitted: list[object] = []
        self._seconds = seconds

    @property
    def busy(self) -> bool:
        return bool(self.submitted)

    def submit(self, *_: Any, **__: Any) -> object:
        self.submitted.append(object())
        return self.submitted[-1]

    def step(self) -> list[tuple[object, Event]]:
        states, self.submitted = self.submitted, []
        sound = np.zeros(24_000 * self._seconds, np.float32)
        reply = Reply("hi", (1, 2), "stop", Usage(), audio=sound)
        return [(state, Event(reply=reply)) for state in states]


class ReadyWorkers:
    """Media processes that are done at once."""

    def submit(self, *_: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(Prompt(np.zeros(4, np.int32), (), (), np.full(4, -1, np.int32), np.zeros(4, np.int32), Usage()))
        return done

    def result(self, future: Future[Any]) -> Any:
        return future.result()


def test_answers_that_wait_to_be_written_are_counted(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the disk or the bucket is slower than the model, no more lines are taken; once all is written, they are."""
    seconds = 10
    runner = make_runner(processor, ReadyWorkers())
    scheduler = FinishedScheduler(seconds)
    runner.model.scheduler = lambda config: scheduler  # type: ignore[method-assign, assignment]
    runner.model.submit = scheduler.submit  # type: ignore[method-assign, assignment]
    runner.locations = FileLocations(MediaRoots((str(MEDIA),)), str(tmp_path))
    open_gate = threading.Event()
    monkeypatch.setattr(batch_runner, "_write_file", lambda path, data: open_gate.wait(60))
    # room for the answers of three lines
    monkeypatch.setattr(batch_runner, "_MAX_BYTES", 3 * 12 * 24_000 * seconds)
    taken = []

    def give() -> Any:
        for number in range(1, 201):
            taken.append(number)
            yield Line(number, requests.line(f"{number}", "hi").encode())

    with ThreadPoolExecutor(4) as writers:
        run = batch_runner._Run(runner, give(), writers)
        try:
            for _ in range(6):
                assert run.step() == []
            assert len(taken) == runner.max_prepared
            held = sum(run._writing.values())
            assert held > len(run._writing) * 24_000 * seconds * (4 + 2)
        finally:
            open_gate.set()
        results = []
        while not run.finished:
            results += run.step()
    assert len(results) == 200 and not any(result.failed for result in results)


class FailingScheduler(FinishedScheduler):
    """Raises for every third request that it is given, and cannot answer the next one."""

    def __init__(self) -> None:
        super().__init__(1)
        self._count = 0
        self._unanswered: set[object] = set()

    def submit(self, *args: Any, **keywords: Any) -> object:
        self._count += 1
        if self._count % 3 == 1:
            raise ZeroDivisionError("of some library")
        state = super().submit(*args, **keywords)
        if self._count % 3 == 2:
            self._unanswered.add(state)
        return state

    def step(self) -> list[tuple[object, Event]]:
        events = []
        for state, event in super().step():
            failed = Event(reply=Reply.from_error(RuntimeError("out of memory")))
            events.append((state, failed if state in self._unanswered else event))
        return events


class FailingWorkers(ReadyWorkers):
    """Fail for every fourth request, as they begin or when they are done."""

    def __init__(self) -> None:
        self._count = 0

    def submit(self, *_: Any) -> Future[Any]:
        self._count += 1
        if self._count % 8 == 1:
            raise OverflowError("of some library")
        future = super().submit()
        if self._count % 8 == 5:
            future = Future()
            future.set_exception(PreparationError("of some library"))
        return future


def test_whatever_a_stage_raises_costs_its_line(processor: Processor) -> None:
    scheduler = FailingScheduler()
    runner = make_runner(processor, FailingWorkers())
    runner.model.scheduler = lambda config: scheduler  # type: ignore[method-assign, assignment]
    runner.model.submit = scheduler.submit  # type: ignore[method-assign, assignment]
    lines = [Line(number, requests.line(f"{number}", "hi").encode()) for number in range(1, 97)]
    results = [json.loads(result.text) for result in runner.run(lines)]
    assert sorted(int(values["custom_id"]) for values in results) == list(range(1, 97))
    told: dict[str, int] = {}
    for values in results:
        message = (values["error"] or {"message": ""})["message"].partition(":")[0]
        told[message] = told.get(message, 0) + 1
    assert told == {"OverflowError": 12, "PreparationError": 12, "ZeroDivisionError": 24, "RuntimeError": 24, "": 24}


def test_a_run_ends_where_no_worker_gets_ready(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of its lines, each of which would get an error as its result."""
    monkeypatch.setattr(worker_pool, "MAX_START_SECONDS", 2.0)
    hanging: Any = Unpickled(time.sleep, 60)
    lines = [Line(number, requests.line(f"{number}", "hi").encode()) for number in range(1, 4)]
    with MediaWorkers(hanging, 1, MediaLimits()) as workers:
        with pytest.raises(WorkerStartError, match="cannot be started"):
            list(make_runner(processor, workers).run(lines))
        # nor do those get one that come after it
        with pytest.raises(WorkerStartError, match="cannot be started"):
            list(make_runner(processor, workers).run(lines))
