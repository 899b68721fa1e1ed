"""The scheduler behind a thread: what callers of an event loop get of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax.engine.outputs import Event, Reply
from omni_jax.engine.request import SchedulerConfig
from omni_jax.engine.talker_engine import TalkerEngine
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.engine.token2wav_streaming import Token2WavStream
from omni_jax.errors import InputError
from omni_jax.generation.options import Options
from omni_jax.processing.layout import Prompt
from omni_jax.serving.engine_thread import ClosedError, EngineThread, Timeline

SLOTS = 2
TALKER = {"max_tokens": 40, "temperature": 0.0}
SPEECH: dict[str, Any] = {"modalities": ("text", "audio"), "talker": TALKER}


@pytest.fixture
def engine(model: omni_jax.OmniModel) -> Iterator[EngineThread]:
    with EngineThread(model, SchedulerConfig(SLOTS, SLOTS)) as engine:
        yield engine


def make_prompt(model: omni_jax.OmniModel, text: str) -> Prompt:
    return model.processor([{"role": "user", "content": text}], max_length=1000)


async def ask(engine: EngineThread, text: str, *, live: bool = False, **options: Any) -> Reply:
    prompt = make_prompt(engine.model, text)
    stream = await engine.submit(prompt, Options.create(max_tokens=8, **options), live=live)
    return await stream.reply()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 120))


def test_many_at_once_are_answered_as_each_alone(engine: EngineThread) -> None:
    texts = [f"Question {i}?" for i in range(3 * SLOTS)]

    async def work() -> list[Reply]:
        kinds: list[dict[str, Any]] = [{}, {"live": True, **SPEECH}, SPEECH]
        return await asyncio.gather(*(ask(engine, text, **kinds[i % 3]) for i, text in enumerate(texts)))

    for i, (text, reply) in enumerate(zip(texts, run(work), strict=True)):
        options = SPEECH if i % 3 else {}
        alone = engine.model.generate([{"role": "user", "content": text}], max_tokens=8, **options)
        assert (reply.token_ids, reply.codec_ids) == (alone.token_ids, alone.codec_ids)


def test_a_wrong_request_is_told_and_costs_no_other(engine: EngineThread) -> None:
    async def work() -> None:
        with pytest.raises(InputError, match="Nobody"):
            await ask(engine, "Who?", voice="Nobody", **SPEECH)
        assert (await ask(engine, "Who?")).token_ids

    run(work)


def test_a_cancelled_request_frees_its_slot(engine: EngineThread) -> None:
    async def work() -> None:
        prompt = make_prompt(engine.model, "A long story.")
        options = Options.create(max_tokens=5000)
        streams = [await engine.submit(prompt, options, live=True) for _ in range(2 * SLOTS)]
        await anext(aiter(streams[0]))
        for stream in streams:
            stream.cancel()
        # would wait for thousands of tokens otherwise
        assert (await ask(engine, "Short?")).token_ids
        assert engine.num_running == 0 and engine.num_waiting == 0

    run(work)


def test_a_submit_that_is_given_up_leaves_nothing(engine: EngineThread) -> None:
    async def work() -> None:
        task = asyncio.create_task(ask(engine, "A long story.", live=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await ask(engine, "Short?")).token_ids
        assert engine.num_running == 0

    run(work)


@pytest.mark.parametrize(
    "owner, method, live",
    [
        (ThinkerEngine, "prefill_blocks", False),
        (ThinkerEngine, "prefill", True),
        (ThinkerEngine, "decode", False),
        (TalkerEngine, "decode", True),
        (Token2WavEngine, "synthesize", False),
        (Token2WavStream, "push", True),
    ],
)
def test_an_exception_in_a_stage_fails_its_request_alone(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, live: bool
) -> None:
    called = getattr(owner, method)
    state = {"planted": False}

    def explode_once(*args: Any, **kwargs: Any) -> Any:
        if not state["planted"]:
            state["planted"] = True
            raise ZeroDivisionError("planted")
        return called(*args, **kwargs)

    async def work() -> None:
        monkeypatch.setattr(owner, method, explode_once)
        with pytest.raises(ZeroDivisionError, match="planted"):
            await ask(engine, "First?", live=live, **SPEECH)
        assert state["planted"] and (await ask(engine, "Second?", live=live, **SPEECH)).codec_ids

    run(work)


def test_a_fault_of_the_scheduler_ends_its_requests_and_no_later_one(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("omni_jax.engine.scheduler.Scheduler.step", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await ask(engine, "First?")
        assert (await ask(engine, "Second?")).token_ids

    run(work)


def test_whoever_waits_is_told_that_the_engine_closes(model: omni_jax.OmniModel) -> None:
    engine = EngineThread(model, SchedulerConfig())

    async def work() -> None:
        prompt = make_prompt(model, "A long story.")
        stream = await engine.submit(prompt, Options.create(max_tokens=5000), live=True)
        await asyncio.to_thread(engine.close)
        with pytest.raises(ClosedError):
            await stream.reply()
        with pytest.raises(ClosedError):
            await ask(engine, "Another?")

    run(work)


def test_a_timeline_counts_what_came_too_late() -> None:
    second = np.zeros(24_000, np.float32)
    timeline = Timeline(submitted=10.0)
    timeline.add(Event(text="a"), 10.5)
    timeline.add(Event(audio=second), 11.0)
    timeline.add(Event(audio=second), 11.9)  # in time: the first second ends at 12
    timeline.add(Event(audio=second), 13.2)  # the two seconds ended at 13
    assert (timeline.first_text, timeline.first_audio) == (10.5, 11.0)
    assert (timeline.audio_seconds, timeline.underruns) == (3.0, 1)
