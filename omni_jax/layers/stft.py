"""Short-time spectra that are differentiable and computed on the device.

Letters: B rows, N samples, T frames, F frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.batch import Array

_LEAST_POWER = 1e-12  # below it a magnitude has no gradient, which would be infinite at 0


class Resolution(NamedTuple):
    """Of spectra, in samples.

    Attributes:
      fft: of a transform; half of it and one are the frequencies.
      hop: from one frame to the next.
      window: that the Hann window does not cut off, in the middle of the transform.
    """

    fft: int
    hop: int
    window: int


def stft_magnitude(samples: Float[Array, "B N"], resolution: Resolution) -> Float[jax.Array, "B T F"]:
    """Magnitudes of the frames that lie wholly within the samples.

    Reference: ``torch.stft`` with ``center=False``, a Hann window and no normalization.
    """
    frames = _cut_frames(jnp.asarray(samples), resolution)  # [B, T, fft]
    spectrum = jnp.fft.rfft(frames * _window(resolution))  # [B, T, F]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.sqrt(jnp.maximum(power, _LEAST_POWER))


def _cut_frames(samples: Float[jax.Array, "B N"], resolution: Resolution) -> Float[jax.Array, "B T fft"]:
    """Frames as hops side by side: a gather, and the scatter that its gradient is, would be a loop over samples."""
    fft, hop, _ = resolution
    num_rows, num_samples = samples.shape
    num_frames = (num_samples - fft) // hop + 1
    hops_per_frame = -(-fft // hop)
    num_hops = num_frames + hops_per_frame - 1
    missing = max(num_hops * hop - num_samples, 0)
    padded = jnp.pad(samples, ((0, 0), (0, missing)))[:, : num_hops * hop]
    hops = padded.reshape(num_rows, num_hops, hop)
    parts = [hops[:, i : i + num_frames] for i in range(hops_per_frame)]
    return jnp.concatenate(parts, axis=-1)[..., :fft]


def _window(resolution: Resolution) -> Float[np.ndarray, " fft"]:
    """A periodic Hann window, with zeros on both sides."""
    fft, _, size = resolution
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    before = (fft - size) // 2
    return np.pad(hann, (before, fft - size - before)).astype(np.float32)
