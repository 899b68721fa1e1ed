"""omni_jax's side of ``bench.py latency``: a random model, and one spoken request, each part of which is timed.

``Session`` holds a loaded model; the functions after it are what a process apart is asked to do.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import omni_jax
from benchmarks import latency_figures as figures
from benchmarks.latency_figures import Call, Length, Streams
from omni_jax import mrope
from omni_jax.batch import AudioBlocks
from omni_jax.checkpoint.convert import to_jax
from omni_jax.checkpoint.pytorch import read_headers
from omni_jax.config import OmniConfig
from omni_jax.engine.outputs import Event
from omni_jax.engine.prefill import ChunkSizes
from omni_jax.engine.talker_engine import suppressed_codes
from omni_jax.engine.thinker_engine import PAD_TOKEN
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.model import OmniModel
from omni_jax.layers.streaming import Block
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN
from omni_jax.models.dit_streaming import CarriedDiT
from omni_jax.models.token2wav import Token2Wav, parts
from omni_jax.processing.layout import AudioInput, Prompt
from omni_jax.processing.prefill_plan import feed, widths
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer import TextTokenizer
from tools.make_checkpoint import write_checkpoint

QUESTION = "What do you hear?"
VOICE = "Chelsie"
CALIBRATION = Length(4)  # of the reply that the cost of a unit is taken from


def make_model(published: Path, converted: Path, config: OmniConfig) -> None:
    """Writes a random model in float32 in both layouts, whose replies are as long as is asked for and have text.

    In both heads the scores of everything that is not to be said are zero. So the likeliest word is never the end mark
    but always whole characters; and no end is ever among the 40 likeliest codes, which the published way of drawing
    takes its choice from, as of thousands of random scores about half are above zero.
    """
    write_checkpoint(published, config, dtype="float32")
    tokens = Processor.load(published).tokenizer
    words = np.array([_whole_characters(tokens, i) for i in range(config.thinker_config.text_config.vocab_size)])
    _silence(published, "thinker.lm_head.weight", ~words)
    c, codes = config.talker_config, suppressed_codes(config)
    codes[[c.tts_codec_pad_token_id, c.tts_codec_end_token_id]] = True
    _silence(published, "talker.codec_head.weight", codes)
    to_jax(published, converted)


def _whole_characters(tokenizer: TextTokenizer, token: int) -> bool:
    text = tokenizer.token_bytes(token)
    return text.isascii() and bool(text)


def _silence(folder: Path, name: str, rows: np.ndarray) -> None:
    """Zeros in these rows of a tensor of the folder's files."""
    tensor = read_headers(folder)[name]
    size = tensor.nbytes // tensor.shape[0]
    with open(tensor.file, "r+b") as f:
        for row in np.flatnonzero(rows):
            f.seek(tensor.offset + int(row) * size)
            f.write(bytes(size))


def streams(config: OmniConfig, pace: ChunkSizes) -> Streams:
    """What Token2Wav's streams declare, beside the pace."""
    networks = parts(Token2Wav(config.token2wav_config))
    dit, vocoder = CarriedDiT(networks[0]).streaming, StreamedBigVGAN(networks[1]).streaming
    assert vocoder.look_back is not None
    return Streams(
        first_tokens=pace.first_tokens,
        tokens=pace.tokens,
        codes=pace.codes,
        first_chunk_codes=pace.first_chunk_codes,
        chunk_codes=pace.chunk_codes,
        block=dit.block,
        frames=dit.outputs,
        dit_ahead=dit.look_ahead,
        vocoder_ahead=vocoder.look_ahead,
        vocoder_back=vocoder.look_back,
    )


class Trace:
    """Notes each call of a model's parts. It waits for what the call gives, so that no part's time is another's.

    Attributes:
      calls: since it was emptied, in the clock of ``time.perf_counter``.
    """

    def __init__(self, model: OmniModel):
        """Watches the parts of ``model`` from now on."""
        self.calls: list[Call] = []
        loops = model._loops
        text, speech, wave = loops.text, loops.speech, loops.wave
        assert speech is not None and wave is not None
        programs = wave._programs
        block = programs.config.block_size // programs.repeats
        declared = programs.vocoder.streaming
        window = declared.look_ahead + (declared.look_back or 0)
        self._watch(text, "encode", "encode", lambda given, _: len(given[0].length))
        self._watch(text, "read", "read", lambda given, _: given[1].chunk.tokens.shape[1])
        self._watch(speech, "read", "read", lambda *_: 0)  # the Talker reads what the Thinker has read
        self._watch(text, "advance", "think", lambda _, made: _steps(made[0]))
        self._watch(speech, "begin", "begin", lambda *_: 1)
        self._watch(speech, "advance", "talk", lambda _, made: _steps(made[0]))
        self._watch(wave, "_speaker_rows", "voice", lambda *_: 1)
        self._watch(programs, "solve", "solve", lambda given, _: given[2].codes.shape[1] / block)
        self._watch(programs, "vocode", "vocode", lambda given, _: window + given[1].valid.shape[1])
        self._watch_copy(programs)

    def _watch(self, owner: Any, name: str, part: str, work: Callable[[tuple, Any], float]) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            made = jax.block_until_ready(inner(*args, **settings))
            self.calls.append(Call(part, started, time.perf_counter(), work(args, made)))
            return made

        setattr(owner, name, timed)

    def _watch_copy(self, programs: Any) -> None:
        """The vocoder's samples are brought to the host here, where otherwise the stream does it."""
        inner = programs.vocode

        def copied(*args: Any) -> tuple[Block, Any]:
            made, state = inner(*args)
            started = time.perf_counter()
            block = Block(np.asarray(made.values), np.asarray(made.valid))
            self.calls.append(Call("copy", started, time.perf_counter(), 1))
            return block, state

        programs.vocode = copied


def _steps(made: np.ndarray) -> int:
    return int((made != PAD_TOKEN).sum(axis=1).max())


@dataclass(frozen=True)
class Request:
    """Somebody's speech and a question in writing, to a model in a folder."""

    folder: Path
    sound: Path

    @property
    def messages(self) -> list[dict[str, Any]]:
        content = [{"type": "audio", "audio": str(self.sound)}, {"type": "text", "text": QUESTION}]
        system = {"role": "system", "content": omni_jax.SPEECH_SYSTEM_PROMPT}
        return [system, {"role": "user", "content": content}]


class Session:
    """A loaded model and its trace.

    Attributes:
      load_seconds: that loading took.
    """

    def __init__(self, request: Request):
        started = time.perf_counter()
        self.model = omni_jax.load(request.folder)
        self.load_seconds = time.perf_counter() - started
        self._request, self._trace = request, Trace(self.model)

    @functools.cached_property
    def prompt(self) -> Prompt:
        return self.model.processor(self._request.messages)

    @property
    def streams(self) -> Streams:
        return streams(self.model.config, self.model._loops.pace)

    def warm_up(self, lengths: Iterable[Length]) -> dict[str, float]:
        """Compiles what replies of these lengths run."""
        longest = len(self.prompt) + 2 + max(max(length.tokens, length.codes) for length in lengths)
        made = self.model.warmup(tokens=longest, windows=0)
        return dict(programs=made.count, seconds=made.seconds)

    def answer(self, length: Length) -> dict[str, Any]:
        """The figures of one streamed reply.

        Raises:
          RuntimeError: if the reply has another length.
        """
        calls = self._trace.calls
        calls.clear()
        texts, arrivals, pieces, reply, first = [], [], [], None, {}
        with Compilations() as compiled:
            started = time.perf_counter()
            events = self._ask(length)
            calls.append(Call("input", started, time.perf_counter(), 1))
            for event in events:
                now = time.perf_counter() - started
                if event.text:
                    texts.append(now)
                if event.audio is not None and len(event.audio):
                    first = first or _compiled(compiled, "_to_the_first_packet")
                    arrivals.append(now)
                    pieces.append(event.audio)
                reply = event.reply
        assert reply is not None
        if (made := (len(reply.token_ids), len(reply.codec_ids))) != (length.tokens, length.codes):
            raise RuntimeError(f"{length.tokens} tokens and {length.codes} codes were asked for, and {made} came")
        return _figures(length, self._since(started), texts[0], arrivals, pieces) | _compiled(compiled) | first

    def first_packet(self, length: Length) -> dict[str, Any]:
        """The figures of a streamed reply that is closed when its first packet is there."""
        calls = self._trace.calls
        calls.clear()
        texts, first = [], 0.0
        with Compilations() as compiled:
            started = time.perf_counter()
            events = self._ask(length)
            calls.append(Call("input", started, time.perf_counter(), 1))
            for event in events:
                now = time.perf_counter() - started
                if event.text:
                    texts.append(now)
                if event.audio is not None and len(event.audio):
                    first = now
                    break
            events.close()
        to_first = figures.before(self._since(started), first)
        budget, work = figures.measured(to_first, first), figures.done(to_first)
        return dict(ttft=texts[0], audio_ttfp=first, budget=budget, work=work) | _compiled(compiled)

    def _since(self, started: float) -> list[Call]:
        """The calls of the trace in seconds since then."""
        return figures.named([Call(c.part, c.started - started, c.ended - started, c.work) for c in self._trace.calls])

    def _ask(self, length: Length) -> Generator[Event, None, None]:
        options: dict[str, Any] = dict(max_tokens=length.tokens, modalities=("text", "audio"), voice=VOICE)
        return self.model.stream(self._request.messages, talker=dict(max_tokens=length.codes), **options)

    def prices(self) -> dict[str, float]:
        """Seconds of one unit of each part's work, from a reply of its own."""
        self.answer(CALIBRATION)
        return figures.costs(self._trace.calls)

    def plan(self) -> tuple[int, int]:
        """Blocks of two seconds that the encoder is given, and positions of the chunks of the prompt."""
        c, prompt = self.model.config, self.prompt
        calls = feed([prompt], [mrope.resolve(prompt.segments, c.thinker_config)], c).calls
        return sum(len(call.length) for call in calls if isinstance(call, AudioBlocks)), sum(widths(len(prompt)))


def _compiled(seen: Compilations, until: str = "") -> dict[str, float]:
    return {f"compilations{until}": seen.count, f"compile_seconds{until}": seen.seconds}


def _figures(
    length: Length, calls: list[Call], ttft: float, arrivals: list[float], pieces: list[np.ndarray]
) -> dict[str, Any]:
    played = figures.play(arrivals, [len(piece) for piece in pieces])
    loud = [np.flatnonzero(np.abs(piece) >= figures.AUDIBLE) for piece in pieces]
    heard = [b + places[0] / figures.SAMPLE_RATE for b, places in zip(played.begins, loud, strict=True) if len(places)]
    to_first = figures.before(calls, arrivals[0])
    return dict(
        ttft=ttft,
        audio_ttfp=arrivals[0],
        first_packet_seconds=len(pieces[0]) / figures.SAMPLE_RATE,
        first_audible=float(heard[0]) if heard else None,
        wall=arrivals[-1],
        audio_rtf=arrivals[-1] / length.seconds,
        underruns=played.underruns,
        largest_gap=played.largest_gap,
        packets=[[when, len(piece) / figures.SAMPLE_RATE] for when, piece in zip(arrivals, pieces, strict=True)],
        budget=figures.measured(to_first, arrivals[0]),
        work=figures.done(to_first),
    )


@functools.cache
def _session(request: Request) -> Session:
    return Session(request)


def cold(request: Request, length: Length) -> dict[str, Any]:
    """The first request after loading, in a process that has compiled nothing."""
    session = Session(request)
    return session.answer(length) | dict(load_seconds=session.load_seconds)


def warm_up(request: Request, lengths: tuple[Length, ...]) -> dict[str, Any]:
    """Compiles; then what there is to know before requests are timed."""
    session = _session(request)
    warmed = session.warm_up(lengths)
    declared, plan, prices = session.streams, session.plan(), session.prices()
    work = {length.seconds: declared.work(length, *plan) for length in lengths}
    return dict(
        warmup=warmed,
        prompt_tokens=len(session.prompt),
        first_packet=dict(chunks=declared.chunks(), seconds=declared.first_packet),
        prices=prices,
        predicted_work=work,
        predicted={seconds: figures.predicted(needed, prices) for seconds, needed in work.items()},
    )


def compile_all(request: Request, lengths: tuple[Length, ...]) -> dict[str, float]:
    """Compiles what replies of these lengths run, and asks once."""
    made = _session(request).warm_up(lengths)
    first_packet(request, lengths[0])
    return made


def first_packet(request: Request, length: Length) -> dict[str, Any]:
    """A request after ``compile_all``, up to its first packet."""
    return _session(request).first_packet(length)


def warm(request: Request, length: Length) -> dict[str, Any]:
    """A request after ``warm_up``."""
    return _session(request).answer(length)


def reference_prompt(request: Request) -> dict[str, np.ndarray]:
    """The prompt as PyTorch's model takes it."""
    prompt = _session(request).prompt
    sound = next(m for m in prompt.media if isinstance(m, AudioInput))
    ids = prompt.tokens[None].astype(np.int64)
    mel = sound.mel.T[None].copy()
    return dict(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        input_features=mel,
        feature_attention_mask=np.ones((1, mel.shape[2]), bool),
    )
