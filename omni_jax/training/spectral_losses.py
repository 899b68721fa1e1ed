"""How far generated sound is from recorded sound, by their spectra.

Letters: B rows, N samples, T frames, F frequencies, M mel bins.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.layers.stft import Resolution, stft_magnitude
from omni_jax.processing.audio import mel_filters

# window in samples, and mel bins; a frame each quarter of a window
_MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
MIN_SAMPLES = 2048  # of sound that all of them fit into
_LEAST_MAGNITUDE = 1e-5  # of a mel bin; below it there is silence
# of Parallel WaveGAN
_STFT_RESOLUTIONS = (Resolution(1024, 120, 600), Resolution(2048, 240, 1200), Resolution(512, 50, 240))


def multi_scale_mel_error(
    generated: Float[Array, "B N"], recorded: Float[Array, "B N"], rate: int
) -> Float[jax.Array, " B"]:
    """The mean absolute error of the log-mel, in decades, added up over seven scales.

    The mean is over the frames that lie wholly within a row, and over its bins. Reference:
    ``MultiScaleMelSpectrogramLoss`` of BigVGAN, and of the Descript codec (https://arxiv.org/abs/2306.06546, section
    3.4); their frames reach beyond the ends of a row, which are no ends of its sound.

    Args:
      generated: by a vocoder.
      recorded: what it should be.
      rate: samples a second.
    """
    total = jnp.zeros(generated.shape[0])
    for window, bins in _MEL_SCALES:
        with jax.named_scope(f"mel_{window}"):
            resolution = Resolution(window, window // 4, window)
            ours = _log_mel(generated, resolution, bins, rate)  # [B, T, M]
            theirs = _log_mel(recorded, resolution, bins, rate)
            total += jnp.mean(jnp.abs(ours - theirs), axis=(1, 2))
    return total


def stft_distance(generated: Float[Array, "B N"], recorded: Float[Array, "B N"]) -> Float[jax.Array, " B"]:
    """Spectral convergence and the mean error of the logarithm, the mean over three resolutions.

    Reference: equations 4 to 6 of Parallel WaveGAN (https://arxiv.org/abs/1910.11480).
    """
    total = jnp.zeros(generated.shape[0])
    for resolution in _STFT_RESOLUTIONS:
        ours = stft_magnitude(generated, resolution)  # [B, T, F]
        theirs = stft_magnitude(recorded, resolution)
        convergence = _norm(theirs - ours) / jnp.maximum(_norm(theirs), _LEAST_MAGNITUDE)  # [B]
        logarithms = jnp.abs(jnp.log(theirs) - jnp.log(ours))
        total += convergence + jnp.mean(logarithms, axis=(1, 2))
    return total / len(_STFT_RESOLUTIONS)


def _log_mel(samples: Array, resolution: Resolution, bins: int, rate: int) -> Float[jax.Array, "B T M"]:
    magnitude = stft_magnitude(samples, resolution)  # [B, T, F]
    mel = magnitude @ _filters(bins, resolution.fft, rate)
    return jnp.log10(jnp.maximum(mel, _LEAST_MAGNITUDE))


def _norm(x: Float[jax.Array, "B T F"]) -> Float[jax.Array, " B"]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))


@functools.cache
def _filters(bins: int, fft: int, rate: int) -> Float[np.ndarray, "F M"]:
    return mel_filters(bins, fft, rate).astype(np.float32)
