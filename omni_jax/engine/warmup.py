"""All programs that a scheduler runs, compiled before the first request; and a counter that shows it.

Programs differ by shapes alone, and all shapes are rounded up to a few: two widths of chunks, caches of powers of two,
pictures of so many windows. So it suffices to run these once, through the stages that requests go through. The runs are
independent jobs, and their programs are compiled side by side.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
from jax import monitoring

from omni_jax import mrope
from omni_jax.batch import AudioBlocks, VisionFrames, bucket_windows
from omni_jax.checkpoint.voices import Voice
from omni_jax.engine.decode_state import round_capacity
from omni_jax.engine.detokenizer import Detokenizer
from omni_jax.engine.outputs import Timings, Utilization
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.prefill_stage import prefills_slots
from omni_jax.engine.request import Request, RequestState, SchedulerConfig, SpeechParams, TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.slot_prefill import SlotPrefill
from omni_jax.engine.stage import decode_together
from omni_jax.engine.talker_engine import SpeechClip
from omni_jax.engine.talker_stage import TalkerStage
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.engine.thinker_stage import ThinkerStage
from omni_jax.engine.token2wav_lists import list_lengths
from omni_jax.processing.layout import Usage, lay_out
from omni_jax.processing.prefill_plan import (
    AUDIO_BLOCKS,
    BLOCK_WIDTH,
    CALL_BLOCKS,
    NARROW_CHUNK,
    NO_FEATURE,
    WIDE_CHUNK,
    PrefillChunk,
    PromptPiece,
    frames_per_call,
)

Progress = Callable[[int, int], None]  # jobs done, jobs in all

_WIDE_PROMPT = 2 * NARROW_CHUNK + 1  # the shortest that is cut into a wide chunk
_MAX_THREADS = 16


class Compilations:
    """Counts the programs that are compiled, or fetched from a cache on disk, while it is open.

    Attributes:
      count: so far.
      seconds: that they took.
    """

    count: int = 0
    seconds: float = 0.0

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Compilations:
        monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        # jax reports this for each program, also for one that it finds in its cache on disk
        # of any thread
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self.count += 1
                self.seconds += duration_secs


@dataclass(frozen=True)
class WarmUpJob:
    """Runs some programs that requests will run.

    Attributes:
      run: what runs them; it may run in any thread.
      is_large: whether it holds the largest caches: no two such jobs run at once.
    """

    run: Callable[[], None]
    is_large: bool = False


def run_jobs(jobs: Sequence[WarmUpJob], *, num_threads: int | None = None, progress: Progress) -> None:
    """Runs jobs side by side, since a compiler keeps few cores busy.

    Args:
      jobs: in any order.
      num_threads: at most; as many as there are cores, up to 16, if None. 1 where programs are spread over several
        devices: all devices have to run them in one order.
      progress: called at the beginning and after each job.
    """
    num_threads = num_threads or min(os.cpu_count() or 1, _MAX_THREADS)
    large = [job for job in jobs if job.is_large]
    small = [job for job in jobs if not job.is_large]
    num_done = 0
    progress(num_done, len(jobs))

    def run_large() -> None:
        for job in large:
            job.run()

    with ThreadPoolExecutor(num_threads) as pool:
        # the large ones first, for they take longest
        futures = {pool.submit(run_large): len(large)}
        for job in small:
            futures[pool.submit(job.run)] = 1
        try:
            for future in as_completed(futures):
                future.result()
                num_done += futures[future]
                progress(num_done, len(jobs))
        except BaseException:
            # what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def decoder_jobs(engines: Engines, config: SchedulerConfig, *, tokens: int, clips: bool = False) -> list[WarmUpJob]:
    """Every program of Thinker and Talker that a scheduler runs.

    Args:
      engines: of a model.
      config: of the scheduler.
      tokens: of a prompt and its reply, or of a prompt and the codes of its speech, at most.
      clips: whether speech may go on from clips.
    """
    jobs = []
    largest = round_capacity(tokens)
    capacity = round_capacity(1)
    # every capacity that a cache can have, and the step from each to the next
    while capacity <= largest:
        run = functools.partial(_warm_up_stages, engines, config, capacity)
        jobs.append(WarmUpJob(run, is_large=capacity == largest))
        if clips:
            run = functools.partial(_warm_up_clips, engines, config, capacity)
            jobs.append(WarmUpJob(run, is_large=capacity == largest))
        if capacity < largest:
            resize = functools.partial(_warm_up_resizing, engines, config, capacity)
            jobs.append(WarmUpJob(resize, is_large=2 * capacity == largest))
        capacity *= 2
    return jobs


def sound_jobs(
    engines: Engines,
    voices: Sequence[Voice],
    configs: Sequence[SchedulerConfig],
    *,
    tokens: int,
    streams: bool,
    clip_frames: int = 0,
) -> list[WarmUpJob]:
    """Every program of Token2Wav that schedulers run.

    Args:
      engines: of a model; there are none where it does not speak.
      voices: that it has.
      configs: of the schedulers.
      tokens: codes of a reply at most.
      streams: whether there are live requests.
      clip_frames: of the clips at most that requests bring along as their voice; 0 for none.
    """
    engine = engines.token2wav
    if engine is None or not voices:
        return []
    jobs = [WarmUpJob(functools.partial(engine.encode_voices, voices)), WarmUpJob(engine.warm_up_vocoder)]
    if clip_frames:
        jobs.append(WarmUpJob(functools.partial(engine.warm_up_clips, clip_frames)))
    lengths = set()
    for config in configs:
        lengths |= set(list_lengths(engine.count_blocks(tokens), config.block_sizes))
    for num_blocks in sorted(lengths):
        jobs.append(WarmUpJob(functools.partial(engine.warm_up_list, num_blocks)))
    if streams:
        sizes = engines.chunk_sizes
        chunks = (sizes.first_chunk_codes, sizes.chunk_codes, sizes.first_look_ahead)
        jobs.append(WarmUpJob(functools.partial(engine.warm_up_streams, voices[0], *chunks)))
    return jobs


def encoder_jobs(engines: Engines, *, windows: int) -> list[WarmUpJob]:
    """The encoders, and how their features get into either width of chunk.

    Args:
      engines: of a model.
      windows: of a picture at most, each 112 x 112 pixels; 0 for none.
    """
    return [
        WarmUpJob(functools.partial(_warm_up_encoder, engines, media))
        for media in _media_of_all_shapes(engines, windows)
    ]


def _warm_up_encoder(engines: Engines, media: AudioBlocks | VisionFrames) -> None:
    features = engines.thinker.encode(media)
    num_slots = engines.round_slots(1)
    shapes = [(num_slots, NARROW_CHUNK), (num_slots, WIDE_CHUNK)]
    shapes += [(num_blocks, BLOCK_WIDTH) for num_blocks in CALL_BLOCKS]
    # the features of either encoder may come to stand in a chunk of any shape
    for shape in shapes:
        ids = np.zeros(shape, np.int32)
        spans = mrope.stack_spans([[]] * shape[0], shape[1], width=shape[1])
        # which positions take a feature is a value and not a shape, so none need to
        nowhere = np.full(shape, NO_FEATURE, np.int32)
        engines.thinker.embed_chunk(PrefillChunk(ids, ids > 0, spans, ids > 0, {0: nowhere}), [features])


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
    for num_windows in sorted({bucket_windows(number) for number in range(1, windows + 1)}):
        shape = (frames_per_call(num_windows), num_windows, window_patches)
        patches = np.zeros((*shape, c.vision_config.patch_dim), np.float32)
        place = np.zeros(shape, np.int32)
        media.append(VisionFrames(patches, place, place, place == 0))
    return media


def _warm_up_stages(engines: Engines, config: SchedulerConfig, capacity: int) -> None:
    """Live requests and others pass both stages, with caches of this capacity."""
    _warm_up_prefixes(engines, config, capacity, live=True)
    thinker, _ = _make_stages(engines, config)
    fills_slots = prefills_slots(engines, thinker)
    if fills_slots:
        _warm_up_slots(engines, config, capacity)
    # where prefixes are kept, a request that goes on from one has it as its own
    if config.prefix_bytes or not fills_slots:
        _warm_up_prefixes(engines, config, capacity, live=False)
    if config.prefix_bytes:
        _warm_up_forks(engines, capacity)


def _warm_up_prefixes(engines: Engines, config: SchedulerConfig, capacity: int, *, live: bool) -> None:
    """Requests whose prompts go through prefixes of their own."""
    thinker, talker = _make_stages(engines, config)
    # two narrow chunks, then a wide one
    for length in (2 * NARROW_CHUNK, _WIDE_PROMPT):
        # a configuration with a single slot has no room for a second prompt
        if not thinker.num_free or not (talker.num_free or engines.talker is None):
            thinker, talker = _make_stages(engines, config)
        state = _make_state(engines, length, live=live)
        prefix = Prefix(engines, capacity, Timings(), with_talker=state.is_live)
        prefix.add(state.request.pieces)
        prefix.run()
        thinker.admit(state, prefix)
        if prefix.talker is not None:
            talker.admit_live(state, prefix.talker)
        _warm_up_decoding(engines, thinker, talker, [state], capacity)


def _warm_up_forks(engines: Engines, capacity: int) -> None:
    """Prefixes of this capacity are copied."""
    speaks = engines.talker is not None
    prefix = Prefix(engines, capacity, Timings(), with_talker=speaks)
    for with_talker in {False, speaks}:
        prefix.fork(with_talker=with_talker, timings=Timings())


def _warm_up_clips(engines: Engines, config: SchedulerConfig, capacity: int) -> None:
    """A request whose speech goes on from a clip, with caches of this capacity."""
    thinker, talker = _make_stages(engines, config)
    piece = _make_piece(engines, 2 * NARROW_CHUNK)
    prefix = Prefix(engines, capacity, Timings(), with_talker=True)
    prefix.add([piece])
    prefix.run()
    assert engines.talker is not None and prefix.thinker.talker_inputs is not None and prefix.talker is not None
    rows = engines.talker.take_clip_rows(prefix.thinker.talker_inputs, 0)
    # one code and one row, so that it begins as soon as others
    clip = SpeechClip(rows, 1, np.zeros(1, np.int32))
    state = _make_state(engines, 2 * NARROW_CHUNK, live=True, clip=clip)
    thinker.admit(state, prefix)
    talker.admit_live(state, prefix.talker)
    _warm_up_decoding(engines, thinker, talker, [state], capacity)


def _warm_up_slots(engines: Engines, config: SchedulerConfig, capacity: int) -> None:
    """Requests of a batch, whose prompts are read right into slots."""
    thinker, talker = _make_stages(engines, config)
    thinker.reserve(capacity)
    prompts = SlotPrefill(engines, thinker, Timings())
    # many blocks; then a prompt that begins like the first one, so that it is copied, and a block behind it
    states = [_make_state(engines, length, live=False) for length in (2 * NARROW_CHUNK, _WIDE_PROMPT)]
    for state in states:
        prompts.start(state)
    while prompts.states:
        prompts.step()
        for state, chunks in prompts.take_complete():
            thinker.begin(state, chunks)
    _warm_up_decoding(engines, thinker, talker, states, capacity)


def _make_stages(engines: Engines, config: SchedulerConfig) -> tuple[ThinkerStage, TalkerStage]:
    timings = Timings()
    utilization = Utilization()
    thinker = ThinkerStage(engines, config.thinker_slots, timings, utilization)
    return thinker, TalkerStage(engines, config.talker_slots, thinker, timings, utilization)


def _warm_up_decoding(
    engines: Engines, thinker: ThinkerStage, talker: TalkerStage, states: Sequence[RequestState], capacity: int
) -> None:
    """Text and speech of requests that the Thinker has admitted.

    Each decode loop is called twice: its state comes from elsewhere at first, and from itself then.
    """
    # the Thinker's tokens are there after the first call, so a live Talker begins in the second
    # the third begins where a call of the same loop ended
    for _ in range(3):
        decode_together([thinker, talker], engines.clock)
    for state in states:
        if state.speaks and not state.is_live:
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


def _make_state(engines: Engines, length: int, *, live: bool, clip: SpeechClip | None = None) -> RequestState:
    """A request with a prompt of so many tokens, and a reply of as many as three calls make."""
    c = engines.config
    sizes = engines.chunk_sizes
    speech = None
    if engines.talker is not None:
        dit = c.token2wav_config.dit_config
        # of no checkpoint: Token2Wav is not called here, so only the token is used
        voice = Voice("none", 0, np.zeros((1, dit.enc_emb_dim)), np.zeros((1, 1, dit.mel_dim)))
        speech = SpeechParams(voice, TalkerParams(SamplingParams(), 4 * sizes.codes), 0, clip)
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
