"""Every program that a stream runs, compiled before the first request; and a counter that shows it.

Programs differ by shapes alone, and all shapes are rounded up to a few: two widths of chunks, caches of powers of two,
pictures of so many windows. So it is enough to walk these once.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax import monitoring

from omni_jax import mrope
from omni_jax.batch import AudioBlocks, VisionFrames, bucket
from omni_jax.engine.prefill import Engines
from omni_jax.engine.request import SchedulerConfig
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.talker_engine import Said, SpeechRequest, SpeechState, TalkerParams
from omni_jax.engine.thinker_engine import TextRequest, TextState, room
from omni_jax.processing.layout import lay_out
from omni_jax.processing.prefill_plan import BLOCKS, NARROW, Stretch, feed, frames_of_call


class Compilations:
    """Counts the programs that are compiled, or fetched from a cache on disk, while it is open.

    Attributes:
      count: so far.
      seconds: that they took.
    """

    count: int = 0
    seconds: float = 0.0

    def __enter__(self) -> Compilations:
        monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs


def warm_up(loops: Engines, slots: SchedulerConfig, *, tokens: int, windows: int) -> None:
    """Runs every program of Thinker and Talker that a scheduler does; Token2Wav's has ``Token2WavEngine``.

    Args:
      loops: of a model.
      slots: of the scheduler.
      tokens: of a prompt and its reply, or of a prompt and the codes of its speech, at most.
      windows: of a picture at most, each 112 x 112 pixels; 0 for none.
    """
    _media(loops, loops.rows(1), windows)
    held, last = room(1), room(tokens)
    while True:
        for lengths in ((NARROW, NARROW), (2 * NARROW + 1,)):
            text, speech = _read(loops, loops.rows(1), held, lengths)
        _answer(loops, slots, text, speech, sum(lengths))
        if held == last:
            break
        held *= 2
        for rows in {loops.rows(1), loops.rows(slots.thinker)}:
            loops.text.grown(loops.text.empty(rows, held // 2), held)
        for rows in {loops.rows(1), loops.rows(slots.talker)} if loops.speech is not None else ():
            assert loops.speech is not None
            loops.speech.grown(loops.speech.empty(rows, held // 2), held)


def _media(loops: Engines, rows: int, windows: int) -> None:
    """The encoders, and how what they make gets into either width of chunk."""
    c = loops.config.thinker_config
    sound, vision = c.audio_config, c.vision_config
    calls: list[AudioBlocks | VisionFrames] = []
    for blocks in (1, BLOCKS):
        mel = np.zeros((blocks, sound.block_frames, sound.num_mel_bins), np.float32)
        calls.append(AudioBlocks(mel, np.full(blocks, sound.block_frames, np.int32)))
    for size in sorted({bucket(n) for n in range(1, windows + 1)}):
        shape = (frames_of_call(size), size, (vision.window_cells * vision.spatial_merge_size) ** 2)
        place = np.zeros(shape, np.int32)
        calls.append(VisionFrames(np.zeros((*shape, vision.patch_dim), np.float32), place, place, place == 0))
    for call in calls:
        features = loops.text.encode(call)
        for length in (NARROW, 2 * NARROW + 1):
            (stretch,) = _plan(loops, rows, length)
            nowhere = np.full(stretch.chunk.tokens.shape, -1, np.int32)
            with_media = dataclasses.replace(stretch, takes={0: nowhere})
            loops.text.read(loops.text.empty(rows, length), with_media, [features])


def _plan(loops: Engines, rows: int, length: int) -> tuple[Stretch, ...]:
    c = loops.config
    prompt = lay_out([0] * length, [], c.thinker_config)
    return feed([prompt] * rows, [mrope.resolve(prompt.segments, c.thinker_config)] * rows, c).stretches


def _read(loops: Engines, rows: int, slots: int, lengths: tuple[int, ...]) -> tuple[TextState, SpeechState | None]:
    """Prompts in pieces of these lengths, each of which is one chunk."""
    text = loops.text.empty(rows, slots)
    speech = None if loops.speech is None else loops.speech.empty(rows, slots)
    for length in lengths:
        (stretch,) = _plan(loops, rows, length)
        text = loops.text.read(text, stretch, [])
        if loops.speech is not None and speech is not None:
            assert text.heard is not None
            speech = loops.speech.read(speech, text.heard, stretch.chunk)
    return text, speech


def _answer(loops: Engines, slots: SchedulerConfig, text: TextState, speech: SpeechState | None, length: int) -> None:
    """One request takes its row and its seat, and both loops are called: the first time, and once after it."""
    held = text.cache.capacity
    text = loops.text.ask(
        text, {0: TextRequest(SamplingParams(), 2 * loops.pace.tokens, ())}, {0: np.zeros(1, np.int32)}
    )
    text = loops.text.put(loops.text.empty(loops.rows(slots.thinker), held), 0, text)
    for steps in (loops.pace.first_tokens, loops.pace.tokens):
        _, text = loops.text.advance(text, steps)
    if loops.speech is None or speech is None:
        return
    assert text.heard is not None
    loop, seats = loops.speech, loops.rows(slots.talker)
    speech = loop.put(loop.empty(seats, held), 0, speech)
    source, zeros = np.where(np.arange(seats) > 0, -1, 0), np.zeros(seats, np.int32)
    script = loop.script(seats)
    while True:
        for heard in (text.heard, loop.alone(text.heard, 0, loops.rows(1))):
            script = loop.written(script, heard, source, zeros, zeros)
        if script.shape[1] >= held:
            break
        begin = np.full(seats, script.shape[1])  # just behind its end, so that it grows
        script = loop.written(script, text.heard, source, zeros, begin)
        speech = _speak(loops, speech, script, length)
    _speak(loops, speech, script, length)


def _speak(loops: Engines, speech: SpeechState, script: jax.Array, length: int) -> SpeechState:
    loop, seats = loops.speech, len(script)
    assert loop is not None
    request = SpeechRequest(length, 0, 0, TalkerParams(max_tokens=2 * loops.pace.codes))
    spans = mrope.stack([[mrope.Span(0, length)]] * seats, 2, width=1)
    speech = loop.begin(speech, script, {0: request}, spans)
    said = Said(np.zeros(seats, np.int32), np.full(seats, 2 * loops.pace.tokens), np.ones(seats, bool))
    for _ in range(2):
        _, speech = loop.advance(speech, script, said)
    return speech
