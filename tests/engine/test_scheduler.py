"""Many requests at once: each is answered as alone, whoever joins, leaves or goes wrong beside it."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax.engine import decode_state
from omni_jax.engine.detokenizer import Detokenizer
from omni_jax.engine.outputs import Reply
from omni_jax.engine.request import RequestState, SchedulerConfig
from omni_jax.engine.scheduler import Scheduler
from omni_jax.engine.talker_engine import TalkerEngine
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.engine.token2wav_streaming import Token2WavStream
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from tests.generation.test_stream import GREEDY, QUESTIONS, SPEAK, endless

SLOTS = SchedulerConfig(8, 8, (8, 16))
REQUESTS = 16


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return endless(tiny_model)


def options_of(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Greedy text of 1 to 100 tokens; every third reply is spoken, up to 80 codes long."""
    spoken = dict(**SPEAK, talker=dict(max_tokens=int(rng.integers(1, 80)), **GREEDY)) if number % 3 == 0 else {}
    return dict(max_tokens=int(rng.integers(1, 101)), repetition_penalty=1.3, **spoken)


def submit(
    model: OmniModel, scheduler: Scheduler, messages: Any, options: dict[str, Any], *, live: bool = False
) -> RequestState:
    return model.submit(scheduler, model.processor(messages), Options.create(**options), live=live)


def replies_of(scheduler: Scheduler) -> dict[RequestState, Reply]:
    """Steps to the end."""
    return {state: event.reply for state, event in scheduler.run() if event.reply is not None}


def answer_alone(model: OmniModel, messages: Any, options: dict[str, Any]) -> Reply:
    scheduler = model.scheduler(SchedulerConfig(1, 1, SLOTS.block_sizes))
    submit(model, scheduler, messages, options)
    (reply,) = replies_of(scheduler).values()
    return reply


def held() -> int:
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


def test_many_mixed_requests(model: OmniModel) -> None:
    """Equal to single runs, and no more memory at the end than half way; test_warmup.py looks at compilations."""
    rng, names = np.random.default_rng(0), list(QUESTIONS)
    asked = [(QUESTIONS[names[i % len(names)]], options_of(i, rng)) for i in range(1, REQUESTS)]
    longest = dict(max_tokens=100, **SPEAK, talker=dict(max_tokens=80, **GREEDY))
    asked.insert(0, (QUESTIONS["all"], longest))  # so that caches have their size from the beginning
    scheduler, replies, memory, states = model.scheduler(SLOTS), dict[RequestState, Reply](), [], []
    for messages, options in asked:  # they come while others are answered
        states.append(submit(model, scheduler, messages, options))
        while scheduler.num_waiting > 4:
            replies |= {state: event.reply for state, event in scheduler.step() if event.reply is not None}
            memory.append(sum(a.nbytes for a in jax.live_arrays()))
    for state, event in scheduler.run():
        if event.reply is not None:
            replies[state] = event.reply
    assert len(replies) == REQUESTS and not scheduler.busy
    # alone in a scheduler of its own, which rounds sound to the same sizes
    for state, (messages, options) in list(zip(states, asked, strict=True))[::2]:
        alone = answer_alone(model, messages, options)
        assert replies[state] == alone, options  # ids of text and codes, and why it ended
        audio = replies[state].audio
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
    states = [submit(model, scheduler, QUESTIONS["text"], spoken) for _ in range(5)]
    for _ in range(3):
        scheduler.step()
    assert scheduler.num_running == 2
    for state in states[:-1]:
        scheduler.cancel(state)
    (answer,) = [event.reply for state, event in scheduler.run() if event.reply is not None]
    assert answer == alone
    for state in [submit(model, scheduler, QUESTIONS["picture"], spoken) for _ in range(3)]:
        scheduler.step()
        scheduler.cancel(state)
    assert not scheduler.busy
    del scheduler
    assert held() == before


class UnknownError(Exception):
    """Of a type that nobody expects."""


# what is broken -> the class and the method; every stage has its calls
BROKEN = {
    "prefilling": (ThinkerEngine, "prefill"),
    "placing": (ThinkerEngine, "insert"),
    "decoding": (ThinkerEngine, "decode"),
    "detokenizing": (Detokenizer, "push"),
    "handing over": (TalkerEngine, "take_slot"),
    "prefilling the Talker": (TalkerEngine, "prefill"),
    "placing in the Talker": (TalkerEngine, "insert"),
    "appending": (TalkerEngine, "append_reply"),
    "beginning": (TalkerEngine, "begin"),
    "speaking": (TalkerEngine, "decode"),
    "streaming": (Token2WavStream, "push"),
    "voicing": (Token2WavEngine, "synthesize"),
}


@pytest.mark.parametrize("live", [False, True], ids=["whole", "live"])
@pytest.mark.parametrize("stage", BROKEN)
def test_an_error_of_a_stage_fails_its_requests_alone(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch, stage: str, live: bool
) -> None:
    """An exception of an unknown type, once; requests that come behind it are answered as ever."""
    owner, name = BROKEN[stage]
    spoken = dict(**SPEAK, max_tokens=6, talker=dict(max_tokens=14, **GREEDY))
    scheduler = model.scheduler(SchedulerConfig(1, 1, (1,)))  # lists of one reply
    states = [submit(model, scheduler, QUESTIONS["text"], spoken, live=live) for _ in range(2)]
    original, calls = getattr(owner, name), []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise UnknownError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails_once)
    replies = replies_of(scheduler)
    assert len(replies) == 2 and not scheduler.busy
    failed = [state for state in states if state.error is not None]
    if not calls:  # this kind of request has no such call
        assert not failed and (stage in ("streaming",)) != live
        return
    assert len(failed) == 1 and isinstance(failed[0].error, UnknownError)
    assert replies[failed[0]].finish_reason == "error" and "planted" in (replies[failed[0]].error or "")
    (good,) = (state for state in states if state.error is None)
    assert replies[good] == model.generate(QUESTIONS["text"], **spoken)


def test_a_device_error_fails_the_stage_and_not_the_others(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has used up the state of all slots fails all that were in them; who waits is answered."""
    options = dict(max_tokens=12)
    scheduler = model.scheduler(SchedulerConfig(2, 2))
    states = [submit(model, scheduler, QUESTIONS["text"], options) for _ in range(3)]
    original = ThinkerEngine.decode

    def fails_once(engine: ThinkerEngine, state: Any, *args: Any) -> Any:
        monkeypatch.setattr(ThinkerEngine, "decode", original)
        original(engine, state, *args)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory for it")

    monkeypatch.setattr(ThinkerEngine, "decode", fails_once)
    replies = replies_of(scheduler)
    assert [replies[state].finish_reason for state in states] == ["error", "error", "length"]
    assert replies[states[2]] == model.generate(QUESTIONS["text"], **options)


def test_a_list_is_voiced_one_by_one_where_it_fails(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = dict(**SPEAK, max_tokens=6, talker=dict(max_tokens=14, **GREEDY))
    scheduler = model.scheduler(SchedulerConfig(4, 4))
    states = [submit(model, scheduler, QUESTIONS[name], spoken) for name in ("text", "picture", "a long text")]
    original, alone = Token2WavEngine.synthesize, []

    def fails_for_one(engine: Token2WavEngine, codes: Any, *args: Any) -> Any:
        if len(codes) == 1:
            alone.append(codes)
        if len(codes) > 1 or len(alone) == 2:
            raise UnknownError("planted")
        return original(engine, codes, *args)

    monkeypatch.setattr(Token2WavEngine, "synthesize", fails_for_one)
    replies = replies_of(scheduler)
    assert sorted(replies[state].finish_reason for state in states) == ["error", "length", "length"]


def test_one_transfer_a_step(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, codes and what remains of both stages come to the host together."""
    scheduler = model.scheduler(SchedulerConfig(2, 2))
    spoken = dict(**SPEAK, max_tokens=40, talker=dict(max_tokens=40, **GREEDY))
    for _ in range(2):
        submit(model, scheduler, QUESTIONS["text"], spoken, live=True)
    original, transfers = jax.device_get, []
    monkeypatch.setattr(decode_state.jax, "device_get", lambda tree: transfers.append(tree) or original(tree))
    counts = []
    while scheduler.busy:
        scheduler.step()
        counts.append(sum(isinstance(tree, list) for tree in transfers))  # samples come as a tuple with their mask
        transfers.clear()
    assert max(counts) == 1 and len(counts) > 5


def test_streams_beside_whole_replies(model: OmniModel) -> None:
    """Live requests go first, and what either kind gives does not depend on the other."""
    scheduler = model.scheduler(SchedulerConfig(3, 3))
    spoken = dict(**SPEAK, max_tokens=30, talker=dict(max_tokens=70, **GREEDY))
    whole = [submit(model, scheduler, QUESTIONS[name], spoken) for name in ("text", "all")]
    live = [submit(model, scheduler, QUESTIONS[name], spoken, live=True) for name in ("picture", "text")]
    replies, pieces = {}, {state: [] for state in live}
    for state, event in scheduler.run():
        if event.reply is not None:
            replies[state] = event.reply
        elif event.audio is not None:
            pieces[state].append(event.audio)
    assert next(iter(replies)) in live
    for state, name in zip([*whole, *live], ("text", "all", "picture", "text"), strict=True):
        assert replies[state] == model.generate(QUESTIONS[name], **spoken)
    for state in live:
        assert len(pieces[state]) > 1
        assert np.array_equal(np.concatenate(pieces[state]), replies[state].audio)


def test_who_has_least_sound_left_goes_first(model: OmniModel) -> None:
    # in no time, so that what a listener has left is what it was given
    scheduler = Scheduler(dataclasses.replace(model.engines, clock=lambda: 0.0), SchedulerConfig(3, 3))
    spoken = dict(**SPEAK, max_tokens=200, talker=dict(max_tokens=200, **GREEDY))
    states = [submit(model, scheduler, QUESTIONS[name], spoken, live=True) for name in ("text", "picture", "sound")]
    given = dict.fromkeys(states, 0)
    num_pieces = 0
    for state, event in scheduler.run():
        if event.audio is not None and event.reply is None:
            given[state] += len(event.audio)
            # once each has its first packet, nobody gets far ahead
            if all(given.values()):
                num_pieces += 1
                assert max(given.values()) - min(given.values()) <= 36_000
            if num_pieces == 8:
                break
    assert num_pieces == 8


def test_spoken_replies_come_in_bursts(model: OmniModel) -> None:
    """A step of the Thinker is shared: texts are not decoded one at a time as slots of the Talker's get free."""
    scheduler = model.scheduler(SchedulerConfig(4, 4))
    spoken = dict(**SPEAK, max_tokens=16, talker=dict(max_tokens=60, **GREEDY))
    states = [submit(model, scheduler, QUESTIONS["text"], spoken) for _ in range(8)]
    replies = [event.reply for _, event in scheduler.run() if event.reply is not None]
    assert len(replies) == len(states)
    text = scheduler.utilization.text
    assert text.used == sum(len(reply.token_ids) for reply in replies)
    assert text.used >= 0.9 * text.computed
    assert scheduler.utilization.speech.used == sum(len(reply.codec_ids) for reply in replies)


def test_model_without_speech(tiny_model: Path) -> None:
    thinker = omni_jax.load(tiny_model, components=("thinker",))
    scheduler = thinker.scheduler(SchedulerConfig(2, 2))
    state = submit(thinker, scheduler, QUESTIONS["text"], dict(max_tokens=6))
    replies = {state: event.reply for state, event in scheduler.run() if event.reply is not None}
    assert replies[state] == thinker.generate(QUESTIONS["text"], max_tokens=6)
