"""What the endpoints of the server share: the model behind its engine, the processes that decode media, and limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from omni_jax.engine.outputs import Reply
from omni_jax.engine.prompt_key import PromptKey
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.processing.chat import Message, parse_messages
from omni_jax.processing.layout import Prompt
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.voice_clip import VoiceClip
from omni_jax.serving.added_voices import AddedVoices
from omni_jax.serving.batches import Batches
from omni_jax.serving.chat_request import ChatRequest
from omni_jax.serving.engine_thread import EngineThread, ReplyStream
from omni_jax.serving.file_store import FileStore
from omni_jax.serving.http_errors import ModelNotFoundError, OverloadedError
from omni_jax.serving.media_roots import MediaRoots
from omni_jax.serving.metrics import Metrics
from omni_jax.serving.model_spec import ModelSpec, SetPhase
from omni_jax.serving.transcription_request import make_transcription
from omni_jax.serving.transcripts import Transcripts


@dataclass(frozen=True)
class ServiceSpec:
    """A service before it is made; it can be sent to another process.

    Attributes:
      model: that answers.
      name: what the model is called; that of its folder if empty.
      media_roots: which files of this machine requests may name.
      queue: requests that may wait, beyond those that have a slot; more are refused.
      max_body_bytes: of a request.
      max_file_bytes: of all files that are uploaded, and that batches write.
      voices_dir: where voices that are added are kept; None: only until the server ends.
      transcription_prompt: what the model is asked to write down speech with; {language} stands for the language.
      max_sessions: realtime sessions at once; each has caches of its own while somebody speaks.
      voice_detector: an ONNX file of Silero's that tells voice from noise in them; WebRTC's detector if None.
      replicas: of the service behind the same address. Of several, none knows the files and batches of the others, and
        their voices only through ``voices_dir``.
    """

    model: ModelSpec
    name: str = ""
    media_roots: MediaRoots = field(default_factory=MediaRoots)
    queue: int = 64
    max_body_bytes: int = 64_000_000
    max_file_bytes: int = 4_000_000_000
    voices_dir: str | None = None
    transcription_prompt: str = ""
    max_sessions: int = 16
    voice_detector: Path | None = None
    replicas: int = 1

    @property
    def model_name(self) -> str:
        return self.name or self.model.name

    @property
    def max_open(self) -> int:
        """Requests that may be open at once."""
        return self.model.scheduler.thinker_slots + self.queue


class Service:
    """A loaded model that answers; a context manager that ends its thread and its processes.

    Attributes:
      spec: what it was made from.
      model: that answers.
      engine: the thread that steps the scheduler.
      metrics: of all requests.
      voices: that were added.
      transcripts: of spoken answers, which later turns may name.
      files: that were uploaded, and that batches wrote.
      batches: of requests in such files.
      compilations: since it was ready.
    """

    def __init__(self, spec: ServiceSpec, set_phase: SetPhase = lambda phase: None):
        """Loads the model and compiles.

        Raises:
          CheckpointError, ConfigError, InputError: where ``omni_jax.load`` does.
        """
        self.spec = spec
        self.model: OmniModel = spec.model.load(set_phase, live=True)
        self.voices = AddedVoices(self.model, spec.voices_dir)
        self.transcripts = Transcripts()
        self.files = FileStore(spec.max_file_bytes)
        self.batches = Batches(self, self.files, spec.model_name, spec.model.scheduler.thinker_slots)
        self._media: MediaWorkers = spec.model.start_media_workers(self.model)
        # for what is prefilled while it comes: strangers' media are read in processes there too
        self._processor = self.model.processor.with_access(spec.model.access).with_media_reader(self._media)
        self.compilations = Compilations()
        self.compilations.__enter__()
        self.metrics = Metrics()
        self.engine = EngineThread(self.model, spec.model.scheduler, self.metrics.count_reply)
        self.started = int(time.time())
        self.num_open = 0
        self.num_sessions = 0
        self.draining = False
        self._add_states()

    @property
    def speaks(self) -> bool:
        return self.model.engines.talker is not None and self.model.engines.token2wav is not None

    @property
    def names(self) -> list[str]:
        """What ``model`` of a request may be: the model, and its adapters."""
        return [self.spec.model_name, *self.model.engines.thinker.adapters.names]

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Takes a place for a request, and gives it back at the end.

        Raises:
          OverloadedError: if there is none.
        """
        if self.draining:
            raise OverloadedError("the server is shutting down")
        if self.num_open >= self.spec.max_open:
            raise OverloadedError(f"{self.num_open} requests are open, which is the limit; try again later")
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    @contextlib.contextmanager
    def open_session(self) -> Iterator[None]:
        """Takes a place for a realtime session, and gives it back at the end.

        Raises:
          OverloadedError: if there is none.
        """
        if self.draining:
            raise OverloadedError("the server is shutting down")
        if self.num_sessions >= self.spec.max_sessions:
            raise OverloadedError(f"{self.num_sessions} sessions are open, which is the limit (--sessions)")
        self.num_sessions += 1
        try:
            yield
        finally:
            self.num_sessions -= 1

    def check_model(self, name: object) -> None:
        """Whether ``model`` of a request is there.

        Raises:
          ModelNotFoundError: if not.
        """
        if name is not None and name not in self.names:
            raise ModelNotFoundError(f"model {name!r} is not there; there are: {', '.join(self.names)}")

    def choose_adapter(self, name: object, options: Options) -> Options:
        """The options with the adapter that ``model`` of a request names; raises as ``check_model``."""
        self.check_model(name)
        if name is None or name == self.spec.model_name:
            return options
        assert isinstance(name, str)
        return dataclasses.replace(options, adapter=options.adapter or name)

    async def answer(self, request: ChatRequest, *, live: bool) -> ReplyStream:
        """Has a request answered.

        Args:
          request: that was found right.
          live: whether somebody waits for pieces as they are made.

        Raises:
          InputError: if it cannot be served.
          ClosedError: if the server is shutting down.
        """
        received = self.model.engines.clock()
        options = self.check_options(request.options)
        clip = await self.find_clip(options)
        prompt = await self._prepare(request.messages, options)
        key = None
        if self.spec.model.scheduler.prefix_bytes:
            thinker_config = self.model.config.thinker_config
            key = await asyncio.to_thread(PromptKey.create, prompt, options.adapter, thinker_config)
        stream = await self.engine.submit(prompt, options, live=live, clip=clip, key=key)
        stream.timeline.received = received
        return stream

    def check_options(self, options: Options) -> Options:
        """The options with the clip of a voice that was added in place of its name.

        Raises:
          InputError: if the model cannot answer so.
        """
        options = self.voices.resolve(options)
        self.model.check(options)
        return options

    def make_live_prompt(self, messages: Sequence[Mapping[str, Any]], *, audio: bool, video: bool) -> LivePrompt:
        """A prompt whose last message comes while it is prefilled.

        Args:
          messages: that came before.
          audio, video: what is to come.

        Raises:
          InputError: if the messages cannot be served.
        """
        before = parse_messages(messages) if messages else ()
        return LivePrompt(self._processor, self.spec.media_roots.confine(before), audio=audio, video=video)

    async def answer_whole(self, request: ChatRequest) -> Reply:
        """Has a request answered that nobody waits for the pieces of; raises what ``answer`` does."""
        stream = await self.answer(request, live=False)
        try:
            return await stream.reply()
        finally:
            stream.cancel()

    async def read_clip(self, source: str | bytes) -> VoiceClip:
        """The clip of a voice, decoded in a process of its own.

        Raises:
          InputError: if it cannot be read.
        """
        return await asyncio.wrap_future(self._media.submit_clip(source, None))

    async def read_picture(self, data: bytes) -> Image.Image:
        """A picture, decoded in a process of its own.

        Raises:
          InputError: if it cannot be read.
        """
        return await asyncio.wrap_future(self._media.submit_picture(data))

    async def transcribe(self, sound: bytes | np.ndarray, rate: int | None = None) -> Reply:
        """What is said in a sound: a file, or float samples at a rate; raises what ``answer`` does."""
        return await self.answer_whole(make_transcription(self.spec.transcription_prompt, sound, rate))

    def close(self) -> None:
        """Ends the thread and the processes; requests that are open get an error."""
        self.engine.close()
        self._media.close()
        self.files.close()
        self.compilations.__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _prepare(self, messages: tuple[Message, ...], options: Options) -> Prompt:
        context = self.model.config.thinker_config.text_config.max_position_embeddings
        confined = self.spec.media_roots.confine(messages)
        # one position is left for the reply
        return await asyncio.wrap_future(self._media.submit(confined, options.assume_fps, context - 1))

    async def find_clip(self, options: Options) -> VoiceClip | None:
        """The clip of the voice, where a reply is to be spoken in one.

        Raises:
          InputError: if it cannot be read.
        """
        if not options.speaks or not isinstance(options.voice, ClonedVoice):
            return None
        added = self.voices.find(options.voice)
        if added is None:
            voice = self.spec.media_roots.confine_voice(options).voice
            assert isinstance(voice, ClonedVoice)
            return await self.read_clip(voice.ref_audio)
        if added.clip is not None:
            return added.clip
        clip = await self.read_clip(added.voice.ref_audio)
        self.voices.keep_clip(added, clip)
        return clip

    def _add_states(self) -> None:
        add = self.metrics.add_state
        add("omni_requests_open", "Requests that are not answered yet.", lambda: self.num_open)
        add("omni_requests_waiting", "Requests that wait for a slot.", lambda: self.engine.num_waiting)
        add("omni_sessions_open", "Realtime sessions.", lambda: self.num_sessions)
        add("omni_slots_used", "Slots that requests have.", lambda: self.engine.num_running)
        add("omni_slots", "Slots.", lambda: self.spec.model.scheduler.thinker_slots)
        add("omni_compilations", "Programs compiled since the server was ready.", lambda: self.compilations.count)
