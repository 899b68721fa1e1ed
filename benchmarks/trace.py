"""Engines whose calls are timed, for where the time to the first packet goes.

Each is a subclass that waits for what a call gives before the next one starts, so that no part's time is another's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from benchmarks.side import Call, Part
from omni_jax.engine.decode_state import DecodeResult
from omni_jax.engine.talker_engine import TalkerEngine
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.engine.token2wav_streaming import StreamEngine
from omni_jax.generation.model import OmniModel
from omni_jax.layers.streaming import Block

Result = TypeVar("Result")


class Trace:
    """The calls of the parts, in the clock of ``time.perf_counter``.

    Attributes:
      calls: since it was made or emptied.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, part: Part, call: Callable[[], Result], count_work: Callable[[Result], float]) -> Result:
        """Does a call, waits for its result, and notes both its time and its work."""
        # JAX returns before the device has finished; without the wait the next call would pay for this one
        started = time.perf_counter()
        result = jax.block_until_ready(call())
        ended = time.perf_counter()
        self.calls.append(Call(part, started, ended, count_work(result)))
        return result

    def calls_since(self, started: float) -> tuple[Call, ...]:
        """The calls, in seconds since then."""
        shifted = []
        for call in self.calls:
            shifted.append(dataclasses.replace(call, started=call.started - started, ended=call.ended - started))
        return tuple(shifted)


class _Traced:
    """An engine that shares all that another one holds: parameters and compiled programs."""

    # the constructor of the engine is left out, since it would place the parameters anew
    def __init__(self, engine: Any, trace: Trace):
        vars(self).update(vars(engine))
        self.trace = trace


class _TracedThinkerEngine(_Traced, ThinkerEngine):
    def encode(self, media: Any, *args: Any) -> jax.Array:
        call = super().encode
        # of sound in blocks, for that is what the predictions are about; nothing predicts pictures
        return self.trace.run(Part.ENCODERS, lambda: call(media, *args), lambda _: len(media.length))

    def prefill(self, prefix: Any, chunk: Any, *args: Any) -> Any:
        call = super().prefill
        positions = chunk.tokens.shape[1]
        return self.trace.run(Part.PREFILL, lambda: call(prefix, chunk, *args), lambda _: positions)

    def prefill_blocks(self, state: Any, blocks: Any, *args: Any) -> Any:
        call = super().prefill_blocks
        positions = blocks.chunk.tokens.size
        return self.trace.run(Part.PREFILL, lambda: call(state, blocks, *args), lambda _: positions)

    def decode(self, state: Any, *args: Any) -> Any:
        call = super().decode
        return self.trace.run(Part.TEXT, lambda: call(state, *args), _count_steps)


class _TracedTalkerEngine(_Traced, TalkerEngine):
    def prefill(self, prefix: Any, talker_inputs: Any, chunk: Any, start: int) -> Any:
        call = super().prefill
        positions = chunk.tokens.shape[1]
        return self.trace.run(
            Part.TALKER_PREFILL, lambda: call(prefix, talker_inputs, chunk, start), lambda _: positions
        )

    def begin(self, state: Any, requests: Any) -> Any:
        call = super().begin
        return self.trace.run(Part.BEGIN, lambda: call(state, requests), lambda _: 1)

    def decode(self, state: Any, progress: Any, counters: Any) -> Any:
        call = super().decode
        return self.trace.run(Part.CODES, lambda: call(state, progress, counters), _count_steps)


class _TracedToken2WavEngine(_Traced, Token2WavEngine):
    def __init__(self, engine: Token2WavEngine, trace: Trace):
        super().__init__(engine, trace)
        self.streams = _TracedStreamEngine(engine.streams, trace)

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Making a stream is the speaker encoder, where it has not seen the voice yet, and two states of zeros."""
        call = super().stream
        return self.trace.run(Part.SPEAKER, lambda: call(*args, **kwargs), lambda _: 1)

    def make_mels(self, *args: Any, **kwargs: Any) -> Any:
        call = super().make_mels
        return self.trace.run(Part.DIT, lambda: call(*args, **kwargs), len)

    def vocode(self, *args: Any, **kwargs: Any) -> Any:
        call = super().vocode
        return self.trace.run(Part.VOCODER, lambda: call(*args, **kwargs), len)


class _TracedStreamEngine(_Traced, StreamEngine):
    def solve(self, state: Any, chunk: Any, speaker: Any, *, is_first: bool) -> Any:
        call = super().solve
        # codes to mel frames to blocks; the last of a first chunk only waits
        num_blocks = chunk.codes.shape[1] * self.config.repeats // self.config.block_size - is_first
        return self.trace.run(Part.DIT, lambda: call(state, chunk, speaker, is_first=is_first), lambda _: num_blocks)

    def vocode(self, state: Any, mel: Any, active: Any) -> Any:
        """The samples are copied to the host here, and not in the stream, so that the copy has a time of its own."""
        call = super().vocode
        declared = self.vocoder.streaming
        # with what it looks back and ahead at, which is computed anew
        num_frames = declared.look_ahead + (declared.look_back or 0) + mel.valid.shape[1]
        return self._copy(self.trace.run(Part.VOCODER, lambda: call(state, mel, active), lambda _: num_frames))

    def vocode_first(self, state: Any, mel: Any, active: Any, look_ahead: int) -> Any:
        call = super().vocode_first
        num_frames = mel.valid.shape[1]
        return self._copy(
            self.trace.run(Part.VOCODER, lambda: call(state, mel, active, look_ahead), lambda _: num_frames)
        )

    def _copy(self, result: tuple[Block, Any]) -> tuple[Block, Any]:
        block, state = result
        values, valid = self.trace.run(Part.COPY, lambda: jax.device_get((block.values, block.valid)), lambda _: 1)
        return Block(values, valid), state


def _count_steps(result: tuple[Any, DecodeResult]) -> int:
    """Steps of a call of a decode loop: the tokens of the slot that got most."""
    _, decoded = result
    # slots that have ended go through the steps of the others
    tokens = decoded.to_host()
    return max(len(tokens.at_slot(slot)) for slot in range(len(tokens.remaining)))


def trace_model(model: OmniModel) -> tuple[OmniModel, Trace]:
    """The same model with engines whose calls are noted; it compiles nothing anew."""
    trace = Trace()
    engines = model.engines
    # all three are there: only whole models are timed
    assert engines.talker is not None and engines.token2wav is not None
    traced = dataclasses.replace(
        engines,
        thinker=_TracedThinkerEngine(engines.thinker, trace),
        talker=_TracedTalkerEngine(engines.talker, trace),
        token2wav=_TracedToken2WavEngine(engines.token2wav, trace),
    )
    return OmniModel(model.config, model.processor, traced, model.voices), trace
