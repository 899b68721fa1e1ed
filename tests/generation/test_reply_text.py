"""Replies whose text is given: the model speaks it, and all else is as of a reply of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax import SPEECH_SYSTEM_PROMPT
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.engine.thinker_programs import ThinkerState
from omni_jax.errors import InputError
from omni_jax.generation.model import OmniModel
from tests.engine.speaking import CAPACITY, Parts

SYSTEM = {"role": "system", "content": SPEECH_SYSTEM_PROMPT}
QUESTION = [SYSTEM, {"role": "user", "content": "hello"}]
TEXT = "Good morning, <|im_end|> all of you."  # names of special tokens in it are letters
TALKER = dict(max_tokens=30, temperature=0.3, top_k=0, top_p=1.0)
SPEAK: dict[str, Any] = dict(modalities=("text", "audio"), talker=TALKER)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return omni_jax.load(tiny_model)


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model)


def decode(parts: Parts, request: TextRequest, prompt: Any) -> tuple[list[int], ThinkerState]:
    prefix, _ = parts.prefill(prompt)
    state = parts.thinker.insert(parts.thinker.init_state(2, 256), 0, prefix, request)
    (tokens,), state = parts.answer(state, 1)
    return tokens, state


def test_a_given_reply_leaves_what_the_same_reply_of_the_model_leaves(model: OmniModel, parts: Parts) -> None:
    prompt = model.processor(QUESTION)
    own = TextRequest(prompt.tokens, SamplingParams(temperature=1.0, seed=3), 20, ())
    tokens, expected = decode(parts, own, prompt)
    assert len(tokens) == 20
    # drawn with another seed, and all of it given; then the first half alone, and the model goes on
    greedy = SamplingParams()
    given = dataclasses.replace(own, sampling=greedy, given_tokens=tuple(tokens))
    again, state = decode(parts, given, prompt)
    assert again == tokens
    assert np.array_equal(state.context.hidden, expected.context.hidden)
    assert state.talker_inputs is not None and expected.talker_inputs is not None
    length = len(prompt) + 20
    assert state.context.capacity == expected.context.capacity == CAPACITY
    assert np.array_equal(state.talker_inputs[0, :length], expected.talker_inputs[0, :length])
    half, _ = decode(parts, dataclasses.replace(given, given_tokens=tuple(tokens[:10])), prompt)
    assert half[:10] == tokens[:10] and half[10:] != tokens[10:]
    # a slot forgets what it was given
    prefix, _ = parts.prefill(prompt)
    state = parts.thinker.insert(state, 0, prefix, dataclasses.replace(own, sampling=greedy))
    (own_greedy,), _ = parts.answer(state, 1)
    assert own_greedy == decode(parts, dataclasses.replace(own, sampling=greedy), prompt)[0] != tokens


def test_room_is_made_for_a_given_reply(model: OmniModel, parts: Parts) -> None:
    """Longer than the caches that the prompt was read into."""
    prompt = model.processor(QUESTION)
    given = tuple(np.random.default_rng(0).integers(0, 500, CAPACITY).tolist())
    request = TextRequest(prompt.tokens, SamplingParams(), len(given), (), given)
    tokens, state = decode(parts, request, prompt)
    assert tuple(tokens) == given
    assert state.given_tokens.shape == (2, 2 * CAPACITY)


def test_the_model_speaks_a_text(model: OmniModel) -> None:
    reply = model.generate(QUESTION, reply_text=TEXT, **SPEAK)
    assert reply.text == TEXT and reply.finish_reason == "stop"
    assert reply.token_ids == model.processor.encode_reply(TEXT)
    assert reply.token_ids[-1] in model.processor.stop_ids
    assert reply.codec_ids and reply.audio is not None and len(reply.audio) == 480 * len(reply.codec_ids)
    # an answer of the model's own is another, and so is what is spoken of another text
    assert model.generate(QUESTION, max_tokens=40).text != TEXT
    assert model.generate(QUESTION, reply_text="Another text.", **SPEAK).codec_ids != reply.codec_ids
    # piece by piece, in a batch, and after a question that came as it was asked
    events = list(model.stream(QUESTION, reply_text=TEXT, **SPEAK))
    assert "".join(event.text or "" for event in events) == TEXT
    for other in model.generate_batch([QUESTION, QUESTION[:1]], reply_text=TEXT, **SPEAK):
        assert (other.text, other.token_ids) == (TEXT, reply.token_ids)
    assert model.generate_batch([QUESTION, QUESTION], reply_text=TEXT, **SPEAK)[1].codec_ids == reply.codec_ids


def test_the_context_cuts_a_given_text(model: OmniModel) -> None:
    context = len(model.processor(QUESTION)) + 20
    thinker = model.config.thinker_config
    text_config = dataclasses.replace(thinker.text_config, max_position_embeddings=context)
    config = dataclasses.replace(model.config, thinker_config=dataclasses.replace(thinker, text_config=text_config))
    small = OmniModel(config, model.processor, model.engines, model.voices)
    text = "a b " * 20
    reply = small.generate(QUESTION, reply_text=text)
    assert reply.finish_reason == "length" and text.startswith(reply.text)
    assert reply.token_ids == model.processor.encode_reply(text)[:20]


@pytest.mark.parametrize("value", ["", 3, ["a"]])
def test_what_is_no_text(value: Any, model: OmniModel) -> None:
    with pytest.raises(InputError, match=r"reply_text is .*; it must be a text"):
        model.generate(QUESTION, reply_text=value)
