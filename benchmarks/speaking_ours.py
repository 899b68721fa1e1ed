"""omni_jax's speech with random weights, float32, as ``bench.py speak`` runs it in a process apart.

Times leave out the compiler's, which a shape takes once.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import mrope
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.engine.prefill import ROOM
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.talker_engine import Said, SpeechRequest, TalkerEngine, TalkerParams
from omni_jax.engine.thinker_engine import PAD_TOKEN, TextRequest, ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.layers.stack import unstack_layers
from omni_jax.models import talker as talker_model
from omni_jax.models import thinker, token2wav
from omni_jax.processing.layout import Prompt, lay_out
from omni_jax.processing.prefill_plan import Feed, feed

STAGES = ("Thinker", "Talker", "DiT", "vocoder")  # of a spoken reply


class _Compiler:
    """When the compiler has been at work: tracing, lowering and compiling, the one within the other."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    def without(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """How long the work took, its compilation left out, and what it gave."""
        self._spans.clear()
        started = time.perf_counter()
        result = jax.block_until_ready(work())
        took, seen = time.perf_counter() - started, started
        for first, last in sorted(self._spans):
            took -= max(last - max(first, seen), 0.0)
            seen = max(seen, last)
        return took, result


_compiler = _Compiler()


def random_params(abstract: Any) -> Any:
    """Normal numbers of the usual width of a beginning, layers apart as on any CPU."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    return unstack_layers(jax.tree.map(lambda s: jnp.asarray(0.02 * draw(s.shape)), nn.unbox(abstract)))


@functools.cache
def _waveform(config: OmniConfig, clip: int) -> tuple[Token2WavEngine, Voice]:
    """Token2Wav, and a speaker with a clip of so many frames."""
    sizes, rng = config.token2wav_config, np.random.default_rng(1)
    params = random_params(token2wav.abstract_params(token2wav.Token2Wav(sizes)))
    dit = sizes.dit_config
    cond, ref_mel = (rng.standard_normal((1, *s), np.float32) for s in ((dit.enc_emb_dim,), (clip, dit.mel_dim)))
    return Token2WavEngine(token2wav.Token2Wav(sizes, scan_layers=False), params), Voice("a", 1, cond, ref_mel)


def dit(config: OmniConfig, clip: int, codes: int, rows: int) -> float:
    """From codes to mel: all evaluations of so many requests of one length."""
    wave, voice = _waveform(config, clip)
    ids = list(np.random.default_rng(2).integers(0, wave.config.dit_config.num_embeds, (rows, codes)))
    return _compiler.without(lambda: wave.mel(ids, [voice] * rows, [None] * rows, range(rows)))[0]


def vocoder(config: OmniConfig, clip: int, codes: int, rows: int) -> float:
    """From mel to samples."""
    wave, _ = _waveform(config, clip)
    c = wave.config.dit_config
    mel = np.random.default_rng(3).standard_normal((rows, codes * c.repeats, c.mel_dim), np.float32)
    return _compiler.without(lambda: wave.vocode(list(mel)))[0]


@functools.cache
def _text_loop(config: OmniConfig) -> ThinkerEngine:
    model = thinker.Thinker(config.thinker_config, scan_layers=False)
    return ThinkerEngine(model, random_params(thinker.abstract_params(model)), keep=True)


@functools.cache
def _speech_loop(config: OmniConfig) -> TalkerEngine:
    """The Talker; text ids have no embedding but zeros, so that the Thinker's weights need not be there."""
    model, width = talker_model.Talker(config.talker_config, scan_layers=False), config.talker_config.embedding_size
    params = random_params(talker_model.abstract_params(model))
    return TalkerEngine(model, params, config, lambda ids: jnp.zeros((*np.shape(ids), width)))


class _Talking:
    """A batch of replies that are all said, and the Talker's state after their prompts."""

    def __init__(self, config: OmniConfig, heard: jax.Array, prompts: list[Prompt], replies: list[int]):
        """``heard`` has the prompts' rows and behind them the replies', of so many tokens."""
        self.config, self.heard, self.prompts = config, heard, prompts
        self.said = Said(np.array([*map(len, prompts)]), np.array(replies), np.ones(len(replies), bool))
        longest = max(map(len, prompts)) + 2
        self.state = _speech_loop(config).empty(len(prompts), longest + ROOM)
        for stretch in _plan(config, prompts).stretches:
            self.state = _speech_loop(config).read(self.state, heard, stretch.chunk)

    def speak(self, speakers: Sequence[int], talks: Sequence[TalkerParams]) -> list[np.ndarray]:
        """The codes of each row."""
        loop, made = _speech_loop(self.config), []
        rows = zip(self.prompts, speakers, talks, strict=True)
        requests = {i: SpeechRequest(len(p), len(p), speaker, talk) for i, (p, speaker, talk) in enumerate(rows)}
        after = [mrope.Span(0, len(p)) for p in self.prompts]
        spans = mrope.stack([[span] for span in after], 2, width=1)
        state = loop.begin(jax.tree.map(jnp.copy, self.state), self.heard, requests, spans)
        while loop.ready(state, self.said).any():
            codes, state = loop.advance(state, self.heard, self.said)
            made.append(codes)
        return [row[row != PAD_TOKEN] for row in np.concatenate(made, axis=1)]


def _plan(config: OmniConfig, prompts: list[Prompt]) -> Feed:
    return feed(prompts, [mrope.resolve(p.segments, config.thinker_config) for p in prompts], config)


@functools.cache
def _talking(config: OmniConfig, rows: int, length: int, steps: int) -> _Talking:
    """A batch that has read prompts of ``length`` and has ``steps`` codes to say."""
    rng, width = np.random.default_rng(4), config.talker_config.embedding_size
    heard = jnp.asarray(rng.standard_normal((rows, length + steps, width), np.float32))
    return _Talking(config, heard, [_prompt(config, length, 0)] * rows, [steps] * rows)


def talker(config: OmniConfig, rows: int, length: int, steps: int) -> float:
    """Seconds a step after a prompt of ``length``, with the published way of drawing codes."""
    talking, talk = _talking(config, rows, length, steps), TalkerParams(max_tokens=steps)
    jax.block_until_ready(talking.state)
    took, made = _compiler.without(lambda: talking.speak([0] * rows, [talk] * rows))
    return took / max(map(len, made))  # a row's chance of an early end is small, but not none


@dataclass(frozen=True)
class Dialogue:
    """A request of the benchmark: ids that are asked, tokens of the reply, codes of its speech."""

    seed: int
    prompt: int
    words: int
    codes: int


def replies(config: OmniConfig, clip: int, dialogues: tuple[Dialogue, ...]) -> dict[str, float]:
    """Seconds of each stage of spoken replies to dialogues that are worked on together."""
    text, (wave, voice) = _text_loop(config), _waveform(config, clip)
    prompts = [_prompt(config, d.prompt, d.seed) for d in dialogues]
    plan, every = _plan(config, prompts), range(len(dialogues))
    asked = {i: TextRequest(SamplingParams(), d.words, ()) for i, d in enumerate(dialogues)}
    ids = {i: prompt.tokens for i, prompt in enumerate(prompts)}

    def say() -> jax.Array:
        state = text.empty(len(prompts), max(map(len, prompts)) + max(d.words for d in dialogues))
        for stretch in plan.stretches:
            state = text.read(state, stretch, [])
        state = text.ask(state, asked, ids)
        while np.asarray(state.left).any():
            _, state = text.advance(state)
        assert state.heard is not None
        return jnp.asarray(state.heard)

    def speak() -> list[np.ndarray]:
        talking = _Talking(config, heard, prompts, [d.words for d in dialogues])
        talks = [TalkerParams(max_tokens=d.codes, seed=d.seed) for d in dialogues]
        return talking.speak([voice.bos_token for _ in every], talks)

    many = len(dialogues)
    said, heard = _compiler.without(say)
    talked, codes = _compiler.without(speak)
    seeds = [d.seed for d in dialogues]
    solved, mels = _compiler.without(lambda: wave.mel(codes, [voice] * many, [None] * many, seeds))
    vocoded, _ = _compiler.without(lambda: wave.vocode(mels))
    return dict(zip(STAGES, (said, talked, solved, vocoded), strict=True))


def _prompt(config: OmniConfig, length: int, seed: int) -> Prompt:
    ids = np.random.default_rng(seed).integers(0, 500, length)
    return lay_out(ids.tolist(), [], config.thinker_config)


def products(config: OmniConfig) -> dict[str, float]:
    """Multiplications and additions (two operations) of the matrix products in a second of speech, by network.

    The DiT's: the weights of each layer for each frame, of the request and of nothing, in all 36 evaluations; its
    attention is 1 % of it. The vocoder's: the weights of each convolution at each of its places in time.
    """
    sizes = config.token2wav_config
    shapes = nn.unbox(token2wav.abstract_params(token2wav.Token2Wav(sizes)))
    layers = {k: v for k, v in shapes["dit"]["layers"].items() if k != "modulation"}
    frames, c = 100, sizes.bigvgan_config  # frames a second; samples follow from the rates
    rates = list(itertools.accumulate(c.upsample_rates, lambda a, b: a * b, initial=frames))
    stages = [shapes["bigvgan"][f"stage_{i}"] for i in range(len(c.upsample_rates))]
    vocoder = frames * _kernels(shapes["bigvgan"]["conv_in"]) + rates[-1] * _kernels(shapes["bigvgan"]["conv_out"])
    for stage, before, after in zip(stages, rates, rates[1:], strict=False):
        blocks = {k: v for k, v in stage.items() if k != "upsample"}
        vocoder += before * _kernels(stage["upsample"]) + after * _kernels(blocks)
    return {"DiT": 2.0 * frames * 2 * 36 * _kernels(layers), "vocoder": 2.0 * vocoder}


def _kernels(tree: Any) -> int:
    """Numbers in all kernels of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(int(np.prod(leaf.shape)) for path, leaf in leaves if path[-1].key == "kernel")
