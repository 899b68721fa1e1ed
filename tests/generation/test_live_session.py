"""Live sessions: what comes live is answered as if it had been given as a whole, and is prefilled by then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax.batch import AudioBlocks
from omni_jax.engine.outputs import Event, Reply
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.errors import InputError
from omni_jax.generation.live_session import LiveSession
from omni_jax.generation.model import OmniModel
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.prefill_plan import PrefillChunk

RATE = 16_000
BEFORE = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}]
TEXT = "what was that?"


def sound(seconds: float) -> np.ndarray:
    """Noise that fades, so that the floor of the log-mel is known after the first block."""
    n = round(seconds * RATE)
    return (0.1 * np.random.default_rng(0).standard_normal(n) * np.exp(-np.arange(n) / 20_000)).astype(np.float32)


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 256, (count, 56, 84, 3), np.uint8))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    model = omni_jax.load(tiny_model)
    model.processor = model.processor.with_pixels(video_min_pixels=1)
    return model


def spoken_messages(samples: np.ndarray) -> list[dict[str, Any]]:
    content = [{"type": "audio", "audio": samples, "sampling_rate": RATE}, {"type": "text", "text": TEXT}]
    return [*BEFORE, {"role": "user", "content": content}]


def push_sound(session: LiveSession, samples: np.ndarray, size: int = 3200) -> None:
    for begin in range(0, len(samples), size):
        session.audio(samples[begin : begin + size], RATE)


def last(events: Iterator[Event]) -> Reply:
    made = list(events)
    reply = made[-1].reply
    assert reply is not None and "".join(e.text or "" for e in made) == reply.text
    return reply


@pytest.mark.parametrize("seconds", [0.5, 2.0, 5.3])
def test_a_sound(model: OmniModel, seconds: float) -> None:
    session, samples = model.listen(BEFORE, max_tokens=16), sound(seconds)
    push_sound(session, samples)
    assert last(session.answer(TEXT)) == model.generate(spoken_messages(samples), max_tokens=16)


def test_a_video(model: OmniModel) -> None:
    session, frames = model.listen(BEFORE, audio=False, video=True), pictures(6)
    for i, frame in enumerate(frames):
        session.video(frame, i / 2)
    content = [{"type": "video", "video": frames, "fps": 2.0}, {"type": "text", "text": TEXT}]
    wanted = model.generate([*BEFORE, {"role": "user", "content": content}], max_tokens=16)
    assert last(session.answer(TEXT, max_tokens=16)) == wanted


def test_the_answer_is_spoken(model: OmniModel) -> None:
    options: dict[str, Any] = dict(
        modalities=("text", "audio"), max_tokens=12, talker=dict(temperature=0, max_tokens=20)
    )
    session, samples = model.listen(BEFORE, **options), sound(2.5)
    push_sound(session, samples)
    events = list(session.answer(TEXT))
    reply, wanted = events[-1].reply, model.generate(spoken_messages(samples), **options)
    assert reply == wanted and len(wanted.codec_ids) > 0
    sounds = [e.audio for e in events if e.audio is not None]
    assert sum(map(len, sounds)) == 480 * len(wanted.codec_ids)


class Counts:
    """How often the encoders and the Thinker were called."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.blocks = self.frames = self.chunks = self.tokens = 0
        encode, prefill = ThinkerEngine.encode, ThinkerEngine.prefill

        def counted_encode(engine: ThinkerEngine, media: Any, *args: Any) -> Any:
            if isinstance(media, AudioBlocks):
                self.blocks += len(media.mel)
            else:
                self.frames += int(np.asarray(media.valid).any(axis=(1, 2)).sum())
            return encode(engine, media, *args)

        def counted_prefill(engine: ThinkerEngine, prefix: Any, chunk: PrefillChunk, *args: Any) -> Any:
            self.chunks += 1
            self.tokens += int(chunk.valid.sum())
            return prefill(engine, prefix, chunk, *args)

        patch.setattr(ThinkerEngine, "encode", counted_encode)
        patch.setattr(ThinkerEngine, "prefill", counted_prefill)

    def taken(self) -> tuple[int, int, int, int]:
        """Blocks of sound, grids of pictures, chunks and tokens since it was last asked."""
        counts = self.blocks, self.frames, self.chunks, self.tokens
        self.blocks = self.frames = self.chunks = self.tokens = 0
        return counts


def test_after_the_last_frame_one_block_is_left(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long somebody spoke."""
    counts, samples, remaining = Counts(monkeypatch), sound(11.9), []
    for seconds in (1.9, 5.9, 11.9):
        session = model.listen(BEFORE, max_tokens=1)
        assert counts.taken()[0] == 0  # what comes before the sound is read, and only that
        push_sound(session, samples[: round(seconds * RATE)])
        full = int(seconds // 2)
        assert counts.taken() == (full, 0, full, 50 * full + (full > 0))  # and the begin mark
        last(session.answer())
        remaining.append(counts.taken())
    # 47 tokens of the last 1.9 s, the end mark and what the template writes behind it
    assert {(blocks, chunks) for blocks, _, chunks, _ in remaining} == {(1, 1)}
    assert remaining[1] == remaining[2] and remaining[0][3] == remaining[1][3] + 1


def test_after_the_last_picture_one_window_is_left(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, samples, frames = Counts(monkeypatch), sound(5.5), pictures(11)
    session = model.listen(BEFORE, video=True, max_tokens=1)
    for i, frame in enumerate(frames):
        session.video(frame, i / 2)
        session.audio(samples[i * 8000 : (i + 1) * 8000], RATE)
        assert counts.taken()[:2] == ((1, 2) if i in (4, 8) else (0, 0))  # with the first sound behind the window
    last(session.answer())
    assert counts.taken()[:2] == (1, 2)


def test_mistakes_leave_the_dialogue_as_it_was(model: OmniModel) -> None:
    session, samples = model.listen(BEFORE, max_tokens=8), sound(2.5)
    with pytest.raises(InputError, match="nothing has been heard yet"):
        session.answer(TEXT)
    push_sound(session, samples[:20_000])
    with pytest.raises(InputError, match="NaN"):
        session.audio(np.full(10, np.nan, np.float32), RATE)
    for options, message in (
        (dict(modalities=("text", "audio")), "modalities must be given to listen"),
        (dict(tokens=3), "unknown option tokens"),
    ):
        with pytest.raises(InputError, match=message):
            session.answer(TEXT, **options)
    with pytest.raises(InputError, match="the prompt would have"):
        session.answer("word " * 40_000)
    push_sound(session, samples[20_000:])
    assert last(session.answer(TEXT)) == model.generate(spoken_messages(samples), max_tokens=8)
    for call in (lambda: session.audio(samples, RATE), lambda: session.answer(TEXT)):
        with pytest.raises(InputError, match="answered or closed; begin another with listen"):
            call()


def test_mistakes_are_told_at_the_beginning(model: OmniModel) -> None:
    with pytest.raises(InputError, match="unknown option"):
        model.listen(BEFORE, tokens=3)
    with pytest.raises(InputError, match="content"):
        model.listen([{"role": "user", "content": [{"type": "smell"}]}])


@pytest.mark.parametrize("end", ["close", "drop", "leave"])
def test_nothing_is_kept(model: OmniModel, end: str) -> None:
    session = model.listen(BEFORE)
    assert session._prefix is not None
    state = weakref.ref(session._prefix)
    push_sound(session, sound(2.5))
    if end == "close":
        session.close()
    elif end == "leave":
        events = session.answer(TEXT)
        next(events)
        del events
    else:
        del session
    gc.collect()
    assert state() is None
