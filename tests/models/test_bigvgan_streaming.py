"""The vocoder by blocks: the contract, its reach at the published sizes, and no seam."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from omni_jax.config import BigVGANConfig
from omni_jax.engine.token2wav_engine import make_vocoder_weights
from omni_jax.layers.streaming import Block
from omni_jax.models.bigvgan import BigVGAN, VocoderWeights
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN, reach
from tests.streaming import Case, check_contract

# the same sums, cut into pieces by the length of the window
TOLERANCE = 1e-5

SIX_STAGES = BigVGANConfig(upsample_initial_channel=64)  # the published kernels and rates
TWO_STAGES = dataclasses.replace(
    SIX_STAGES, upsample_initial_channel=16, upsample_rates=(5, 3), upsample_kernel_sizes=(11, 7)
)
SMALL = BigVGANConfig(
    mel_dim=8,
    upsample_initial_channel=8,
    upsample_rates=(3,),
    upsample_kernel_sizes=(7,),
    resblock_kernel_sizes=(3, 4),
    resblock_dilation_sizes=((1, 2), (1,)),
)


def random_weights(config: BigVGANConfig, output_scale: float = 1.0) -> VocoderWeights:
    """Kernels that keep the variance, the last one scaled; what else there is lies around zero."""
    rng = np.random.default_rng(0)
    model = BigVGAN(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 9, config.mel_dim)), np.array([9]))

    def draw(a: Any) -> np.ndarray:
        scale = 1 / np.sqrt(a.shape[0] * a.shape[1]) if len(a.shape) == 3 else 0.1
        return (scale * rng.standard_normal(a.shape)).astype(np.float32)

    params = jax.tree.map(draw, nn.unbox(shapes["params"]))
    params["conv_out"]["kernel"] *= output_scale
    return make_vocoder_weights(model, params)


def random_mel(config: BigVGANConfig, lengths: tuple[int, ...], units: int) -> Block:
    values = np.random.default_rng(1).standard_normal((len(lengths), units, config.mel_dim)).astype(np.float32)
    return Block(values, np.arange(units) < np.array(lengths)[:, None])


def test_contract() -> None:
    behind, ahead = reach(SMALL)
    length = behind + ahead + 5
    x = random_mel(SMALL, (length, 1, ahead, length - 3), length)
    part = StreamedBigVGAN(SMALL)
    check_contract(Case(part, random_weights(SMALL), x, TOLERANCE, size=7))


def test_declared_numbers() -> None:
    streaming = StreamedBigVGAN(BigVGANConfig()).streaming
    assert (streaming.look_back, streaming.look_ahead, streaming.outputs) == (34, 34, 240)
    assert streaming.latency == pytest.approx(0.35)


def test_reach_of_the_published_sizes() -> None:
    """A frame that is NaN spoils the samples of all frames in its reach, and of no other."""
    behind, ahead = reach(SIX_STAGES)
    spoilt_frame = 37
    x = random_mel(SIX_STAGES, (75,), 75)
    x.values[0, spoilt_frame] = np.nan
    output = jax.jit(StreamedBigVGAN(SIX_STAGES).apply_sequence)(random_weights(SIX_STAGES), x)
    spoilt = np.isnan(np.asarray(output.values)[0].reshape(75, -1)).any(axis=1)
    assert np.flatnonzero(spoilt).tolist() == list(range(spoilt_frame - ahead, spoilt_frame + behind + 1))


def test_no_seam() -> None:
    """Blocks as a stream of speech has them; a row that begins later and one that ends in between."""
    part = StreamedBigVGAN(TWO_STAGES)
    samples_per_frame = part.streaming.outputs
    # what is clipped would hide a seam
    weights = random_weights(TWO_STAGES, output_scale=0.25)
    lengths = (120, 100)
    x = random_mel(TWO_STAGES, lengths, 120)
    expected = np.asarray(jax.jit(part.apply_sequence)(weights, x).values)

    shifted = np.zeros((2, 216, TWO_STAGES.mel_dim), np.float32)
    valid = np.zeros((2, 216), bool)
    for row, begin in enumerate((0, 24)):
        shifted[row, begin : begin + 120] = x.values[row]
        valid[row, begin : begin + 120] = x.valid[row]
    step = jax.jit(part.step)
    state = part.init_state(2)
    pieces = []
    for begin in range(0, 216, 72):
        block = slice(begin, begin + 72)
        output, state = step(weights, state, Block(shifted[:, block], valid[:, block]))
        pieces.append([np.asarray(output.values)[i, np.asarray(output.valid)[i]] for i in range(2)])
    for row, length in enumerate(lengths):
        streamed = np.concatenate([piece[row] for piece in pieces])
        samples = expected[row, : samples_per_frame * length]
        np.testing.assert_allclose(streamed, samples, rtol=0, atol=TOLERANCE)
        assert 0.1 < np.abs(samples).max() < 1
