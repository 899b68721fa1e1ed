"""Losses of a generator and its discriminators: least squares, and the features that discriminators see.

Each is of a row, so that rows of padding can be left out, and is added up over the discriminators.

Letters: B rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from omni_jax.models.discriminators import FeatureMaps, logits


def discriminator_loss(recorded: FeatureMaps, generated: FeatureMaps) -> Float[jax.Array, " B"]:
    """The squared distance of the logits from 1 for recorded sound, and from 0 for generated sound.

    Least-squares GAN: equation 9 of https://arxiv.org/abs/1611.04076 without its halves, as in HiFi-GAN.
    """
    total = jnp.float32(0)
    for of_recorded, of_generated in zip(logits(recorded), logits(generated), strict=True):
        total += _mean(jnp.square(of_recorded - 1)) + _mean(jnp.square(of_generated))
    return total


def generator_loss(generated: FeatureMaps) -> Float[jax.Array, " B"]:
    """The squared distance of the logits from 1, which generated sound should have."""
    total = jnp.float32(0)
    for of_generated in logits(generated):
        total += _mean(jnp.square(of_generated - 1))
    return total


def feature_loss(recorded: FeatureMaps, generated: FeatureMaps) -> Float[jax.Array, " B"]:
    """The mean absolute difference of the outputs of each layer (equation 5 of MelGAN, arXiv:1910.06711)."""
    total = jnp.float32(0)
    for recorded_layers, generated_layers in zip(recorded, generated, strict=True):
        for of_recorded, of_generated in zip(recorded_layers, generated_layers, strict=True):
            total += _mean(jnp.abs(jax.lax.stop_gradient(of_recorded) - of_generated))
    return total


def _mean(x: jax.Array) -> Float[jax.Array, " B"]:
    """Of all that a row has."""
    return jnp.mean(x.reshape(len(x), -1), axis=1)
