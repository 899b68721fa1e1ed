"""The vocoder by blocks: the contract, its reach, and no seam at the published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.config import BigVGANConfig, OmniConfig
from omni_jax.layers.streaming import Block
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN, reach
from tests.streaming import Case, check_contract

# the same sums, cut into pieces by the length of the window
TOLERANCE = 1e-5

TINY = OmniConfig.tiny().token2wav_config.bigvgan_config  # the published kernels and rates
SMALL = BigVGANConfig(
    mel_dim=8,
    upsample_initial_channel=8,
    upsample_rates=(3,),
    upsample_kernel_sizes=(7,),
    resblock_kernel_sizes=(3, 4),
    resblock_dilation_sizes=((1, 2), (1,)),
)


def random_params(config: BigVGANConfig) -> Any:
    """Kernels that keep the variance; what else there is lies around zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(BigVGAN(config).init, jax.random.key(0), np.zeros((1, 9, config.mel_dim)), np.array([9]))

    def draw(a: Any) -> np.ndarray:
        scale = 1 / np.sqrt(a.shape[0] * a.shape[1]) if len(a.shape) == 3 else 0.1
        return (scale * rng.standard_normal(a.shape)).astype(np.float32)

    return jax.tree.map(draw, nn.unbox(shapes["params"]))


def mel(config: BigVGANConfig, lengths: tuple[int, ...], units: int) -> Block:
    values = np.random.default_rng(1).standard_normal((len(lengths), units, config.mel_dim)).astype(np.float32)
    return Block(values, np.arange(units) < np.array(lengths)[:, None])


def test_contract() -> None:
    behind, ahead = reach(SMALL)
    length = behind + ahead + 5
    x = mel(SMALL, (length, 1, ahead, length - 3), length)
    part = StreamedBigVGAN(BigVGAN(SMALL))
    check_contract(Case(part, random_params(SMALL), x, TOLERANCE, size=7))


def test_declared_numbers() -> None:
    about = StreamedBigVGAN(BigVGAN(BigVGANConfig())).streaming
    assert (about.look_back, about.look_ahead, about.outputs) == (34, 34, 240)
    assert about.latency == pytest.approx(0.35)


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Any:
    """Random ones, which make sound of an amplitude near 14, brought down to what a wav file holds.

    The tolerance is of samples within -1 and 1, and what is clipped would hide a seam.
    """
    params = dict(store.load(tiny_model, ["token2wav"])["token2wav"]["bigvgan"])
    params["conv_out"] = jax.tree.map(lambda a: a / 20, params["conv_out"])
    return params


def test_reach_of_the_published_sizes(params: Any) -> None:
    """A frame that is not a number spoils the samples of all frames in its reach, and of no other."""
    (behind, ahead), at = reach(TINY), 80
    x = mel(TINY, (160,), 160)
    x.values[0, at] = np.nan
    made = jax.jit(StreamedBigVGAN(BigVGAN(TINY)).apply_sequence)(params, x)
    spoilt = np.isnan(np.asarray(made.values)[0].reshape(160, -1)).any(axis=1)
    assert np.flatnonzero(spoilt).tolist() == list(range(at - ahead, at + behind + 1))


def test_no_seam_with_the_published_sizes(params: Any) -> None:
    """Blocks as a stream of speech has them; a row that begins later and one that ends in between."""
    part, late = StreamedBigVGAN(BigVGAN(TINY)), 24
    x = mel(TINY, (160, 130), 160)
    whole = np.asarray(jax.jit(part.apply_sequence)(params, x).values)
    shifted = np.zeros((2, 216, TINY.mel_dim), np.float32)
    valid = np.zeros((2, 216), bool)
    for row, begin in enumerate((0, late)):
        shifted[row, begin : begin + 160], valid[row, begin : begin + 160] = x.values[row], x.valid[row]
    step, state, pieces = jax.jit(part.step), part.init_state(2), []
    for at in range(0, 216, 72):
        made, state = step(params, state, Block(shifted[:, at : at + 72], valid[:, at : at + 72]))
        pieces.append([np.asarray(made.values)[i, np.asarray(made.valid)[i]] for i in range(2)])
    for row, length in enumerate((160, 130)):
        streamed = np.concatenate([piece[row] for piece in pieces])
        wanted = whole[row, : 240 * length]
        np.testing.assert_allclose(streamed, wanted, rtol=0, atol=TOLERANCE)
        assert 0.1 < np.abs(wanted).max() < 1
