"""All programs that a scheduler runs, compiled before the first request; and a counter that shows it.

Programs differ by shapes alone, and all shapes are rounded up to a few: two widths of chunks, caches of powers of two,
pictures of so many windows. So it suffices to run these once, through the stages that requests go through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import monitoring

from omni_jax import mrope
from omni_jax.batch import AudioBlocks, VisionFrames, bucket
from omni_jax.checkpoint.voices import Voice
from omni_jax.engine.decode_state import round_capacity
from omni_jax.engine.detokenizer import Detokenizer
from omni_jax.engine.outputs import Timings, Utilization
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.request import Request, RequestState, SchedulerConfig, SpeechParams, TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.stage import decode_together
from omni_jax.engine.talker_stage import TalkerStage
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.engine.thinker_stage import ThinkerStage
from omni_jax.processing.layout import Usage, lay_out
from omni_jax.processing.prefill_plan import (
    AUDIO_BLOCKS,
    NARROW_CHUNK,
    NO_FEATURE,
    PromptPiece,
    frames_per_call,
    plan_prefill,
)

_WIDE_PROMPT = 2 * NARROW_CHUNK + 1  # the shortest that is cut into a wide chunk


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
        # jax reports this for each program, also for one that it finds in its cache on disk
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs


def warm_up_decoders(engines: Engines, config: SchedulerConfig, *, tokens: int, windows: int) -> None:
    """Runs every program of encoders, Thinker and Talker that a scheduler does.

    Args:
      engines: of a model.
      config: of the scheduler.
      tokens: of a prompt and its reply, or of a prompt and the codes of its speech, at most.
      windows: of a picture at most, each 112 x 112 pixels; 0 for none.
    """
    _warm_up_encoders(engines, windows)
    capacity = round_capacity(1)
    # every capacity that a cache can have, and the step from each to the next
    while True:
        _warm_up_stages(engines, config, capacity)
        if capacity >= round_capacity(tokens):
            return
        _warm_up_resizing(engines, config, capacity)
        capacity *= 2


def warm_up_sound(
    engines: Engines, voices: Sequence[Voice], configs: Sequence[SchedulerConfig], *, tokens: int, streams: bool
) -> None:
    """Runs every program of Token2Wav that schedulers do.

    Args:
      engines: of a model; nothing is done where it does not speak.
      voices: that it has.
      configs: of the schedulers.
      tokens: codes of a reply at most.
      streams: whether there are live requests.
    """
    engine = engines.token2wav
    if engine is None or not voices:
        return
    for config in configs:
        engine.warm_up_lists(voices, config.block_sizes, engine.count_blocks(tokens))
    if streams:
        engine.warm_up_streams(voices, engines.chunk_sizes.first_chunk_codes, engines.chunk_sizes.chunk_codes)


def _warm_up_encoders(engines: Engines, windows: int) -> None:
    """The encoders, and how their features get into either width of chunk."""
    num_slots = engines.round_slots(1)
    for media in _media_of_all_shapes(engines, windows):
        features = engines.thinker.encode(media)
        # the features of either encoder may come to stand in a chunk of either width
        for length in (NARROW_CHUNK, _WIDE_PROMPT):
            (chunk,) = plan_prefill([_make_piece(engines, length)] * num_slots, engines.config).chunks
            # which positions take a feature is a value and not a shape, so none need to
            nowhere = np.full(chunk.tokens.shape, NO_FEATURE, np.int32)
            chunk = dataclasses.replace(chunk, feature_index={0: nowhere})
            engines.thinker.prefill(engines.thinker.init_prefix(num_slots, length), chunk, [features])


def _media_of_all_shapes(engines: Engines, windows: int) -> list[AudioBlocks | VisionFrames]:
    c = engines.config.thinker_config
    media: list[AudioBlocks | VisionFrames] = []
    # sound comes as one block or as a full call
    for num_blocks in (1, AUDIO_BLOCKS):
        frames = c.audio_config.block_frames
        mel = np.zeros((num_blocks, frames, c.audio_config.num_mel_bins), np.float32)
        media.append(AudioBlocks(mel, np.full(num_blocks, frames, np.int32)))
    window_patches = (c.vision_config.window_cells * c.vision_config.spatial_merge_size) ** 2
    # a frame's windows are rounded up to a bucket, so few sizes are left
    for num_windows in sorted({bucket(number) for number in range(1, windows + 1)}):
        shape = (frames_per_call(num_windows), num_windows, window_patches)
        patches = np.zeros((*shape, c.vision_config.patch_dim), np.float32)
        place = np.zeros(shape, np.int32)
        media.append(VisionFrames(patches, place, place, place == 0))
    return media


def _warm_up_stages(engines: Engines, config: SchedulerConfig, capacity: int) -> None:
    """A live request and one that is not pass both stages, with caches of this capacity.

    Each decode loop is called twice: its state comes from ``insert`` at first, and from itself then.
    """
    timings = Timings()
    utilization = Utilization()
    for live in (True, False):
        thinker = ThinkerStage(engines, config.thinker_slots, timings, utilization)
        talker = TalkerStage(engines, config.talker_slots, thinker, timings, utilization)
        # two narrow chunks, then a wide one
        for length in (2 * NARROW_CHUNK, _WIDE_PROMPT):
            # a configuration with a single slot has no room for a second prompt
            if not thinker.num_free or not (talker.num_free or engines.talker is None):
                thinker = ThinkerStage(engines, config.thinker_slots, timings, utilization)
                talker = TalkerStage(engines, config.talker_slots, thinker, timings, utilization)
            state = _make_state(engines, length, live=live)
            prefix = Prefix(engines, capacity, timings, with_talker=state.is_live)
            prefix.add(state.request.pieces)
            prefix.run()
            thinker.admit(state, prefix)
            if prefix.talker is not None:
                talker.admit_live(state, prefix.talker)
            # the Thinker's tokens are there after the first call, so a live Talker begins in the second
            # the third begins where a call of the same loop ended
            for _ in range(3):
                decode_together([thinker, talker], engines.clock)
            if state.speaks and not live:
                # else the slots would be as small as this short prompt needs
                if not talker.states:
                    talker.reserve(capacity)
                talker.enqueue(state)
                talker.admit_waiting(num_kept=0)
            # and the same for a reply whose text is complete
            for _ in range(2):
                decode_together([thinker, talker], engines.clock)


def _warm_up_resizing(engines: Engines, config: SchedulerConfig, capacity: int) -> None:
    """Caches of this capacity are doubled."""
    thinker = engines.thinker
    talker = engines.talker
    thinker.resize_prefix(thinker.init_prefix(engines.round_slots(1), capacity), 2 * capacity)
    thinker.resize(thinker.init_state(engines.round_slots(config.thinker_slots), capacity), 2 * capacity)
    if talker is not None:
        talker.resize_prefix(talker.init_prefix(engines.round_slots(1), capacity), 2 * capacity)
        talker.resize(talker.init_state(engines.round_slots(config.talker_slots), capacity), 2 * capacity)


def _make_piece(engines: Engines, length: int) -> PromptPiece:
    c = engines.config.thinker_config
    prompt = lay_out([0] * length, [], c)
    return PromptPiece(prompt, mrope.resolve_spans(prompt.segments, c))


class _NoText:
    """In place of a tokenizer's stream."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _make_state(engines: Engines, length: int, *, live: bool) -> RequestState:
    """A request with a prompt of so many tokens, and a reply of as many as three calls make."""
    c = engines.config
    sizes = engines.chunk_sizes
    speech = None
    if engines.talker is not None:
        dit = c.token2wav_config.dit_config
        # of no checkpoint: Token2Wav is not called here, so only the token is used
        voice = Voice("none", 0, np.zeros((1, dit.enc_emb_dim)), np.zeros((1, 1, dit.mel_dim)))
        speech = SpeechParams(voice, TalkerParams(SamplingParams(), 4 * sizes.codes), 0)
    piece = _make_piece(engines, length)
    text = TextRequest(piece.prompt.tokens, SamplingParams(), sizes.first_tokens + 2 * sizes.tokens, ())
    request = Request(
        pieces=[piece],
        text=text,
        stop=(),
        speech=speech,
        live=live,
        reply_span=mrope.Span(0, length),
        usage=Usage(),
    )
    return RequestState(request, Detokenizer(_NoText(), ()))
