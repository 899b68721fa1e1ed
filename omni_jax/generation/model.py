"""OmniModel, the public face: messages in, text and speech out; one by one, as a stream, or many together."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax.batch import bucket
from omni_jax.checkpoint import store
from omni_jax.checkpoint.voices import Voice, choose, load_voices
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.reply import Event, Options, Reply, ReplyWriter, Timings, stop_ids
from omni_jax.generation.speech import SpeechLoop, SpeechRequest, Talk
from omni_jax.generation.text import Conditioning, TextLoop, TextRequest
from omni_jax.generation.waveform import Waveform
from omni_jax.layers.stack import unstack_layers
from omni_jax.models import talker, thinker, token2wav
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import Prompt, Usage
from omni_jax.processing.processor import Processor
from omni_jax.sharding import param_shardings

Messages: TypeAlias = Sequence[Mapping[str, Any]]

_NOBODY = Prompt(np.zeros(0, np.int32), (), (), np.zeros(0, np.int32), np.zeros(0, np.int32), Usage())


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    components: Sequence[str] | None = None,
    allow_urls: bool = False,
) -> OmniModel:
    """Loads a checkpoint that ``tools/convert.py to-jax`` wrote.

    Args:
      folder: the checkpoint.
      dtype: "bfloat16" or "float32" for parameters and computation; what the checkpoint holds if None. Token2Wav
        always computes in float32.
      mesh: from ``omni_jax.sharding.make_mesh``, to spread the parameters over several devices.
      components: ("thinker",) to read and write only; all that the checkpoint has if None.
      allow_urls: whether media may be fetched from the web; a server that does so lends its network to whoever asks.

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
    return OmniModel(config, processor, models, params, load_voices(folder) if "talker" in wanted else {}, mesh)


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
    ):
        self.config, self.processor, self.voices = config, processor, voices
        self._text = TextLoop(models["thinker"], params["thinker"], mesh)
        self._speech, self._wave = None, None
        if "talker" in models:
            self._speech = SpeechLoop(models["talker"], params["talker"], config, self._text.words, mesh=mesh)
        if "token2wav" in models:
            self._wave = Waveform(models["token2wav"], params["token2wav"], mesh)
        self._row_multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def generate(self, messages: Messages, **options: Any) -> Reply:
        """Answers one dialogue.

        Args:
          messages: OpenAI or Hugging Face chat messages; the README lists the parts.
          **options: see ``Options``.

        Raises:
          InputError: if the messages or options cannot be served; names the part, the value and the limit.
        """
        return next(event.reply for event in self.stream(messages, **options) if event.reply is not None)

    def stream(self, messages: Messages, **options: Any) -> Iterator[Event]:
        """Answers one dialogue piece by piece: text as it is made, then the sound, whole.

        The last event carries the whole reply; closing the iterator ends it.
        """
        chosen, begun = Options.create(**options), time.perf_counter()
        self._check_speech(chosen, [messages])
        prompt = self._prompt(messages, chosen)
        return self._answer([prompt], chosen, Timings(prepare=time.perf_counter() - begun))

    def generate_batch(self, conversations: Sequence[Messages], *, batch_size: int = 8, **options: Any) -> list[Reply]:
        """Answers many dialogues, each as ``generate`` would alone.

        A dialogue that cannot be served gets a reply with its ``error``; the others are answered.

        Args:
          conversations: one list of messages each.
          batch_size: how many are worked on together; those of like length go together.
          **options: see ``Options``; they hold for every row.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        chosen = Options.create(**options)
        self._check_speech(chosen, conversations)
        replies: dict[int, Reply] = {}
        prompts: dict[int, Prompt] = {}
        begun = time.perf_counter()
        for i, messages in enumerate(conversations):
            try:
                prompts[i] = self._prompt(messages, chosen)
            except InputError as e:
                replies[i] = Reply.failed(e)
        prepare = time.perf_counter() - begun
        order = sorted(prompts, key=lambda i: len(prompts[i]))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            share = Timings(prepare=prepare * len(rows) / len(order))
            events = self._answer([prompts[i] for i in rows], chosen, share)
            replies |= dict(zip(rows, [e.reply for e in events if e.reply is not None], strict=True))
        return [replies[i] for i in range(len(conversations))]

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
        assert self._wave is not None
        return self._wave.synthesize([np.asarray(codec_ids)], [choose(self.voices, voice)], [noise], [seed])[0]

    def _prompt(self, messages: Messages, options: Options) -> Prompt:
        context = self.config.thinker_config.text_config.max_position_embeddings
        return self.processor(messages, assume_fps=options.assume_fps, max_length=context - 1)

    def _answer(self, prompts: Sequence[Prompt], options: Options, timings: Timings) -> Iterator[Event]:
        """Runs one batch. Text comes as it is made if there is one row; at the end each row's reply, in order."""
        rows = -(-bucket(len(prompts)) // self._row_multiple) * self._row_multiple
        batch = collate([*prompts, *[_NOBODY] * (rows - len(prompts))], self.config)
        clock = _Clock()
        features = self._text.encode(batch)
        timings.encode = clock.lap()
        requests = [self._request(p, options) for p in prompts]
        state = self._text.start(batch, features, requests, keep=options.speaks)
        timings.prefill = clock.lap()
        writers = [ReplyWriter(self.processor, options) for _ in prompts]
        while np.asarray(state.left).any() and not all(writer.finish_reason for writer in writers):
            made, state = self._text.advance(state)
            pieces = [writer.push(tokens) for writer, tokens in zip(writers, made, strict=False)]
            if len(writers) == 1 and pieces[0]:
                yield Event(pieces[0])
        timings.decode = clock.lap()
        rests = [writer.end() for writer in writers]
        heard = state.kept
        del state  # the Thinker's cache is not needed while the reply is spoken
        spoken = None if heard is None else self._speak(heard, prompts, writers, options, timings)
        for i, (prompt, writer) in enumerate(zip(prompts, writers, strict=True)):
            assert writer.finish_reason is not None
            reply = Reply(writer.text, tuple(writer.ids), writer.finish_reason, prompt.usage, timings)
            if spoken is not None:
                codes, audio = spoken[i]
                reply = dataclasses.replace(reply, codec_ids=tuple(codes.tolist()), audio=audio)
            yield Event(rests[i] or None, reply.audio, reply)

    def _speak(
        self,
        heard: Conditioning,
        prompts: Sequence[Prompt],
        writers: Sequence[ReplyWriter],
        options: Options,
        timings: Timings,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The codes and the samples of every row."""
        assert self._speech is not None
        clock, voice, talk = _Clock(), choose(self.voices, options.voice), self._talk(options)
        requests = [
            SpeechRequest(prompt, writer.spoken, voice.bos_token, talk)
            for prompt, writer in zip(prompts, writers, strict=True)
        ]
        codes = self._speech.speak(heard, requests)
        timings.talk = clock.lap()
        audio = self._samples(codes, voice, [None] * len(codes), options.seed)
        timings.wave = clock.lap()
        return list(zip(codes, audio, strict=True))

    def _samples(
        self, codes: Sequence[np.ndarray], voice: Voice, noise: Sequence[np.ndarray | None], seed: int
    ) -> list[np.ndarray]:
        """Token2Wav over the rows that have codes; the others are silent, of no length."""
        assert self._wave is not None
        rows = [i for i, row in enumerate(codes) if len(row)]
        made = self._wave.synthesize(
            [codes[i] for i in rows], [voice] * len(rows), [noise[i] for i in rows], [seed] * len(rows)
        )
        samples = dict(zip(rows, made, strict=True))
        return [samples.get(i, np.zeros(0, np.float32)) for i in range(len(codes))]

    def _check_speech(self, options: Options, conversations: Sequence[Messages]) -> None:
        """Before any work: what speech needs is there. Warns of a system prompt that speech was not trained with."""
        if not options.speaks:
            return
        self._need_speech()
        choose(self.voices, options.voice)
        self._talk(options)
        if not all(_asks_for_speech(messages) for messages in conversations):
            warnings.warn(
                "speech was trained with the system prompt omni_jax.SPEECH_SYSTEM_PROMPT alone; under another one, or "
                "without one, the model may speak badly or not at all",
                stacklevel=3,
            )

    def _need_speech(self) -> None:
        missing = [name for name, part in (("talker", self._speech), ("token2wav", self._wave)) if part is None]
        if missing:
            raise InputError(
                f"speech needs {' and '.join(missing)}, which this model was loaded or converted without; convert and "
                "load all components"
            )

    def _talk(self, options: Options) -> Talk:
        return Talk.create({"seed": options.seed, **options.talker}, self.config)

    def _request(self, prompt: Prompt, options: Options) -> TextRequest:
        context = self.config.thinker_config.text_config.max_position_embeddings
        room = min(options.max_tokens, context - len(prompt))
        return TextRequest(options.sampling, room, stop_ids(self.processor, options))


def _asks_for_speech(messages: Messages) -> bool:
    """Whether a dialogue begins with the system prompt that speech was trained with."""
    first = messages[0] if messages else {}
    content = first.get("content") if isinstance(first, Mapping) else None
    if isinstance(content, list | tuple) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text")
    return isinstance(first, Mapping) and first.get("role") == "system" and content == SPEECH_SYSTEM_PROMPT


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last
