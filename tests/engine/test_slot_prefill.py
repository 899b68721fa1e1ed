"""Prompts of a batch that are read right into slots leave there what a prompt that is read alone leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax.engine.outputs import SlotUse, Timings, Utilization
from omni_jax.engine.prefill import Prefix
from omni_jax.engine.request import RequestState, SchedulerConfig
from omni_jax.engine.slot_prefill import SlotPrefill
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.thinker_stage import ThinkerStage
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.processing.prefill_plan import BLOCK_WIDTH
from omni_jax.sharding import make_mesh
from tests.generation.test_stream import QUESTIONS, endless

# sums of another order: a call computes eight short blocks in place of a wide chunk
TOLERANCE = 2e-5
SYSTEM = {"role": "system", "content": "You answer like a sailor who has been at sea for too long. " * 12}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return endless(tiny_model)


def ask_with_system(words: str) -> list[dict[str, Any]]:
    return [SYSTEM, {"role": "user", "content": words}]


def make_states(model: OmniModel, questions: Sequence[Any]) -> list[RequestState]:
    scheduler = model.scheduler(SchedulerConfig())  # only makes the requests
    states = []
    for question in questions:
        states.append(model.submit(scheduler, model.processor(question), Options.create(max_tokens=4)))
    return states


class Slots:
    """A stage and the prompts that are read into it."""

    def __init__(self, model: OmniModel, num_slots: int):
        self.stage = ThinkerStage(model.engines, num_slots, Timings(), Utilization())
        self.prompts = SlotPrefill(model.engines, self.stage, Timings())
        self.use = SlotUse()

    def read(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self.prompts.start(state)
        while self.prompts.states:
            use = self.prompts.step()
            self.use.add(use.used, use.computed)
            for state, chunks in self.prompts.take_complete():
                self.stage.begin(state, chunks)


def assert_as_alone(model: OmniModel, slots: Slots, state: RequestState) -> None:
    """What the slot holds is what a prefix of the same prompt holds."""
    prefix = Prefix(model.engines, state.request.initial_capacity, Timings(), with_talker=False)
    prefix.add(state.request.pieces)
    prefix.run()
    slot = slots.stage.slot_of(state)
    held = slots.stage.device_state
    assert slot is not None and held is not None
    alone = prefix.thinker
    length = len(state.request.text.prompt)
    assert int(held.context.cache.lengths[slot]) == int(alone.context.cache.lengths[0]) == length
    assert int(held.context.position[slot]) == int(alone.context.position[0])
    np.testing.assert_allclose(held.context.hidden[slot], alone.context.hidden[0], atol=TOLERANCE)
    assert held.talker_inputs is not None and alone.talker_inputs is not None
    np.testing.assert_allclose(held.talker_inputs[slot, :length], alone.talker_inputs[0, :length], atol=TOLERANCE)
    for own, other in zip(
        (*held.context.cache.k, *held.context.cache.v), (*alone.context.cache.k, *alone.context.cache.v), strict=True
    ):
        np.testing.assert_allclose(own[slot, :, :length], other[0, :, :length], atol=TOLERANCE)


def test_slots_hold_what_prefixes_hold(model: OmniModel) -> None:
    """Of every kind of media, more prompts than a call has blocks, in slots that held others before."""
    slots = Slots(model, 8)
    for order in (1, -1):
        states = make_states(model, list(QUESTIONS.values())[:7][::order])
        slots.read(states)
        for state in states:
            assert_as_alone(model, slots, state)
        for state in states[1:]:  # one stays, so that the state does
            slots.stage.remove(state)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every prefix that is copied."""
    original = ThinkerEngine.copy_prefix
    lengths: list[int] = []

    def note(engine: ThinkerEngine, state: Any, source: int, target: int, length: int) -> Any:
        lengths.append(length)
        return original(engine, state, source, target, length)

    monkeypatch.setattr(ThinkerEngine, "copy_prefix", note)
    return lengths


def test_a_system_prompt_is_read_once(model: OmniModel, copied: list[int]) -> None:
    """Those that come together wait for the first of them; one that comes later finds it too."""
    slots = Slots(model, 4)
    states = make_states(model, [ask_with_system(words) for words in ("Who are you?", "Where to?", "Ahoy!")])
    shortest = min(len(state.request.text.prompt) for state in states)
    slots.read(states[:2])
    # the slot is free again and still holds its text
    slots.stage.remove(states[0])
    slots.read(states[2:])
    assert len(copied) == 2 and all(shortest - 2 * BLOCK_WIDTH < length < shortest for length in copied)
    total = sum(len(state.request.text.prompt) for state in states)
    assert slots.use.used == total - sum(copied)
    for state in states[1:]:
        assert_as_alone(model, slots, state)


def test_media_are_never_shared(model: OmniModel, copied: list[int]) -> None:
    """Of two prompts with the same tokens and other pictures, the text in front of these."""
    slots = Slots(model, 4)
    prompt = model.processor(QUESTIONS["picture"])
    states = make_states(model, [QUESTIONS["picture"], QUESTIONS["picture"]])
    slots.read(states)
    assert copied == [int(np.argmax(prompt.media_item >= 0))]
    for state in states:
        assert_as_alone(model, slots, state)


def test_a_batch_of_prompts_has_little_padding(model: OmniModel) -> None:
    """Prompts of 60 to 500 tokens, no two of which begin alike."""
    questions = []
    for number in range(8):
        questions.append(
            [{"role": "system", "content": f"{number}"}, {"role": "user", "content": "word " * (40 + 55 * number)}]
        )
    slots = Slots(model, 8)
    slots.read(make_states(model, questions))
    assert slots.use.used > 1000
    assert slots.use.computed - slots.use.used < 0.08 * slots.use.computed


class UnknownError(Exception):
    """Of a type that nobody expects."""


@pytest.mark.parametrize("name", ["encode", "prefill_blocks", "copy_prefix", "begin"])
def test_an_error_fails_the_requests_of_its_call(model: OmniModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The other requests are answered as ever."""
    original = getattr(ThinkerEngine, name)
    calls: list[str] = []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise UnknownError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(ThinkerEngine, name, fails_once)
    questions = [ask_with_system(f"What is {number}?") for number in range(4)] + [QUESTIONS["picture"]]
    replies = model.generate_batch(questions, batch_size=2, max_tokens=5)
    failed = [reply for reply in replies if reply.error is not None]
    assert calls and 1 <= len(failed) <= 2 and all("planted" in str(reply.error) for reply in failed)
    monkeypatch.undo()
    for question, reply in zip(questions, replies, strict=True):
        assert reply.error is not None or reply == model.generate(question, max_tokens=5)


def test_stacked_layers_answer_as_single_ones(tiny_model: Path, model: OmniModel) -> None:
    """As over a mesh and on a TPU, where the slots of blocks are cut out of the cache of all layers."""
    stacked = omni_jax.load(tiny_model, mesh=make_mesh(devices=jax.devices()[:1]), components=("thinker",))
    questions = [ask_with_system("Who are you?"), QUESTIONS["picture"], ask_with_system("Where to?")]
    options = dict(batch_size=4, max_tokens=5)
    assert stacked.generate_batch(questions, **options) == model.generate_batch(questions, **options)
