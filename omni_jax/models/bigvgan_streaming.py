"""The vocoder by blocks: its samples of a stream of mel frames are, to the last rounding, its samples of all of them.

A sample depends on a bounded number of frames to either side (``reach``). A step calls the whole vocoder on a window,
from the frame that the first new sample looks back to up to the newest one, and returns the samples whose frames are
all there. Where a row is not longer than its window, the window begins with the row and meets its true edge.

Letters: B rows, K frames kept, T new frames, W frames of a window (K + T), M mel bins, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import same_padding, upsampling_padding
from omni_jax.layers.streaming import Block, Streaming, keep_rows
from omni_jax.models.bigvgan import EDGE_KERNEL, VocoderWeights, synthesize
from omni_jax.models.snake_beta import ACTIVATION_REACH

FRAME_SECONDS = 0.01


@struct.dataclass
class VocoderState:
    """What a step leaves to the next."""

    mel: Float[Array, "B K M"]  # the last K frames, or fewer, from the left
    seen: Int[Array, " B"]  # frames since the row's beginning, with those after its end
    length: Int[Array, " B"]  # of them up to its end


@dataclass(frozen=True)
class StreamedBigVGAN:
    """The vocoder as a part that streams: from log-mel [B, T, M] to samples [B, T * samples of a frame]."""

    config: BigVGANConfig

    @property
    def streaming(self) -> Streaming:
        behind, ahead = reach(self.config)
        return Streaming(FRAME_SECONDS, 1, ahead, behind, outputs=math.prod(self.config.upsample_rates))

    def apply_sequence(self, params: VocoderWeights, x: Block) -> Block:
        """Samples of whole rows."""
        valid = jnp.asarray(x.valid)
        samples = synthesize(self.config, params, x.values, jnp.sum(valid, axis=1))
        return Block(samples, jnp.repeat(valid, self.streaming.outputs, axis=1))

    def init_state(self, batch: int) -> VocoderState:
        """The state of ``batch`` rows before their first frame."""
        # K frames are kept: as many as the samples of one frame depend on, to both sides together
        zeros = jnp.zeros(batch, jnp.int32)
        return VocoderState(jnp.zeros((batch, sum(reach(self.config)), self.config.mel_dim)), zeros, zeros)

    def step(
        self, params: VocoderWeights, state: VocoderState, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, VocoderState]:
        """As many frames' samples as there are new frames: those up to ``look_ahead`` frames before the newest."""
        count = jnp.asarray(block.valid).shape[1]
        window, begin, new_state = self._slide(state, block)
        # with its true length, so that the end of the row is an edge for the vocoder
        samples = synthesize(self.config, params, window, jnp.maximum(new_state.length - begin, 0))

        # the frames whose look-ahead is there now; some lie before the row's beginning or after its end
        first = new_state.seen - self.streaming.look_ahead - count  # [B]
        frame = first[:, None] + jnp.arange(count)  # [B, T]: returned by this step
        output = _take_frames(samples.reshape(*window.shape[:2], -1), frame - begin[:, None])
        is_real = (frame >= 0) & (frame < new_state.length[:, None])  # [B, T]
        if active is not None:
            is_real = is_real & jnp.asarray(active)[:, None]
        outputs = Block(output.reshape(len(output), -1), jnp.repeat(is_real, output.shape[2], axis=1))
        return outputs, keep_rows(active, new_state, state)

    def absorb(self, state: VocoderState, block: Block, active: Bool[Array, " B"] | None = None) -> VocoderState:
        """The state after a step, without the step's samples."""
        _, _, new_state = self._slide(state, block)
        return keep_rows(active, new_state, state)

    def _slide(self, state: VocoderState, block: Block) -> tuple[Float[jax.Array, "B W M"], jax.Array, VocoderState]:
        """The window of a step, its first frame counted from the row's beginning [B], and the state after the step."""
        valid = jnp.asarray(block.valid)  # [B, T]
        kept = state.mel.shape[1]
        count = valid.shape[1]
        # a row begins with its first valid frame
        first = jnp.where(jnp.any(valid, axis=1), jnp.argmax(valid, axis=1), count)
        skipped = jnp.where(state.seen == 0, first, 0)  # [B]
        seen = state.seen + count - skipped
        length = state.length + jnp.sum(valid, axis=1)

        # all frames from here on are counted from the row's beginning, and all places from the window's
        begin = jnp.maximum(state.seen - kept, 0)  # [B]
        num_kept = (state.seen - begin)[:, None]  # [B, 1]
        # the window: the frames that are kept, from the left, and right behind them the new ones
        place = jnp.arange(kept + count)  # [W]
        source = jnp.where(place < num_kept, place, kept + place - num_kept + skipped[:, None])  # [B, W]
        # zeros and not a product with a mask: NaN times zero is NaN
        new = jnp.where(valid[..., None], block.values, 0)
        window = _take_frames(jnp.concatenate([state.mel, new], axis=1), source)  # [B, W, M]
        dropped = jnp.maximum(seen - kept, 0) - begin  # [B]: frames of the window that the next one does not need
        return window, begin, VocoderState(_take_frames(window, dropped[:, None] + jnp.arange(kept)), seen, length)


def _take_frames(x: Float[Array, "B W C"], places: Int[Array, "B N"]) -> jax.Array:
    """Frames of each row; any frame for a place that is not there. [B, N, C]"""
    return jnp.take_along_axis(x, jnp.clip(places, 0, x.shape[1] - 1)[..., None], axis=1)


class Sides(NamedTuple):
    """Frames or samples read before and after a place."""

    behind: int
    ahead: int


_ACTIVATION_SIDES = Sides(ACTIVATION_REACH, ACTIVATION_REACH)


def reach(config: BigVGANConfig) -> Sides:
    """How many mel frames before and after a frame its samples depend on."""
    edge = Sides(*same_padding(EDGE_KERNEL, 1))
    # the samples of frame 0; then, going back from the output to the input, what they depend on
    first = 0
    last = math.prod(config.upsample_rates) - 1
    first, last = _widen_range(first, last, edge, _ACTIVATION_SIDES)
    stages = zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
    for rate, kernel in reversed(list(stages)):
        first, last = _widen_range(first, last, _stage_sides(config))
        # sample s is under frames floor(s / rate) - behind to floor(s / rate) + ahead
        behind, ahead = upsampling_padding(kernel, rate)
        first = first // rate - behind
        last = last // rate + ahead
    first, last = _widen_range(first, last, edge)
    return Sides(-first, last)


def _stage_sides(config: BigVGANConfig) -> Sides:
    """Of a stage's blocks, each of which is the sum of its rounds, the widest."""
    widest = Sides(0, 0)
    for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
        block = Sides(0, 0)
        for dilation in dilations:
            dilated = Sides(*same_padding(kernel, dilation))
            undilated = Sides(*same_padding(kernel, 1))
            block = _add_sides(block, _ACTIVATION_SIDES, dilated, _ACTIVATION_SIDES, undilated)
        widest = Sides(max(widest.behind, block.behind), max(widest.ahead, block.ahead))
    return widest


def _add_sides(*sides: Sides) -> Sides:
    """What operations read before and after a place, one after the other."""
    behind = 0
    ahead = 0
    for side in sides:
        behind += side.behind
        ahead += side.ahead
    return Sides(behind, ahead)


def _widen_range(first: int, last: int, *sides: Sides) -> tuple[int, int]:
    total = _add_sides(*sides)
    return first - total.behind, last + total.ahead
