"""OmniModel, the public face: messages in, text and speech out; one by one, as a stream, or many together."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax import mrope
from omni_jax.batch import bucket
from omni_jax.checkpoint import store
from omni_jax.checkpoint.voices import Voice, choose, load_voices
from omni_jax.config import OmniConfig
from omni_jax.engine.outputs import Event, Options, Reply, ReplyWriter, stop_ids
from omni_jax.engine.prefill import ROOM, ChunkSizes, Engines
from omni_jax.engine.request import Request, RequestState, SchedulerConfig, Voicing
from omni_jax.engine.scheduler import Scheduler
from omni_jax.engine.talker_engine import TalkerEngine, TalkerParams
from omni_jax.engine.thinker_engine import TextRequest, ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.engine.warmup import Compilations, warm_up
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.live_session import LiveSession
from omni_jax.layers.stack import unstack_layers
from omni_jax.models import talker, thinker, token2wav
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.layout import Prompt
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.processor import Processor
from omni_jax.sharding import param_shardings

Messages: TypeAlias = Sequence[Mapping[str, Any]]


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    components: Sequence[str] | None = None,
    allow_urls: bool = False,
    pace: ChunkSizes | None = None,
) -> OmniModel:
    """Loads a checkpoint that ``tools/convert.py to-jax`` wrote.

    Args:
      folder: the checkpoint.
      dtype: "bfloat16" or "float32" for parameters and computation; what the checkpoint holds if None. Token2Wav
        always computes in float32.
      mesh: from ``omni_jax.sharding.make_mesh``, to spread the parameters over several devices.
      components: ("thinker",) to read and write only; all that the checkpoint has if None.
      allow_urls: whether media may be fetched from the web; a server that does so lends its network to whoever asks.
      pace: how much is done at a time while a reply is streamed; the usual if None.

    Raises:
      CheckpointError: if the folder is not such a checkpoint or lacks a part.
      ConfigError: if its config.json does not describe the model, or the mesh does not divide a parameter.
    """
    folder = Path(folder)
    held = store.components(folder)
    wanted = tuple(held if components is None else components)
    if "thinker" not in wanted or "thinker" not in held:
        asked = ", ".join(wanted)
        raise CheckpointError(
            f"{folder} has {', '.join(held)}, and {asked} was asked for; nothing goes without thinker"
        )
    config, processor = OmniConfig.load(folder), Processor.load(folder, allow_urls=allow_urls)
    kind = jnp.dtype(dtype or jnp.result_type(*held["thinker"]))
    # slices of stacked layers are copies on a CPU; see omni_jax/layers/stack.py
    scan = mesh is not None or jax.default_backend() != "cpu"
    models = {name: _model(config, name, kind, scan) for name in wanted}
    shardings = None
    if mesh is not None:
        shardings = {name: param_shardings(_abstract(model), mesh) for name, model in models.items()}
    params = store.load(folder, wanted, dtype=kind, shardings=shardings)
    params = params if scan else unstack_layers(params)
    return OmniModel(
        config, processor, models, params, load_voices(folder) if "talker" in wanted else {}, mesh, pace or ChunkSizes()
    )


def _model(config: OmniConfig, component: str, dtype: Any, scan: bool) -> Any:
    if component == "thinker":
        return thinker.Thinker(config.thinker_config, scan_layers=scan, dtype=dtype, param_dtype=dtype)
    if component == "talker":
        return talker.Talker(config.talker_config, scan_layers=scan, dtype=dtype, param_dtype=dtype)
    return token2wav.Token2Wav(config.token2wav_config, scan_layers=scan)


def _abstract(model: Any) -> Any:
    if isinstance(model, thinker.Thinker):
        return thinker.abstract_params(model)
    return talker.abstract_params(model) if isinstance(model, talker.Talker) else token2wav.abstract_params(model)


class OmniModel:
    """A loaded model. It holds parameters and compiled programs, and nothing of any request.

    Attributes:
      voices: who it can speak as, by name; none without a Talker.
    """

    def __init__(
        self,
        config: OmniConfig,
        processor: Processor,
        models: Mapping[str, Any],
        params: Mapping[str, Any],
        voices: Mapping[str, Voice],
        mesh: Mesh | None,
        pace: ChunkSizes,
    ):
        self.config, self.processor, self.voices = config, processor, voices
        keep = "talker" in models
        text = ThinkerEngine(models["thinker"], params["thinker"], mesh=mesh, steps=pace.tokens, keep=keep)
        speech, wave = None, None
        if "talker" in models:
            speech = TalkerEngine(
                models["talker"], params["talker"], config, text.embed_tokens, mesh=mesh, steps=pace.codes
            )
        if "token2wav" in models:
            wave = Token2WavEngine(models["token2wav"], params["token2wav"], mesh)
        multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self._loops = Engines(config, pace, text, speech, wave, multiple)

    def generate(self, messages: Messages, **options: Any) -> Reply:
        """Answers one dialogue.

        Args:
          messages: OpenAI or Hugging Face chat messages; the README lists the parts.
          **options: see ``Options``.

        Raises:
          InputError: if the messages or options cannot be served; names the part, the value and the limit.
        """
        chosen, started = Options.create(**options), time.perf_counter()
        self._check_speech(chosen, [messages])
        scheduler = Scheduler(self._loops)
        task = self._submitted(scheduler, self._prompt(messages, chosen), chosen)
        scheduler.timings.prepare = time.perf_counter() - started
        *_, last = _events(scheduler, task)
        assert last.reply is not None
        return last.reply

    def stream(self, messages: Messages, **options: Any) -> Generator[Event, None, None]:
        """Answers one dialogue piece by piece: text and sound as they are made.

        The last event carries the whole reply, which the pieces add up to. Nothing is made before it is asked for;
        closing the iterator ends the reply and frees what it holds.
        """
        chosen, started = Options.create(**options), time.perf_counter()
        self._check_speech(chosen, [messages])
        scheduler = Scheduler(self._loops)
        task = self._submitted(scheduler, self._prompt(messages, chosen), chosen, live=True)
        scheduler.timings.prepare = time.perf_counter() - started
        return _events(scheduler, task)

    def listen(self, messages: Messages = (), *, hears: bool = True, sees: bool = False, **options: Any) -> LiveSession:
        """Begins a dialogue that is heard, or seen, while it goes on.

        Whatever comes is read as soon as it fills two seconds, so that only the rest is left when the speaker ends::

            listener = model.listen([{"role": "system", "content": SPEECH_SYSTEM_PROMPT}], modalities=("text", "audio"))
            for samples in microphone:
                listener.audio(samples, 48_000)
            for event in listener.answer():
                ...

        Args:
          messages: that came before, earlier replies among them; maybe none. What is heard and seen becomes a message
            of the user's after them.
          hears: whether sound is to come (``LiveSession.audio``).
          sees: whether pictures are to come (``LiveSession.video``); with sound too, they are one video.
          **options: see ``Options``; ``LiveSession.answer`` may change all but ``modalities`` and ``assume_fps``.

        Raises:
          InputError: if the messages or options cannot be served.
        """
        chosen = Options.create(**options)
        self._check_speech(chosen, [messages])
        prompt = LivePrompt(self.processor, messages, hears=hears, sees=sees, assume_fps=chosen.assume_fps)
        scheduler = Scheduler(self._loops)
        reading = scheduler.read(len(prompt.head.prompt) + ROOM, speaks=chosen.speaks)

        def ask(whole: Prompt, others: Mapping[str, Any]) -> Request:
            if settled := sorted({"modalities", "assume_fps"} & set(others)):
                raise InputError(f"{' and '.join(settled)} must be given to listen; what came is already read so")
            return self._ask(whole, Options.create(**{**options, **others}), live=True)

        return LiveSession(prompt, scheduler, reading, ask)

    def generate_batch(self, conversations: Sequence[Messages], *, batch_size: int = 8, **options: Any) -> list[Reply]:
        """Answers many dialogues, each as ``generate`` would alone.

        A dialogue that cannot be served gets a reply with its ``error``; the others are answered.

        Args:
          conversations: one list of messages each.
          batch_size: how many are worked on at once; as soon as one is answered the next takes its place.
          **options: see ``Options``; they hold for every row.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        chosen = Options.create(**options)
        self._check_speech(chosen, conversations)
        replies: dict[int, Reply] = {}
        prompts: dict[int, Prompt] = {}
        started = time.perf_counter()
        for i, messages in enumerate(conversations):
            try:
                prompts[i] = self._prompt(messages, chosen)
            except InputError as e:
                replies[i] = Reply.failed(e)
        rows = bucket(min(batch_size, max(len(prompts), 1)))
        scheduler = Scheduler(self._loops, SchedulerConfig(rows, rows))
        scheduler.timings.prepare = time.perf_counter() - started
        order = sorted(prompts, key=lambda i: len(prompts[i]))  # caches grow once, then
        numbers = {self._submitted(scheduler, prompts[i], chosen): i for i in order}
        for task, event in scheduler.run():
            if event.reply is not None:
                replies[numbers[task]] = event.reply
        return [replies[i] for i in range(len(conversations))]

    def scheduler(self, slots: SchedulerConfig) -> Scheduler:
        """An engine for many requests, that come and go one by one; see ``Scheduler`` and ``request``."""
        return Scheduler(self._loops, slots)

    def request(self, scheduler: Scheduler, prompt: Prompt, options: Options) -> RequestState:
        """Gives a scheduler of this model a request whose sound is to come with its reply.

        Args:
          scheduler: of this model.
          prompt: from this model's processor.
          options: how it is to be answered.

        Raises:
          InputError: for what ``check`` finds wrong.
        """
        self.check(options)
        return self._submitted(scheduler, prompt, options)

    def warmup(self, *, tokens: int = 2048, windows: int = 32, slots: SchedulerConfig | None = None) -> Compilations:
        """Compiles what ``stream`` and ``listen`` run, so that no request has to wait for the compiler.

        What is larger than this is compiled when it is met, and so is ``generate`` with speech, whose sound is made at
        once and not in blocks.

        Args:
          tokens: of a prompt and its reply, or of a prompt and the codes of its speech, at most.
          windows: of a picture at most, each 112 x 112 pixels: a picture of 480 x 640 has 30. 0 for none.
          slots: of a scheduler that is to run instead, with requests that are not live.

        Returns:
          How many programs there were, and the seconds they took.
        """
        wave, voices, pace = self._loops.wave, list(self.voices.values()), self._loops.pace
        with Compilations() as compilations:
            warm_up(self._loops, slots or SchedulerConfig(), tokens=tokens, windows=windows)
            if wave is not None and voices and slots is not None:
                wave.warm_up_whole(voices, slots.blocks)
            elif wave is not None and voices:
                chunks = dict(first_chunk_codes=pace.first_chunk_codes, chunk_codes=pace.chunk_codes)
                wave.warm_up(voices, **chunks)
        return compilations

    def synthesize(
        self,
        codec_ids: Sequence[int] | np.ndarray,
        *,
        voice: str | None = None,
        noise: np.ndarray | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Codes to sound.

        Args:
          codec_ids: at least one, 50 a second.
          voice: who speaks; the default voice if None.
          noise: float32 [2 * codes, mel_dim] that the flow starts from; drawn from ``seed`` if None.
          seed: of the draw.

        Returns:
          float32 [480 * codes] from -1 to 1 at 24 kHz.

        Raises:
          InputError: for codes out of range, none or too many, noise of another shape, or an unknown voice.
        """
        self._need_speech()
        wave = self._loops.wave
        assert wave is not None
        return wave.synthesize([np.asarray(codec_ids)], [choose(self.voices, voice)], [noise], [seed])[0]

    def _prompt(self, messages: Messages, options: Options) -> Prompt:
        context = self.config.thinker_config.text_config.max_position_embeddings
        return self.processor(messages, assume_fps=options.assume_fps, max_length=context - 1)

    def _submitted(self, scheduler: Scheduler, prompt: Prompt, options: Options, *, live: bool = False) -> RequestState:
        spans = mrope.resolve(prompt.segments, self.config.thinker_config)
        return scheduler.submit(self._ask(prompt, options, live=live), [(prompt, spans)])

    def _ask(self, prompt: Prompt, options: Options, *, live: bool) -> Request:
        c, length = self.config.thinker_config, len(prompt)
        room = min(options.max_tokens, c.text_config.max_position_embeddings - length)
        text = TextRequest(options.sampling, room, stop_ids(self.processor, options))
        after = mrope.resolve((*prompt.segments, mrope.Text(2)), c)[-1]
        voicing = None
        if options.speaks:
            noise = options.seed if options.noise_seed is None else options.noise_seed
            voicing = Voicing(choose(self.voices, options.voice), self._talk(options), noise)
        span = dataclasses.replace(after, begin=0)
        return Request(prompt.tokens, span, prompt.usage, text, ReplyWriter(self.processor, options), voicing, live)

    def _check_speech(self, options: Options, conversations: Sequence[Messages]) -> None:
        """Before any work: what speech needs is there. Warns of a system prompt that speech was not trained with."""
        self.check(options)
        if options.speaks and not all(_asks_for_speech(messages) for messages in conversations):
            warnings.warn(
                "speech was trained with the system prompt omni_jax.SPEECH_SYSTEM_PROMPT alone; under another one, or "
                "without one, the model may speak badly or not at all",
                stacklevel=3,
            )

    def check(self, options: Options) -> None:
        """Whether the model can answer so, before any work is done.

        Raises:
          InputError: for speech where it cannot speak, for an unknown voice, and for a wrong option of the Talker's.
        """
        if options.speaks:
            self._need_speech()
            choose(self.voices, options.voice)
            self._talk(options)

    def _need_speech(self) -> None:
        missing = [
            name for name, part in (("talker", self._loops.speech), ("token2wav", self._loops.wave)) if part is None
        ]
        if missing:
            raise InputError(
                f"speech needs {' and '.join(missing)}, which this model was loaded or converted without; convert and "
                "load all components"
            )

    def _talk(self, options: Options) -> TalkerParams:
        return TalkerParams.create({"seed": options.seed, **options.talker}, self.config)


def _events(scheduler: Scheduler, task: RequestState) -> Generator[Event, None, None]:
    """What a scheduler's only request gives."""
    for _, event in scheduler.run():
        if task.error is not None:
            raise task.error
        yield event


def _asks_for_speech(messages: Messages) -> bool:
    """Whether a dialogue begins with the system prompt that speech was trained with."""
    first = messages[0] if messages else {}
    content = first.get("content") if isinstance(first, Mapping) else None
    if isinstance(content, list | tuple) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text")
    return isinstance(first, Mapping) and first.get("role") == "system" and content == SPEECH_SYSTEM_PROMPT
