"""OmniModel, the public face: messages in, text and speech out; one by one, as a stream, or many together."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from omni_jax import mrope
from omni_jax.batch import bucket
from omni_jax.checkpoint.voices import Voice
from omni_jax.checks import check_float, check_int, shown
from omni_jax.config import OmniConfig
from omni_jax.engine.detokenizer import Detokenizer
from omni_jax.engine.outputs import Event, Reply
from omni_jax.engine.prefill import Engines, Prefix, Stopwatch
from omni_jax.engine.prompt_key import PromptKey
from omni_jax.engine.request import (
    BLOCK_SIZES,
    INITIAL_REPLY,
    Request,
    RequestState,
    SchedulerConfig,
    SpeechParams,
    TalkerParams,
)
from omni_jax.engine.sampling import merge_seed
from omni_jax.engine.scheduler import Scheduler
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.engine.warmup import Compilations, Progress, decoder_jobs, encoder_jobs, run_jobs, sound_jobs
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice, SpeakerTable, SpeechTokenizer, read_voice_clip
from omni_jax.generation.live_session import LiveSession
from omni_jax.generation.options import Messages, Options, warn_untrained
from omni_jax.generation.progress_bar import show_progress
from omni_jax.processing.layout import Prompt
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.prefill_plan import PromptPiece
from omni_jax.processing.processor import Processor
from omni_jax.processing.speaker_vectors import SpeakerModel
from omni_jax.processing.speech_mel import FRAME_RATE
from omni_jax.processing.voice_clip import MAX_SECONDS, VoiceClip
from omni_jax.segments import Text

MAX_BATCH_SIZE = 4096

_TALKER_SALT = 0x7A1CE2  # tokens and codes of one request are not drawn with the same random numbers


class OmniModel:
    """A loaded model. It holds parameters, and nothing of any request.

    Attributes:
      config: of all parts.
      processor: from messages to prompts.
      engines: of its components.
      voices: who it can speak as, by name; none without a Talker.
      talker_params: how it speaks where a request does not say; the published ones if None is given.
    """

    def __init__(
        self,
        config: OmniConfig,
        processor: Processor,
        engines: Engines,
        voices: Mapping[str, Voice],
        speaker_model: SpeakerModel | None = None,
        speech_tokenizer: SpeechTokenizer | None = None,
        talker_params: TalkerParams | None = None,
    ):
        self.config = config
        self.processor = processor
        self.engines = engines
        self.voices = voices
        self.talker_params = talker_params or TalkerParams()
        self._speakers = SpeakerTable(engines, processor, speaker_model, speech_tokenizer)

    def generate(self, messages: Messages, **options: Any) -> Reply:
        """Answers one dialogue.

        Args:
          messages: OpenAI or Hugging Face chat messages; docs/usage.md lists the parts.
          **options: see ``Options``.

        Raises:
          InputError: if the messages or options cannot be served; names the part, the value and the limit.
        """
        # the last event carries the whole reply
        *_, last = self._run_alone(messages, Options.create(**options), live=False)
        assert last.reply is not None
        return last.reply

    def stream(self, messages: Messages, **options: Any) -> Generator[Event, None, None]:
        """Answers one dialogue piece by piece: text and sound as they are made.

        The last event carries the whole reply, which the pieces add up to. Nothing is computed before it is asked for;
        closing the iterator ends the reply and frees what it holds.

        Args:
          messages, **options: as in ``generate``, which also says what is raised; at once, not at the first event.
        """
        return self._run_alone(messages, Options.create(**options), live=True)

    def listen(
        self, messages: Messages = (), *, audio: bool = True, video: bool = False, **options: Any
    ) -> LiveSession:
        """Begins a dialogue whose input comes while it goes on.

        Whatever comes is prefilled as soon as it fills two seconds, so that only the rest remains when the speaker
        ends::

            session = model.listen([{"role": "system", "content": SPEECH_SYSTEM_PROMPT}], modalities=("text", "audio"))
            for samples in microphone:
                session.audio(samples, 48_000)
            for event in session.answer():
                ...

        Args:
          messages: that came before, earlier replies among them; maybe none. What comes becomes a message of the
            user's after them.
          audio: whether sound is to come (``LiveSession.audio``).
          video: whether pictures are to come (``LiveSession.video``); with sound too, they are one video.
          **options: see ``Options``; ``LiveSession.answer`` may change all but ``modalities``, ``assume_fps`` and
            ``adapter``.

        Raises:
          InputError: if the messages or options cannot be served.
        """
        chosen = Options.create(**options)
        self.check(chosen)
        warn_untrained(chosen, [messages])
        clip = self._read_clip(chosen)
        prompt = LivePrompt(self.processor, messages, audio=audio, video=video, assume_fps=chosen.assume_fps)
        scheduler = Scheduler(self.engines)
        # room for the beginning of the input; caches grow as more comes
        capacity = len(prompt.head.prompt) + INITIAL_REPLY
        prefix = Prefix(self.engines, capacity, scheduler.timings, with_talker=chosen.speaks, adapter=chosen.adapter)

        def make_request(pieces: Sequence[PromptPiece], whole: Prompt, changes: Mapping[str, Any]) -> RequestState:
            # what has been prefilled depends on them
            fixed = sorted({"modalities", "assume_fps", "adapter"} & set(changes))
            if fixed:
                raise InputError(f"{' and '.join(fixed)} must be given to listen; what came is already read so")
            changed = Options.create(**{**options, **changes})
            self.check(changed)
            changed_clip = self._read_clip(changed) if "voice" in changes else clip
            return self._make_request(pieces, whole, changed, live=True, clip=changed_clip)

        return LiveSession(prompt, scheduler, prefix, make_request)

    def generate_batch(self, conversations: Sequence[Messages], *, batch_size: int = 8, **options: Any) -> list[Reply]:
        """Answers many dialogues, each as ``generate`` would alone.

        A dialogue that cannot be served gets a reply with its ``error``; the others are answered.

        Args:
          conversations: one list of messages each.
          batch_size: how many are worked on at once; as soon as one is answered the next takes its place.
          **options: see ``Options``; they hold for every dialogue.

        Raises:
          InputError: for an option that cannot be served.
        """
        check_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        chosen = Options.create(**options)
        self.check(chosen)
        warn_untrained(chosen, conversations)
        clip = self._read_clip(chosen)
        # as many slots for few dialogues as for many: each number of slots has programs of its own
        scheduler = self.scheduler(_batch_config(batch_size) if len(conversations) > 1 else SchedulerConfig())
        stopwatch = Stopwatch(self.engines.clock)
        replies: dict[int, Reply] = {}
        prompts: dict[int, Prompt] = {}
        # all prompts first: their lengths decide the order in which they are submitted
        for number, messages in enumerate(conversations):
            try:
                prompts[number] = self._make_prompt(messages, chosen)
            except Exception as error:  # whatever its media raise costs this dialogue alone
                replies[number] = Reply.from_error(error)
        scheduler.timings.prepare = stopwatch.lap()
        numbers = {}
        # by length, so that caches grow once
        for number in sorted(prompts, key=lambda number: len(prompts[number])):
            numbers[self.submit(scheduler, prompts[number], chosen, clip=clip)] = number
        for state, event in scheduler.run():
            if event.reply is not None:
                replies[numbers[state]] = event.reply
        return [replies[number] for number in range(len(conversations))]

    def scheduler(self, config: SchedulerConfig) -> Scheduler:
        """A scheduler for many requests that come and go one by one; see ``submit``."""
        return Scheduler(self.engines, config)

    def submit(
        self,
        scheduler: Scheduler,
        prompt: Prompt,
        options: Options,
        *,
        live: bool = False,
        clip: VoiceClip | None = None,
        key: PromptKey | None = None,
    ) -> RequestState:
        """Gives a scheduler of this model a request.

        Args:
          scheduler: of this model.
          prompt: from this model's processor.
          options: how it is to be answered.
          live: whether sound is to come as it is made; otherwise it comes with the reply.
          clip: of the voice, where the options have a ``ClonedVoice``; it is read here if None.
          key: of the prompt, where the scheduler keeps prefixes.

        Raises:
          InputError: for what ``check`` finds wrong, and a clip that cannot be read.
        """
        self.check(options)
        spans = mrope.resolve_spans(prompt.segments, self.config.thinker_config)
        clip = self._read_clip(options) if clip is None else clip
        state = self._make_request([PromptPiece(prompt, spans)], prompt, options, live=live, clip=clip)
        state.request = dataclasses.replace(state.request, key=key)
        scheduler.submit(state)
        return state

    def submit_prefilled(
        self,
        scheduler: Scheduler,
        prefix: Prefix,
        pieces: Sequence[PromptPiece],
        prompt: Prompt,
        options: Options,
        *,
        clip: VoiceClip | None = None,
    ) -> RequestState:
        """Gives a scheduler a request of which a part has been prefilled, as ``listen`` does; it is live.

        Args:
          scheduler: of this model.
          prefix: what has been prefilled, with the Talker where the reply is spoken; it is used up.
          pieces: of the prompt that remain.
          prompt: all of it; its media are not looked at.
          options, clip: as of ``submit``.

        Raises:
          InputError: as ``submit``.
        """
        self.check(options)
        clip = self._read_clip(options) if clip is None else clip
        state = self._make_request(pieces, prompt, options, live=True, clip=clip)
        scheduler.submit(state, prefix)
        return state

    def warmup(
        self,
        *,
        tokens: int = 2048,
        windows: int = 32,
        batch_size: int = 8,
        clip_seconds: float = 0.0,
        scheduler: SchedulerConfig | None = None,
        live: bool = True,
        progress: Progress | None = None,
    ) -> Compilations:
        """Compiles what all ways to ask run, so that no request has to wait for the compiler.

        What is larger than this is compiled when it is met. On one device programs are compiled side by side, in
        threads: settings of jax that hold for one thread alone (``with jax.default_matmul_precision(...)``) do not
        reach them.

        Args:
          tokens: of a prompt and its reply, or of a prompt and the codes of its speech, at most.
          windows: of a picture at most, each 112 x 112 pixels: a picture of 480 x 640 has 30. 0 for none.
          batch_size: of ``generate_batch``; 1 where it is not to be called.
          clip_seconds: of the clips at most that requests bring along as their voice; 0 for none.
          scheduler: of one that is to run instead (``OmniModel.scheduler``).
          live: whether replies are to be streamed.
          progress: called with the number of jobs done and of all; a bar on the terminal if None.

        Returns:
          How many programs there were, and the seconds they took.

        Raises:
          InputError: for a number out of range.
        """
        context = self.config.thinker_config.text_config.max_position_embeddings
        check_int("tokens", tokens, 1, context)
        check_int("windows", windows, 0, 4096)
        check_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        check_float("clip_seconds", clip_seconds, 0, MAX_SECONDS)
        configs = [scheduler or SchedulerConfig()]
        if scheduler is None and batch_size > 1:
            configs.append(_batch_config(batch_size))
        engines = self.engines
        jobs = encoder_jobs(engines, windows=windows)
        for config in configs:
            jobs += decoder_jobs(engines, config, tokens=tokens, clips=clip_seconds > 0 and self._speakers.reads_text)
        voices = list(self.voices.values())
        frames = int(clip_seconds * FRAME_RATE)
        jobs += self._speakers.warmup_jobs() if clip_seconds else []
        jobs += sound_jobs(engines, voices, configs, tokens=tokens, streams=live, clip_frames=frames)
        # a mesh's devices would wait for each other, if two threads gave them programs in different orders
        num_threads = 1 if engines.thinker.is_sharded else None
        with Compilations() as compilations, show_progress(progress) as show:
            run_jobs(jobs, num_threads=num_threads, progress=show)
        return compilations

    def synthesize(
        self,
        codec_ids: Sequence[int] | np.ndarray,
        *,
        voice: str | ClonedVoice | Mapping[str, Any] | None = None,
        noise: Float[np.ndarray, "frames mel"] | None = None,
        seed: int = 0,
    ) -> Float[np.ndarray, " samples"]:
        """Codes to sound.

        Args:
          codec_ids: at least one, 50 a second.
          voice: who speaks, see ``Options``; of a clip only the timbre counts.
          noise: float32 [2 * codes, mel_dim] that the flow starts from; drawn from ``seed`` if None.
          seed: of the draw.

        Returns:
          float32 [480 * codes] from -1 to 1 at 24 kHz.

        Raises:
          InputError: for codes out of range, none or too many, noise of another shape, or an unknown voice.
        """
        self._check_can_speak()
        engine = self.engines.token2wav
        # ``_check_can_speak`` has raised otherwise
        assert engine is not None
        wanted = Options.create(voice=voice).voice
        wanted = wanted.without_text() if isinstance(wanted, ClonedVoice) else wanted
        self._speakers.check(self.voices, wanted)
        speaker = self._speakers.choose(self.voices, wanted, read_voice_clip(wanted, self.processor))
        (samples,) = engine.synthesize([np.asarray(codec_ids)], [speaker.voice], [noise], [seed])
        return samples

    def check(self, options: Options) -> None:
        """Whether the model can answer so, before any work is done.

        Raises:
          InputError: for speech where it cannot speak, an unknown voice or adapter, a wrong option of the Talker's, and
            a stop id that the vocabulary does not have.
        """
        vocab_size = self.config.thinker_config.text_config.vocab_size
        for token in options.stop_token_ids:
            check_int("stop_token_ids", token, 0, vocab_size - 1)
        names = self.engines.thinker.adapters.names
        if options.adapter is not None and options.adapter not in names:
            known = ", ".join(names) or "none"
            raise InputError(f"adapter is {shown(options.adapter)}; there are: {known}")
        if options.speaks:
            self._check_can_speak()
            self.talker_params.override(options.talker, self.config)
            self._speakers.check(self.voices, options.voice)

    def _run_alone(self, messages: Messages, options: Options, *, live: bool) -> Generator[Event, None, None]:
        """Prepares a dialogue now; its answer is made as the iterator is advanced."""
        # this is no generator itself, so errors are raised here and not at the first event
        self.check(options)
        warn_untrained(options, [messages], stacklevel=4)  # of who calls ``generate`` or ``stream``
        scheduler = Scheduler(self.engines)
        stopwatch = Stopwatch(self.engines.clock)
        state = self.submit(scheduler, self._make_prompt(messages, options), options, live=live)
        scheduler.timings.prepare = stopwatch.lap()
        return scheduler.run_alone(state)

    def _read_clip(self, options: Options) -> VoiceClip | None:
        """The clip of the voice, where a reply is to be spoken and the options bring one along."""
        return read_voice_clip(options.voice, self.processor) if options.speaks else None

    def _make_prompt(self, messages: Messages, options: Options) -> Prompt:
        context = self.config.thinker_config.text_config.max_position_embeddings
        # one position is left for the reply
        return self.processor(messages, assume_fps=options.assume_fps, max_length=context - 1)

    def _make_request(
        self,
        pieces: Sequence[PromptPiece],
        prompt: Prompt,
        options: Options,
        *,
        live: bool,
        clip: VoiceClip | None,
    ) -> RequestState:
        """A request.

        Args:
          pieces: of the prompt that have not been prefilled.
          prompt: all of it; the media are not looked at.
          options: how it is to be answered.
          live: whether sound is to come as it is made.
          clip: of the voice, if the options bring one along.
        """
        c = self.config.thinker_config
        # each id once: how many there are is part of the shape of a slot's state
        stop_ids = tuple(dict.fromkeys((*self.processor.stop_ids, *options.stop_token_ids)))
        # the context may end the reply before max_tokens does
        room = c.text_config.max_position_embeddings - len(prompt)
        given = () if options.reply_text is None else self.processor.encode_reply(options.reply_text)
        max_tokens = min(len(given) or options.max_tokens, room)
        # what the context has no room for is left out, as of any reply
        text = TextRequest(prompt.tokens, options.sampling, max_tokens, stop_ids, given[:max_tokens])
        # the two ids behind the prompt are resolved as if text followed it
        reply_span = mrope.resolve_spans((*prompt.segments, Text(2)), c)[-1]
        request = Request(
            pieces=pieces,
            text=text,
            stop=options.stop,
            speech=self._make_speech_params(options, clip) if options.speaks else None,
            live=live,
            # the Talker reads these two in a chunk of their own, which begins with them
            reply_span=dataclasses.replace(reply_span, begin=0),
            usage=prompt.usage,
            adapter=options.adapter,
        )
        return RequestState(request, Detokenizer(self.processor.text_stream(), stop_ids, options.stop))

    def _make_speech_params(self, options: Options, clip: VoiceClip | None) -> SpeechParams:
        params = self.talker_params.override(options.talker, self.config)
        # one seed for all that is drawn, where the others are not given
        text_seed = options.sampling.seed or 0
        sampling = merge_seed(params.sampling, text_seed)
        sampling = dataclasses.replace(sampling, seed=(sampling.seed or 0) ^ _TALKER_SALT)
        # as it is, so that ``synthesize`` with this seed draws the same noise
        noise_seed = text_seed if options.noise_seed is None else options.noise_seed
        speaker = self._speakers.choose(self.voices, options.voice, clip, options.adapter)
        return SpeechParams(speaker.voice, dataclasses.replace(params, sampling=sampling), noise_seed, speaker.clip)

    def _check_can_speak(self) -> None:
        parts = {"talker": self.engines.talker, "token2wav": self.engines.token2wav}
        missing = [name for name, engine in parts.items() if engine is None]
        if missing:
            raise InputError(
                f"speech needs {' and '.join(missing)}, which this model was loaded or converted without; convert and "
                "load all components"
            )


def _batch_config(batch_size: int) -> SchedulerConfig:
    return SchedulerConfig(bucket(batch_size), bucket(batch_size), BLOCK_SIZES)
