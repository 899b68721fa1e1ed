"""omni_jax as a side, in float32 as its checkpoint is.

Letters: B requests, S tokens, K codes, F mel frames, M mel bins, N patches, P values of a patch, E width of the
Thinker.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

import omni_jax
from benchmarks.budget import AUDIBLE, PromptPlan, StreamPlan
from benchmarks.side import (
    CONVERTED,
    PUBLISHED,
    VOICE,
    CompileCount,
    Part,
    PromptInputs,
    ReplyRequest,
    Side,
    StreamedReply,
    Throughput,
    VoiceArrays,
)
from benchmarks.trace import Trace, trace_model
from omni_jax import mrope
from omni_jax.batch import AudioBlocks
from omni_jax.checkpoint import store
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Prepare
from omni_jax.data.packing import Budget, assemble
from omni_jax.data.packing import Part as BatchPart
from omni_jax.data.sources import Row
from omni_jax.engine.outputs import Event, Timings
from omni_jax.engine.prefill import Prefix
from omni_jax.engine.request import BLOCK_SIZES, ChunkSizes, RequestState, SchedulerConfig, TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.talker_engine import SpeechRequest, TalkerEngine, TextProgress
from omni_jax.engine.talker_programs import NO_SLOT, TextCounters
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN
from omni_jax.models.dit_streaming import CarriedDiT
from omni_jax.models.talker import Talker
from omni_jax.models.token2wav import Token2Wav, parts
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput, lay_out
from omni_jax.processing.prefill_plan import PromptPiece, plan_prefill
from omni_jax.processing.processor import Processor

BUDGET = Budget.of(DataConfig(tokens=16_384, windows=128))  # holds one of each file; the picture has 108 windows
# of a spoken reply, and the parts whose calls each adds up
STAGES = {
    "Thinker": (Part.ENCODERS, Part.PREFILL, Part.TEXT),
    "Talker": (Part.TALKER_PREFILL, Part.BEGIN, Part.CODES),
    "DiT": (Part.DIT,),
    "vocoder": (Part.VOCODER,),
}
# of a row, by the kind of file: the tag in the text, and the key of the media
MEDIA_FIELDS = {".wav": ("<audio>", "audios"), ".jpg": ("<image>", "images"), ".mp4": ("<video>", "videos")}


class OmniJaxSide(Side):
    """omni_jax at work on a converted folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._compiler = CompilerClock()

    @functools.cached_property
    def _config(self) -> OmniConfig:
        return OmniConfig.load(self.folder / CONVERTED)

    @functools.cached_property
    def _thinker_model(self) -> OmniModel:
        return omni_jax.load(self.folder / CONVERTED, components=("thinker",))

    @functools.cached_property
    def _model(self) -> OmniModel:
        return omni_jax.load(self.folder / CONVERTED)

    @functools.cached_property
    def _traced_model(self) -> tuple[OmniModel, Trace]:
        return trace_model(self._model)

    def _load_params(self, component: str) -> Any:
        """Of one component alone, so that the memory of this process is that component's."""
        params = store.load(self.folder / CONVERTED, (component,))
        return unstack_layers(params)[component]

    @functools.cached_property
    def _talker_engine(self) -> TalkerEngine:
        """Text ids have no embedding but zeros, so that the Thinker's parameters need not be there."""
        width = self._config.talker_config.embedding_size

        def embed_tokens(ids: np.ndarray) -> jax.Array:
            return jnp.zeros((*np.shape(ids), width))

        model = Talker(self._config.talker_config, scan_layers=False)
        return TalkerEngine(model, self._load_params("talker"), self._config, embed_tokens)

    @functools.cached_property
    def _token2wav_engine(self) -> Token2WavEngine:
        model = Token2Wav(self._config.token2wav_config, scan_layers=False)
        return Token2WavEngine(model, self._load_params("token2wav"))

    def encode_audio(self, mel: Float[np.ndarray, "F M"]) -> float:
        token = self._config.thinker_config.audio_token_index
        return self._encode(AudioInput(mel), token)

    def encode_image(self, patches: Float[np.ndarray, "N P"], grid: tuple[int, int, int]) -> float:
        token = self._config.thinker_config.image_token_index
        return self._encode(VisionInput(patches, grid), token)

    def _encode(self, item: AudioInput | VisionInput, token: int) -> float:
        engine = self._thinker_model.engines.thinker
        piece = make_piece([token], [item], self._config)
        # on the device already, so that no copy is timed
        inputs = jax.device_put(plan_prefill([piece], self._config).encoder_inputs)
        return self._compiler.time(lambda: [engine.encode(media) for media in inputs])

    def prefill(self, tokens: Int[np.ndarray, " S"]) -> float:
        return self._compiler.time(lambda: self._prefill_text(tokens, len(tokens)).thinker)

    def _prefill_text(self, tokens: Int[np.ndarray, " S"], capacity: int) -> Prefix:
        # through the class that serves requests, so that the time is that of a request
        prefix = Prefix(self._thinker_model.engines, capacity, Timings(), with_talker=False)
        prefix.add([make_piece(tokens.tolist(), [], self._config)])
        prefix.run()
        return prefix

    def decode_text(self, tokens: Int[np.ndarray, " S"], batch: int, num_tokens: int) -> float:
        engine = self._thinker_model.engines.thinker
        # a copy, for the prefilled state serves all rounds
        state = jax.tree.map(jnp.copy, self._prefilled_text(tuple(tokens.tolist()), batch, num_tokens))
        jax.block_until_ready(state)  # a call uses its state up

        def decode() -> Any:
            decoded = state
            for _ in range(0, num_tokens, engine.tokens_per_call):
                decoded, _ = engine.decode(decoded)
            return decoded

        return self._compiler.time(decode) / num_tokens

    @functools.cache  # noqa: B019, a side lives as long as its process
    def _prefilled_text(self, tokens: tuple[int, ...], batch: int, num_tokens: int) -> Any:
        """The Thinker's state with the same prompt in every slot."""
        engine = self._thinker_model.engines.thinker
        ids = np.array(tokens, np.int32)
        capacity = len(ids) + num_tokens
        prefix = self._prefill_text(ids, capacity)
        state = engine.init_state(batch, capacity)
        # no end tokens, so that every slot decodes to the limit
        request = TextRequest(ids, SamplingParams(), num_tokens, ())
        for slot in range(batch):
            state = engine.insert(state, slot, prefix.thinker, request)
        return state

    def decode_codes(self, batch: int, prompt_length: int, num_codes: int) -> float:
        """With the published sampling. A slot's chance of an early end is small, but not none: longest counts."""
        engine = self._talker_engine
        state = jax.tree.map(jnp.copy, self._prefilled_codes(batch, prompt_length, num_codes))
        jax.block_until_ready(state)
        # the text of every slot is complete, with as many rows as there are codes to decode
        no_slot = np.full(batch, NO_SLOT, np.int32)  # [B]
        progress = TextProgress(no_slot, np.full(batch, num_codes, np.int32), np.ones(batch, bool))
        none = jnp.zeros(batch, jnp.int32)  # no slot follows the Thinker: the text is complete
        calls: list[Any] = []

        def decode() -> Any:
            decoded = state
            for _ in range(0, num_codes, engine.codes_per_call):
                decoded, result = engine.decode(decoded, progress, TextCounters(none, none))
                calls.append(result)
            return decoded

        seconds = self._compiler.time(decode)
        codes = [result.to_host() for result in calls]
        # a call runs as many steps as the slot that goes on longest
        steps = 0
        for slot in range(batch):
            num_decoded = sum(len(call.at_slot(slot)) for call in codes)
            steps = max(steps, num_decoded)
        return seconds / steps

    @functools.cache  # noqa: B019
    def _prefilled_codes(self, batch: int, prompt_length: int, num_codes: int) -> Any:
        """The Talker's state with the same prompt in every slot, all text known, and as many codes to decode."""
        engine = self._talker_engine
        capacity = prompt_length + num_codes + 2
        rng = np.random.default_rng(4)
        width = self._config.talker_config.embedding_size
        talker_inputs = jnp.asarray(rng.standard_normal((1, capacity, width), np.float32))  # [1, capacity, E]
        piece = make_piece(rng.integers(0, 500, prompt_length).tolist(), [], self._config)
        # one prompt serves all slots: the time of a step does not depend on what they hold
        prefix = engine.init_prefix(1, capacity)
        start = 0  # of the chunk, among the rows of ``talker_inputs``
        for chunk in plan_prefill([piece], self._config).chunks:
            prefix = engine.prefill(prefix, talker_inputs, chunk, start)
            start += chunk.num_tokens
        state = engine.init_state(batch, capacity)
        span = mrope.Span(0, prompt_length)
        request = SpeechRequest(prompt_length, 0, TalkerParams().sampling, num_codes, span)
        for slot in range(batch):
            state = engine.insert(state, slot, prefix)
        # the reply's rows come from the one slot of a Thinker that is not there: any rows will do
        thinker_slot = np.zeros(batch, np.int32)  # [B]
        lengths = np.full(batch, prompt_length, np.int32)  # [B]
        for _ in range(0, num_codes, engine.append_width):
            state = engine.append_reply(state, talker_inputs, np.array([num_codes]), thinker_slot, lengths)
        return engine.begin(state, dict.fromkeys(range(batch), request))

    def solve_mel(self, codes: Int[np.ndarray, "B K"], voice: VoiceArrays) -> float:
        engine = self._token2wav_engine
        voices = [Voice("random", 0, voice.cond, voice.mel)] * len(codes)
        seeds = list(range(len(codes)))
        return self._compiler.time(lambda: engine.make_mels(list(codes), voices, [None] * len(codes), seeds))

    def vocode(self, mel: Float[np.ndarray, "B F M"]) -> float:
        engine = self._token2wav_engine
        return self._compiler.time(lambda: engine.vocode(list(mel)))

    def load(self) -> float:
        started = time.perf_counter()
        self._model  # noqa: B018, loads it
        return time.perf_counter() - started

    def warm_up(self, requests: Sequence[ReplyRequest], num_slots: int | None = None) -> CompileCount:
        # positions of the longest: of its prompt and text in the Thinker, of its prompt and codes in the Talker
        lengths = []
        for request in requests:
            lengths.append(len(self._make_prompt(request)) + max(request.num_tokens, request.num_codes))
        config = None if num_slots is None else SchedulerConfig(num_slots, num_slots, BLOCK_SIZES)
        compiled = self._model.warmup(
            tokens=max(lengths) + 2, windows=0, batch_size=1, scheduler=config, live=config is None
        )
        return CompileCount(compiled.count, compiled.seconds)

    def stream_reply(self, request: ReplyRequest, *, first_packet_only: bool = False) -> StreamedReply:
        model, trace = self._traced_model
        trace.calls.clear()
        first_text: float | None = None
        first_compiled = CompileCount()
        arrivals: list[float] = []
        packets: list[np.ndarray] = []
        events: list[Event] = []
        with Compilations() as compilations:
            # making the stream reads the input; the model begins with the first event that is asked for
            started = time.perf_counter()
            stream = trace.run(Part.INPUT, lambda: model.stream(make_messages(request), **_options(request)), _one)
            for event in stream:
                now = time.perf_counter() - started
                events.append(event)
                if event.text and first_text is None:
                    first_text = now
                if event.audio is not None and len(event.audio):
                    if not packets:
                        first_compiled = CompileCount(compilations.count, compilations.seconds)
                    arrivals.append(now)
                    packets.append(event.audio)
                    if first_packet_only:
                        break
            stream.close()
        # there is none where the stream was closed behind its first packet
        reply = events[-1].reply
        if reply is not None:
            request.check_reply(len(reply.token_ids), len(reply.codec_ids))
        return StreamedReply(
            first_text,
            tuple(arrivals),
            tuple(len(packet) for packet in packets),
            tuple(_find_audible(packet) for packet in packets),
            trace.calls_since(started),
            CompileCount(compilations.count, compilations.seconds),
            first_compiled,
        )

    def answer_all(self, requests: Sequence[ReplyRequest], num_slots: int, *, spoken: bool) -> Throughput:
        """After a warm-up, which does not count."""
        self.warm_up(requests, num_slots)
        # the sizes are of Token2Wav's lists, which text alone does not need
        config = SchedulerConfig(num_slots, num_slots, BLOCK_SIZES if spoken else ())
        with Compilations() as compilations:
            started = time.perf_counter()
            scheduler = self._run_requests(self._model, requests, config, spoken=spoken)
            seconds = time.perf_counter() - started
        use = scheduler.utilization
        used = {"prompts": use.prefill, "text": use.text, "speech": use.speech, "sound": use.vocoder}
        padding = {}
        for stage, slots in used.items():
            if slots.computed:
                padding[stage] = 1 - slots.used / slots.computed
        timings = scheduler.timings
        stages = {
            "prompts": timings.prefill,
            "text": timings.decode,
            "speech": timings.talker,
            "sound": timings.token2wav,
        }
        return Throughput(seconds, compilations.count, padding, stages)

    def _run_requests(
        self, model: OmniModel, requests: Sequence[ReplyRequest], config: SchedulerConfig, *, spoken: bool
    ) -> Any:
        """Answers them through one scheduler, which is returned."""
        scheduler = model.scheduler(config)
        submitted: dict[RequestState, ReplyRequest] = {}
        for request in requests:
            options = Options.create(**_options(request) if spoken else {"max_tokens": request.num_tokens})
            submitted[model.submit(scheduler, self._make_prompt(request), options)] = request
        # an error of one request would only be in its reply; a figure must not leave that request out
        for state, event in scheduler.run():
            if event.reply is not None:
                if state.error is not None:
                    raise state.error
                reply = event.reply
                submitted[state].check_reply(len(reply.token_ids), len(reply.codec_ids), spoken=spoken)
        return scheduler

    def prepare_files(self, files: Sequence[Path], packed: bool) -> float:
        """From rows to examples, and with ``packed`` to one batch that holds all of them.

        Raises:
          RuntimeError: if the budgets do not hold them.
        """
        prepare = self._prepare
        rows = [_make_row(i + 1, file) for i, file in enumerate(files)]
        part = BatchPart(BUDGET)
        # decoding, features and tokens; then the arrays of a batch
        started = time.perf_counter()
        # none of them is split
        examples = [prepare.examples(row)[0] for row in rows]
        if packed:
            for row, example in zip(rows, examples, strict=True):
                if not part.place(example):
                    raise RuntimeError(f"{row.contents} does not fit into the batch")
            assemble([part], BUDGET, prepare.processor.config, first=0, streams=1)
        return time.perf_counter() - started

    @functools.cached_property
    def _prepare(self) -> Prepare:
        """The published settings of sound and pictures."""
        # the media are files of the benchmark, wherever it has put them
        return Prepare(Processor.load(self.folder / PUBLISHED), BUDGET.tokens, BUDGET.check, media_root="/")

    # what only this side can do

    def make_inputs(self, requests: Sequence[ReplyRequest]) -> list[ReplyRequest]:
        """The requests with the inputs that the PyTorch side is given."""
        prepared = []
        for request in requests:
            prompt = self._make_prompt(request)
            mels = [media.mel for media in prompt.media if isinstance(media, AudioInput)]
            inputs = PromptInputs(prompt.tokens.astype(np.int64), mels[0] if mels else None)
            prepared.append(dataclasses.replace(request, inputs=inputs))
        return prepared

    def plan_prompt(self, request: ReplyRequest) -> PromptPlan:
        """What its prompt costs."""
        prompt = self._make_prompt(request)
        spans = mrope.resolve_spans(prompt.segments, self._config.thinker_config)
        plan = plan_prefill([PromptPiece(prompt, spans)], self._config)
        # padding included, for it takes as long
        audio_blocks = 0
        for media in plan.encoder_inputs:
            if isinstance(media, AudioBlocks):
                audio_blocks += len(media.length)
        positions = sum(chunk.tokens.shape[1] for chunk in plan.chunks)
        return PromptPlan(len(prompt), audio_blocks, positions)

    def plan_stream(self) -> StreamPlan:
        """What the parts of the model declare."""
        return make_stream_plan(self._config, self._model.engines.chunk_sizes)

    def time_stages(self, requests: Sequence[ReplyRequest]) -> dict[str, float]:
        """Seconds of each of ``STAGES`` for spoken replies that are worked on together, the compiler's left out."""
        model, trace = self._traced_model
        num_slots = len(requests)
        config = SchedulerConfig(num_slots, num_slots)
        # once for the compiler alone: a trace has no other way to leave its time out
        self._run_requests(model, requests, config, spoken=True)
        trace.calls.clear()
        self._run_requests(model, requests, config, spoken=True)
        seconds = {}
        for stage, parts_of_stage in STAGES.items():
            seconds[stage] = sum(call.seconds for call in trace.calls if call.part in parts_of_stage)
        return seconds

    def _make_prompt(self, request: ReplyRequest) -> Prompt:
        return self._model.processor(make_messages(request))


class CompilerClock:
    """Times calls without what the compiler takes: tracing, lowering and compiling, the one within the other."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        # JAX tells of an event when it has ended
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    def time(self, work: Callable[[], Any]) -> float:
        """Seconds until the result of ``work`` is there."""
        self._spans.clear()
        started = time.perf_counter()
        jax.block_until_ready(work())
        seconds = time.perf_counter() - started
        counted = started
        # spans lie in each other: only what no earlier one has covered is taken off
        for first, last in sorted(self._spans):
            seconds -= max(last - max(first, counted), 0.0)
            counted = max(counted, last)
        return seconds


def make_stream_plan(config: OmniConfig, chunk_sizes: ChunkSizes) -> StreamPlan:
    """What Token2Wav's networks declare, beside the sizes of chunks."""
    dit_model, _ = parts(Token2Wav(config.token2wav_config))
    dit = CarriedDiT(dit_model).streaming
    vocoder = StreamedBigVGAN(config.token2wav_config.bigvgan_config).streaming
    assert vocoder.look_back is not None
    return StreamPlan(
        **dataclasses.asdict(chunk_sizes),
        block_codes=dit.block,
        code_frames=dit.outputs,
        dit_look_ahead=dit.look_ahead,
        vocoder_look_ahead=vocoder.look_ahead,
        vocoder_look_back=vocoder.look_back,
    )


def make_piece(ids: Sequence[int], items: Sequence[Any], config: OmniConfig) -> PromptPiece:
    """A whole prompt of these ids and media."""
    prompt = lay_out(ids, items, config.thinker_config)
    return PromptPiece(prompt, mrope.resolve_spans(prompt.segments, config.thinker_config))


def make_messages(request: ReplyRequest) -> list[dict[str, Any]]:
    """With the system prompt that speech is trained with."""
    content: list[dict[str, Any]] = [{"type": "text", "text": request.question}]
    if request.sound is not None:
        content.insert(0, {"type": "audio", "audio": str(request.sound)})
    system = {"role": "system", "content": omni_jax.SPEECH_SYSTEM_PROMPT}
    return [system, {"role": "user", "content": content}]


def _options(request: ReplyRequest) -> dict[str, Any]:
    return {
        "max_tokens": request.num_tokens,
        "modalities": ("text", "audio"),
        "voice": VOICE,
        "talker": {"max_tokens": request.num_codes},
    }


def _make_row(number: int, file: Path) -> Row:
    tag, field = MEDIA_FIELDS[file.suffix]
    question = {"role": "user", "content": f"{tag}What is it?"}
    answer = {"role": "assistant", "content": "It is noise."}
    return Row("rows.jsonl", number, {"messages": [question, answer], field: [str(file)]})


def _find_audible(packet: Float[np.ndarray, " samples"]) -> int | None:
    audible = np.flatnonzero(np.abs(packet) >= AUDIBLE)
    return int(audible[0]) if len(audible) else None


def _one(_: object) -> int:
    return 1
