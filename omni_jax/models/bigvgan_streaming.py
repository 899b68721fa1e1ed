"""The vocoder by blocks: what it says to a stream of mel frames is, to the last rounding, what it says to all of them.

A sample depends on a bounded number of frames to either side (``reach``). A step calls the whole vocoder on a window,
from the frame that the first new sample looks back to up to the newest one, and gives out the samples whose frames are
all there. Where a row is not longer than its window, the window begins with the row and meets its true edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import same_sides
from omni_jax.layers.streaming import Block, Streaming, keep_rows
from omni_jax.models.bigvgan import ACTIVATION_REACH, EDGE_KERNEL, BigVGAN

FRAME_SECONDS = 0.01


@struct.dataclass
class VocoderState:
    mel: Float[Array, "B K M"]  # the last K frames, or fewer, from the left
    seen: Int[Array, " B"]  # frames since the row's beginning, with those after its end
    length: Int[Array, " B"]  # of them up to its end


@dataclass(frozen=True)
class StreamedBigVGAN:
    """The vocoder with a state of the last frames."""

    bigvgan: BigVGAN

    @property
    def streaming(self) -> Streaming:
        config = self.bigvgan.config
        behind, ahead = reach(config)
        return Streaming(FRAME_SECONDS, 1, ahead, behind, outputs=math.prod(config.upsample_rates))

    def apply_sequence(self, params: Any, x: Block) -> Block:
        """Samples [B, T * 240] of whole rows."""
        valid = jnp.asarray(x.valid)
        samples = self.bigvgan.apply({"params": params}, x.values, jnp.sum(valid, axis=1))
        return Block(samples, jnp.repeat(valid, self.streaming.outputs, axis=1))

    def init_state(self, batch: int) -> VocoderState:
        config, none = self.bigvgan.config, jnp.zeros(batch, jnp.int32)
        return VocoderState(jnp.zeros((batch, sum(reach(config)), config.mel_dim)), none, none)

    def step(
        self, params: Any, state: VocoderState, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, VocoderState]:
        """As many frames' samples as there are new frames: those up to ``look_ahead`` frames before the newest."""
        valid, ahead = jnp.asarray(block.valid), self.streaming.look_ahead
        kept, count = state.mel.shape[1], valid.shape[1]
        # a row begins with its first valid frame
        skipped = jnp.where(jnp.any(valid, axis=1), jnp.argmax(valid, axis=1), count)
        skipped = jnp.where(state.seen == 0, skipped, 0)
        seen, length = state.seen + count - skipped, state.length + jnp.sum(valid, axis=1)
        begin = jnp.maximum(state.seen - kept, 0)  # of the window; so many of its frames are there already:
        there = (state.seen - begin)[:, None]
        place = jnp.arange(kept + count)
        source = jnp.where(place < there, place, kept + place - there + skipped[:, None])
        new = jnp.where(valid[..., None], block.values, 0)
        window = _frames_at(jnp.concatenate([state.mel, new], axis=1), source)
        samples: Any = self.bigvgan.apply({"params": params}, window, jnp.maximum(length - begin, 0))
        out = (seen - ahead - count)[:, None] + jnp.arange(count)  # frames whose samples are given out
        made = _frames_at(samples.reshape(*window.shape[:2], -1), out - begin[:, None])
        real = (out >= 0) & (out < length[:, None])
        real = real if active is None else real & jnp.asarray(active)[:, None]
        rest = jnp.maximum(seen - kept, 0) - begin
        left = VocoderState(_frames_at(window, rest[:, None] + jnp.arange(kept)), seen, length)
        outputs = Block(made.reshape(len(made), -1), jnp.repeat(real, made.shape[2], axis=1))
        return outputs, keep_rows(active, left, state)


def reach(config: BigVGANConfig) -> tuple[int, int]:
    """How many mel frames before and after a frame its samples depend on."""
    # the samples of frame 0; then, going back, what they depend on
    first, last = 0, math.prod(config.upsample_rates) - 1
    shapes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
    edge = same_sides(EDGE_KERNEL, 1)
    first, last = _widened(first, last, edge, (ACTIVATION_REACH,) * 2)
    for rate, kernel in reversed(list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))):
        rounds = [[side for d in ds for side in _round_sides(k, d)] for k, ds in shapes]
        widest = (max(sum(side[i] for side in block) for block in rounds) for i in (0, 1))
        first, last = _widened(first, last, tuple(widest))
        cut = (kernel - rate) // 2  # sample s is under frames floor(s / rate) - behind to floor(s / rate) + ahead
        behind, ahead = (kernel - 1 - cut) // rate, (rate - 1 + cut) // rate
        first, last = first // rate - behind, last // rate + ahead
    first, last = _widened(first, last, edge)
    return -first, last


def _round_sides(kernel: int, dilation: int) -> list[tuple[int, int]]:
    wave = (ACTIVATION_REACH, ACTIVATION_REACH)
    return [wave, same_sides(kernel, dilation), wave, same_sides(kernel, 1)]


def _widened(first: int, last: int, *sides: tuple[int, ...]) -> tuple[int, int]:
    return first - sum(side[0] for side in sides), last + sum(side[1] for side in sides)


def _frames_at(x: Float[Array, "B T C"], places: Int[Array, "B N"]) -> jax.Array:
    """Frames of each row; any frame for a place that is not there. [B, N, C]"""
    return jnp.take_along_axis(x, jnp.clip(places, 0, x.shape[1] - 1)[..., None], axis=1)
