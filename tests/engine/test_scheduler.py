"""Many requests at once: each is answered as alone, whoever joins, leaves or goes wrong beside it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax import mrope
from omni_jax.engine.outputs import Options, Reply
from omni_jax.engine.request import RequestState, SchedulerConfig
from omni_jax.engine.scheduler import Scheduler
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.model import OmniModel
from tests.generation.test_stream import GREEDY, QUESTIONS, SPEAK, endless

ROWS = SchedulerConfig(16, 16, (8, 16, 32))
REQUESTS = 200


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return endless(tiny_model)


def options_of(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Greedy text of 1 to 200 tokens; every third reply is spoken, up to 150 codes long."""
    spoken = dict(**SPEAK, talker=dict(max_tokens=int(rng.integers(1, 150)), **GREEDY)) if number % 3 == 0 else {}
    return dict(max_tokens=int(rng.integers(1, 201)), repetition_penalty=1.3, **spoken)


def submit(model: OmniModel, scheduler: Scheduler, messages: Any, options: dict[str, Any]) -> RequestState:
    return model.request(scheduler, model.processor(messages), Options.create(**options))


def held() -> int:
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


def test_two_hundred_mixed_requests(tiny_model: Path, model: OmniModel) -> None:
    """Equal to single runs, nothing compiled after the warm-up, and no more memory at the end than half way."""
    rng, names = np.random.default_rng(0), list(QUESTIONS)
    asked = [(QUESTIONS[names[i % len(names)]], options_of(i, rng)) for i in range(1, REQUESTS)]
    longest = dict(max_tokens=200, **SPEAK, talker=dict(max_tokens=150, **GREEDY))
    asked.insert(0, (QUESTIONS["all"], longest))  # so that caches have their size from the beginning
    many = endless(tiny_model)
    assert many.warmup(tokens=1024, windows=4, slots=ROWS).count > 20
    scheduler, replies, memory = many.scheduler(ROWS), dict[RequestState, Reply](), []
    with Compilations() as compiled:
        tasks = []
        for messages, options in asked:  # they come while others are answered
            tasks.append(submit(many, scheduler, messages, options))
            while scheduler.waiting > 4:
                replies |= {task: event.reply for task, event in scheduler.step() if event.reply is not None}
                memory.append(sum(a.nbytes for a in jax.live_arrays()))
        for task, event in scheduler.run():
            if event.reply is not None:
                replies[task] = event.reply
    assert compiled.count == 0
    assert len(replies) == REQUESTS and not scheduler.busy
    for task, (messages, options) in zip(tasks, asked, strict=True):
        alone = model.generate(messages, **options)
        assert replies[task] == alone, options  # ids of text and codes, and why it ended
        audio = replies[task].audio
        assert (audio is None) == (alone.audio is None)
        assert audio is None or len(audio) == 480 * len(alone.codec_ids)
    quarter = len(memory) // 4
    # how many texts wait for the Talker, each with a row for each token, goes up and down
    assert max(memory[3 * quarter :]) <= 1.05 * max(memory[2 * quarter : 3 * quarter])


def test_a_request_that_leaves_frees_its_slots(model: OmniModel) -> None:
    spoken = dict(**SPEAK, max_tokens=40, talker=dict(max_tokens=60, **GREEDY))
    alone = model.generate(QUESTIONS["text"], **spoken)
    before = held()
    scheduler = model.scheduler(SchedulerConfig(2, 2))
    tasks = [submit(model, scheduler, QUESTIONS["text"], spoken) for _ in range(5)]
    for _ in range(3):
        list(scheduler.step())
    assert scheduler.answering == 2
    for task in tasks[:-1]:
        scheduler.cancel(task)
    (answer,) = [event.reply for task, event in scheduler.run() if event.reply is not None]
    assert answer == alone
    for task in [submit(model, scheduler, QUESTIONS["picture"], spoken) for _ in range(3)]:
        list(scheduler.step())
        scheduler.cancel(task)
    assert not scheduler.busy
    del scheduler
    assert held() == before


def test_an_error_costs_its_own_request(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, read = model.scheduler(SchedulerConfig(2, 2)), ThinkerEngine.read
    names = ["text", "a long text", "text"]
    good = [submit(model, scheduler, QUESTIONS[name], dict(max_tokens=5)) for name in names]
    bad = submit(model, scheduler, QUESTIONS["picture"], dict(max_tokens=5))

    def fails(loop: ThinkerEngine, state: Any, stretch: Any, features: Any) -> Any:
        if features:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for it")
        return read(loop, state, stretch, features)

    monkeypatch.setattr(ThinkerEngine, "read", fails)
    replies = {task: event.reply for task, event in scheduler.run() if event.reply is not None}
    assert replies[bad].finish_reason == "error" and "no room" in (replies[bad].error or "")
    for task, name in zip(good, names, strict=True):
        assert replies[task] == model.generate(QUESTIONS[name], max_tokens=5)


def test_streams_beside_whole_replies(model: OmniModel) -> None:
    """Live requests go first, and what either kind says does not depend on the other."""
    scheduler = model.scheduler(SchedulerConfig(3, 3))
    spoken = dict(**SPEAK, max_tokens=30, talker=dict(max_tokens=70, **GREEDY))
    whole = [submit(model, scheduler, QUESTIONS[name], spoken) for name in ("text", "sound", "picture", "all")]
    live = []
    for name in ("picture", "text"):
        prompt, chosen = model.processor(QUESTIONS[name]), Options.create(**spoken)
        spans = mrope.resolve(prompt.segments, model.config.thinker_config)
        live.append(scheduler.submit(model._ask(prompt, chosen, live=True), [(prompt, spans)]))
    replies, pieces = {}, {task: [] for task in live}
    for task, event in scheduler.run():
        if event.reply is not None:
            replies[task] = event.reply
        elif event.audio is not None:
            pieces[task].append(event.audio)
    assert next(iter(replies)) in live
    for task, name in zip([*whole, *live], ("text", "sound", "picture", "all", "picture", "text"), strict=True):
        assert replies[task] == model.generate(QUESTIONS[name], **spoken)
    for task in live:
        assert len(pieces[task]) > 1
        assert np.array_equal(np.concatenate(pieces[task]), replies[task].audio)


def test_who_has_least_sound_left_goes_first(model: OmniModel) -> None:
    scheduler = model.scheduler(SchedulerConfig(3, 3))
    spoken = dict(**SPEAK, max_tokens=200, talker=dict(max_tokens=200, **GREEDY))
    tasks = []
    for name in ("text", "picture", "sound"):
        prompt, chosen = model.processor(QUESTIONS[name]), Options.create(**spoken)
        spans = mrope.resolve(prompt.segments, model.config.thinker_config)
        tasks.append(scheduler.submit(model._ask(prompt, chosen, live=True), [(prompt, spans)]))
    order = []
    for task, event in scheduler.run():
        if event.audio is not None and event.reply is None:
            order.append((tasks.index(task), len(event.audio)))
            if len(order) == 12:
                break
    given = [0, 0, 0]
    for number, samples in order[3:]:  # after each has its first packet, nobody gets far ahead
        given[number] += samples
    assert len({number for number, _ in order[:3]}) == 3
    assert max(given) - min(given) <= 24_000


def test_spoken_replies_come_in_bursts(model: OmniModel) -> None:
    """A step of the Thinker is shared: texts are not said one at a time as seats of the Talker's get free."""
    scheduler = model.scheduler(SchedulerConfig(4, 4))
    spoken = dict(**SPEAK, max_tokens=16, talker=dict(max_tokens=60, **GREEDY))
    tasks = [submit(model, scheduler, QUESTIONS["text"], spoken) for _ in range(12)]
    replies = [event.reply for _, event in scheduler.run() if event.reply is not None]
    assert len(replies) == len(tasks)
    think = scheduler.load.think
    assert think.used == sum(len(reply.token_ids) for reply in replies)
    assert think.used >= 0.9 * think.computed
    assert scheduler.load.talk.used == sum(len(reply.codec_ids) for reply in replies)


def test_model_without_speech(tiny_model: Path) -> None:
    thinker = omni_jax.load(tiny_model, components=("thinker",))
    scheduler = thinker.scheduler(SchedulerConfig(2, 2))
    task = submit(thinker, scheduler, QUESTIONS["text"], dict(max_tokens=6))
    replies = {task: event.reply for task, event in scheduler.run() if event.reply is not None}
    assert replies[task] == thinker.generate(QUESTIONS["text"], max_tokens=6)
