"""The loss of answers as bags of words, of the features of media.

Letters: B rows, S positions, T positions of targets, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from omni_jax.batch import NO_FEATURE, Array, TrainBatch

_TINY_PROBABILITY = 1e-9  # added where the logarithm is taken


def bag_of_words_loss(
    x: Float[Array, "B S D"], table: Float[Array, "V D"], batch: TrainBatch
) -> Float[jax.Array, "B T"]:
    """Negative logarithm of the probability of each target under the media of its example; 0 where it has none.

    Args:
      x: features where media are; elsewhere whatever.
      table: token embeddings.
      batch: says where media are, and what the targets are.
    """
    # of length 1 on average: then words are about as likely as each other at first, however long embeddings are
    length = jnp.sqrt(jnp.mean(jnp.sum(table.astype(jnp.float32) ** 2, axis=1)))  # []
    logits = jnp.einsum("bsd,vd->bsv", x, (table / length).astype(x.dtype)).astype(jnp.float32)  # [B, S, V]
    probabilities = jax.nn.softmax(logits)  # [B, S, V]
    # of each target at each position
    of_targets = jnp.take_along_axis(probabilities, jnp.asarray(batch.targets)[:, None, :], axis=2)  # [B, S, T]
    sees = sees_feature(batch).swapaxes(1, 2)  # [B, S, T]
    count = jnp.sum(sees, axis=1)  # [B, T]
    mean = jnp.sum(jnp.where(sees, of_targets, 0), axis=1) / jnp.maximum(count, 1)  # [B, T]
    return jnp.where(count > 0, -jnp.log(mean + _TINY_PROBABILITY), 0.0)


def sees_feature(batch: TrainBatch) -> Bool[jax.Array, "*batch T S"]:
    """Whether a position holds a feature of the example that a target is of."""
    segment_ids = jnp.asarray(batch.inputs.segment_ids)  # [..., S]
    is_feature = jnp.asarray(batch.inputs.media_index) != NO_FEATURE  # [..., S]
    return (segment_ids[..., :, None] == segment_ids[..., None, :]) & is_feature[..., None, :]
