"""Speaker vectors: the log-mel of a clip to a vector of length 1, near those of other clips of its speaker.

Letters: B clips, T mel frames, M mel bins, D numbers of a vector, S speakers.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.layers.params import param
from omni_jax.models.speaker_encoder import SpeakerEncoder, shortest_clip
from omni_jax.speaker_verifier_config import SpeakerVerifierConfig

_LEAST_NORM = 1e-6
_LEAST_SINE = 1e-6  # squared; the gradient of its root is finite


class SpeakerVerifier(nn.Module):
    """The network, and a direction for each speaker that it is trained to tell."""

    config: SpeakerVerifierConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = SpeakerEncoder(self.config.encoder, dtype=self.dtype, param_dtype=self.param_dtype)
        shape = (self.config.num_speakers, self.config.width)
        self.speakers = param(self, "speakers", nn.initializers.normal(1.0), shape, ("channels", "channels"))

    def __call__(self, mel: Float[Array, "B T M"], length: Int[Array, " B"]) -> Float[jax.Array, "B D"]:
        """The vectors of clips of so many frames."""
        # the mean over time is the channel of the recording, and no part of the voice
        inside = jnp.arange(mel.shape[1])[None, :, None] < jnp.asarray(length)[:, None, None]  # [B, T, 1]
        mean = jnp.sum(jnp.where(inside, mel, 0), axis=1, keepdims=True) / jnp.asarray(length)[:, None, None]
        return _normalize(self.encoder(jnp.where(inside, mel - mean, 0), length))  # [B, D]

    def cosines(self, vectors: Float[Array, "B D"]) -> Float[jax.Array, "B S"]:
        """Of vectors and the directions of all speakers."""
        # a TPU's bfloat16 passes would move small angles
        return jnp.matmul(jnp.asarray(vectors), _normalize(self.speakers).T, precision="highest")  # [B, S]


def margin_logits(
    cosines: Float[Array, "B S"], speakers: Int[Array, " B"], margin: float, scale: float
) -> Float[jax.Array, "B S"]:
    """Logits of additive angular margin (ArcFace, https://arxiv.org/abs/1801.07698, equation 3), in float32.

    The angle to the own speaker counts as ``margin`` larger. Where that would be over pi, the cosine falls on in a line
    in place of rising again.

    Args:
      cosines: of vectors and speakers.
      speakers: who speaks each.
      margin: radians.
      scale: of all logits.
    """
    cosines = jnp.asarray(cosines, jnp.float32)  # [B, S]
    sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosines), _LEAST_SINE))  # [B, S]
    wider = cosines * math.cos(margin) - sine * math.sin(margin)  # [B, S]
    wider = jnp.where(cosines > -math.cos(margin), wider, cosines - margin * math.sin(margin))  # [B, S]
    is_own = jnp.arange(cosines.shape[1])[None, :] == jnp.asarray(speakers)[:, None]  # [B, S]
    return scale * jnp.where(is_own, wider, cosines)  # [B, S]


def init_params(model: SpeakerVerifier, key: jax.Array) -> Any:
    """Fresh parameters, in their boxes."""
    num_frames = shortest_clip(model.config.encoder)
    mel = np.zeros((1, num_frames, model.config.mel_dim), np.float32)
    return model.init(key, mel, np.full(1, num_frames, np.int32))["params"]


def abstract_params(model: SpeakerVerifier) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def _normalize(x: Float[Array, "N D"]) -> Float[jax.Array, "N D"]:
    x = jnp.asarray(x, jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), _LEAST_NORM**2))
