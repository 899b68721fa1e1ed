"""Speech that goes on from a clip: what the next code depends on, and how the clip is read.

That the logits are those of training, training/test_talker.py has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.engine import talker_engine
from omni_jax.engine.talker_engine import CLIP_CODES_PER_CALL, CLIP_ROWS, SpeechClip
from omni_jax.engine.talker_programs import TalkerState
from tests.engine import speaking
from tests.engine.speaking import Dialogue, Parts
from tests.engine.test_talker_engine import make_dialogue

WIDTH = OmniConfig.tiny().talker_config.embedding_size
NUM_TOKENS = 9  # of a reply
# float32, with sums of another order where chunks have another width
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model)


def make_clip(num_rows: int, num_codes: int, seed: int = 0) -> SpeechClip:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((1, CLIP_ROWS, WIDTH), dtype=np.float32)
    return SpeechClip(jnp.asarray(rows), num_rows, rng.integers(0, 65, num_codes).astype(np.int32))


def begin(
    parts: Parts, clips: Mapping[int, SpeechClip], dialogue: Dialogue, *, num_slots: int = 1, is_complete: bool = True
) -> TalkerState:
    """Slots that read one prompt and one reply, and each its clip, if it has one."""
    inputs = np.random.default_rng(7).standard_normal((num_slots, 64, WIDTH)).astype(np.float32)
    inputs[:] = inputs[0]
    state = parts.talker.init_state(num_slots, speaking.CAPACITY)
    requests = {}
    for slot in range(num_slots):
        context = parts.talker.init_prefix(1, speaking.CAPACITY)
        for chunk in parts.plan(dialogue.prompt).chunks:
            context = parts.prefill_talker(context, inputs[:1], chunk, 0)
        state = parts.talker.insert(state, slot, context)
        requests[slot] = parts.request(dialogue)
        if slot in clips:
            state = parts.talker.insert_clip(state, slot, clips[slot])
            requests[slot] = dataclasses.replace(
                requests[slot], clip=clips[slot], reply_tokens=NUM_TOKENS if is_complete else None
            )
    counts = [NUM_TOKENS] * num_slots
    state = parts.append_all(state, inputs, [len(dialogue.prompt)] * num_slots, counts)
    return parts.talker.begin(state, requests)


def hidden_of(state: TalkerState, slot: int = 0) -> np.ndarray:
    """From which the next code's logits are made."""
    return np.asarray(state.context.hidden)[slot]


def test_rows_codes_and_token_all_count(parts: Parts) -> None:
    dialogue = make_dialogue(20, NUM_TOKENS)
    clip = make_clip(12, 10)
    base = hidden_of(begin(parts, {0: clip}, dialogue))
    others = {
        "rows": ({0: dataclasses.replace(clip, rows=make_clip(12, 10, seed=1).rows)}, dialogue),
        "fewer rows": ({0: dataclasses.replace(clip, num_rows=9)}, dialogue),
        "codes": ({0: dataclasses.replace(clip, codes=clip.codes[::-1])}, dialogue),
        "token": ({0: clip}, dataclasses.replace(dialogue, voice_token=dialogue.voice_token + 1)),
        "no clip": ({}, dialogue),
    }
    for name, (clips, other) in others.items():
        assert np.abs(hidden_of(begin(parts, clips, other)) - base).max() > 100 * TOLERANCE, name
    # rows behind the clip's are not read
    padded = jnp.asarray(clip.rows).at[:, 12:].set(1e6)
    same = hidden_of(begin(parts, {0: dataclasses.replace(clip, rows=padded)}, dialogue))
    np.testing.assert_array_equal(same, base)


@pytest.mark.parametrize("num_rows", [3, 200])
def test_a_clip_in_several_calls_is_one_in_few(parts: Parts, monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Of a text that ends while the clip's codes are read, and of one that does not."""
    clip = make_clip(num_rows, CLIP_CODES_PER_CALL + 22)
    dialogue = make_dialogue(20, NUM_TOKENS)
    few = begin(parts, {0: clip}, dialogue)
    monkeypatch.setattr(talker_engine, "CLIP_CODES_PER_CALL", 40)
    many = begin(parts, {0: clip}, dialogue)
    np.testing.assert_allclose(hidden_of(many), hidden_of(few), atol=TOLERANCE)
    length = len(dialogue.prompt) + 2 + len(clip.codes)
    assert int(np.asarray(few.context.cache.lengths)[0]) == int(np.asarray(few.context.position)[0]) == length
    assert int(np.asarray(few.sampling.step)[0]) == len(clip.codes)


def test_a_text_that_goes_on_is_read_as_a_complete_one(parts: Parts) -> None:
    """As soon as it has the rows that the clip's codes take, and no sooner."""
    clip = make_clip(4, 10)
    assert clip.min_tokens == 8
    dialogue = make_dialogue(20, NUM_TOKENS)
    complete = begin(parts, {0: clip}, dialogue)
    goes_on = begin(parts, {0: clip}, dialogue, is_complete=False)
    np.testing.assert_array_equal(hidden_of(goes_on), hidden_of(complete))
    # the last row that is read is that of the reply's last but one token
    assert make_clip(10, 4).min_tokens == 2 and make_clip(4, 4).min_tokens == 2 and make_clip(4, 5).min_tokens == 3


def test_slots_have_clips_of_their_own(parts: Parts) -> None:
    """Of unequal lengths, beside one that has none."""
    dialogue = make_dialogue(20, NUM_TOKENS)
    clips = {0: make_clip(12, 10), 1: make_clip(3, CLIP_CODES_PER_CALL + 1, seed=1), 3: make_clip(100, 50, seed=2)}
    together = begin(parts, clips, dialogue, num_slots=4)
    for slot in range(4):
        alone = begin(parts, {0: clips[slot]} if slot in clips else {}, dialogue)
        np.testing.assert_allclose(hidden_of(together, slot), hidden_of(alone), atol=TOLERANCE)
